"""Nothing that is read, data, checkpoints and stored configs, runs code or writes where it should not.

Read from the source: there is no pickle and the like. Tried: files as an attacker would make them. What is refused or
left out is told by the tests of each part; here it counts that nothing was run, and nothing outside touched.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from m3ae_jax import config as config_lib
from m3ae_jax.checkpoint import manifest
from m3ae_jax.checkpoint.manager import Checkpoints, find, load_params
from m3ae_jax.data import images
from m3ae_jax.data.sources.base import SourceOptions
from m3ae_jax.data.sources.folder import FolderSource
from m3ae_jax.data.sources.hdf5 import HDF5Source
from m3ae_jax.data.sources.parquet import ParquetSource
from m3ae_jax.data.sources.tfds import TFDSSource
from m3ae_jax.data.sources.webdataset import WebDatasetSource
from m3ae_jax.errors import UserError
from m3ae_jax.evals.run import check as check_evals
from m3ae_jax.train.step import TrainState

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "m3ae_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
CONVERT = PACKAGE / "convert"  # reads other projects' checkpoints with an unpickler that builds arrays only

PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
PROGRAMS = {"subprocess", "pty", "code", "codeop"}
BANNED_CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle"),
    *("os.system", "os.popen", "os.startfile", "shutil.unpack_archive", "runpy.run_path", "runpy.run_module"),
}
BANNED_METHODS = {"extract", "extractall", "read_pickle", "to_pickle"}  # of tarfile, zipfile and pandas
ALLOWED = {
    "m3ae_jax/__main__.py": ["os.execv"],  # becomes m3ae_jax.main
    "m3ae_jax/console.py": ["os.execv"],  # the program itself anew, with its own command line
    "m3ae_jax/benchmark/end_to_end.py": ["subprocess"],  # m3ae_jax.main, without a shell, with a config written here
    "m3ae_jax/sweep/runner.py": ["subprocess"],  # m3ae_jax.main, without a shell, with what its command line said
}
IMPORTERS = {  # who imports by a name that is not written in the code; each says what names it takes
    "m3ae_jax/__init__.py": "of load and Model",
    "m3ae_jax/benchmark/__main__.py": "one of WHAT",
    "m3ae_jax/benchmark/peer.py": "a module of benchmark/peers",
    "m3ae_jax/config/files.py": "the Python file of --config",
    "m3ae_jax/config/schema.py": "one of schema.GROUPS, objective, and metrics.writers",
    "m3ae_jax/data/sources/__init__.py": "data.*.source",
    "m3ae_jax/data/sources/tfds.py": "data.*.path with source=tfds",
    "m3ae_jax/evals/run.py": "one of evals.run.EVALUATIONS",
}


# --- read from the source ----------------------------------------------------------------------------------


def imported(tree: ast.AST) -> dict[str, str]:
    """What each imported name of a module stands for, dotted."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules(tree: ast.AST) -> set[str]:
    """The topmost packages that a module imports."""
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in found}


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """``np.load`` as ``numpy.load``; of what is no chain of names its last part alone, as ``.load``."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return ""


def offences(text: str, may_unpickle: bool = False) -> Iterator[str]:
    """What a module does that it must not."""
    tree = ast.parse(text)
    names = imported(tree)
    yield from sorted(modules(tree) & (PROGRAMS if may_unpickle else PICKLES | PROGRAMS))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = dotted(call.func, names).removeprefix("builtins.")
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        if name in BANNED_CALLS or name.startswith(("os.exec", "os.spawn", "os.posix_spawn")):
            yield name
        if isinstance(call.func, ast.Attribute) and call.func.attr in BANNED_METHODS:
            yield f".{call.func.attr}"
        allow = keywords.get("allow_pickle")
        refuses = isinstance(allow, ast.Constant) and allow.value is False
        if (name in ("numpy.load", "numpy.lib.format.read_array") or allow is not None) and not refuses:
            yield f"{name} without allow_pickle=False"
        if name == "PIL.Image.open" and "formats" not in keywords:
            yield "Image.open without formats=: of an EPS picture, load() starts Ghostscript"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_unpickles_or_runs_what_it_reads(path: Path) -> None:
    found = list(offences(path.read_text(encoding="utf-8"), may_unpickle=CONVERT in path.parents))
    assert found == ALLOWED.get(str(path.relative_to(ROOT)), [])


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "def f():\n    from cloudpickle import loads",
        "import dill as json",
        "import joblib.numpy_pickle",
        "import subprocess",
        "eval('1')",
        "import builtins\nbuiltins.exec('1')",
        "import numpy as np\nnp.load('x')",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
        "from numpy import load as read\nread('x')",
        "read('x', allow_pickle=allow)",
        "import torch\ntorch.load('x')",
        "import yaml as y\ny.load('x')",
        "from os import system\nsystem('ls')",
        "import os\nos.execvp('ls', [])",
        "tar.extractall('x')",
        "open_archive().extract('x')",
        "from PIL import Image\nImage.open('x')",
    ],
)
def test_the_check_finds_what_it_is_for(text: str) -> None:
    assert list(offences(text))


def test_the_check_lets_pass_what_is_harmless() -> None:
    text = "import re, numpy as np\nre.compile('a')\nnp.load('x', allow_pickle=False)\nlowered.compile()\njson.load(f)"
    assert not list(offences(text)) and not list(offences("import pickle", may_unpickle=True))


def test_few_modules_import_by_a_name_that_is_read() -> None:
    importers = ("importlib.import_module", "importlib.util.spec_from_file_location")
    found = set()
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = imported(tree)
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        asked = (call.args[0] for call in calls if dotted(call.func, names) in importers)
        if not all(isinstance(name, ast.Constant) for name in asked):
            found.add(str(path.relative_to(ROOT)))
    assert found == set(IMPORTERS)


# --- what the tests below share ----------------------------------------------------------------------------


class Bomb:
    """Whoever unpickles it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Is there once the module `evil_module` was imported, or a `Bomb(ran)` unpickled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, code = tmp_path / "ran", tmp_path / "code"
    code.mkdir()
    (code / "evil_module.py").write_text(f"import os\nos.makedirs({str(path)!r})\n\n\nclass Evil:\n    pass\n")
    monkeypatch.syspath_prepend(str(code))
    monkeypatch.delitem(sys.modules, "evil_module", raising=False)
    return path


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder beside the data, which must stay as it is."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in ("secret.jpg", "secret.txt", "secret.h5"):
        (folder / name).write_bytes(b"a secret, " * 10)
    before = contents(folder)
    yield folder
    assert contents(folder) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def everything(source: Any) -> bytes:
    return repr(source.read(np.arange(len(source)))).encode()


def picture(kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 6), (1, 2, 3)).save(data, kind)
    return data.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes | tuple[bytes, str]]]) -> str:
    """A member is its bytes, or a link: its type and where it leads."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            if isinstance(data, tuple):
                member.type, member.linkname = data
                tar.addfile(member)
            else:
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path)


# --- data --------------------------------------------------------------------------------------------------


def test_names_and_links_in_a_tar_lead_nowhere(tmp_path: Path, outside: Path) -> None:
    secret = str(outside / "secret")
    members: list[tuple[str, bytes | tuple[bytes, str]]] = []
    for key in ("good", "a/b/c", "../../outside/new", "a/../../../outside/new", str(outside / "new"), "link/new"):
        if key == "link/new":
            members.append(("link", (tarfile.SYMTYPE, str(outside))))
        members += [(f"{key}.png", picture()), (f"{key}.txt", key.encode())]
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        members += [(f"{kind!r}.jpg", (kind, f"{secret}.jpg")), (f"{kind!r}.txt", (kind, f"{secret}.txt"))]
    source = WebDatasetSource(write_tar(tmp_path / "data" / "0.tar", members))
    assert [record["caption"] for record in source.read(np.arange(len(source)))] == [b"good", b"a/b/c", b"link/new"]
    assert b"secret" not in everything(source)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["0.tar"]


def test_metadata_name_no_file_outside_of_the_folder(tmp_path: Path, outside: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "good.png").write_bytes(picture())
    (data / "link.jpg").symlink_to(outside / "secret.jpg")
    names = ["good.png", "link.jpg", "../outside/secret.jpg", f"{outside}/secret.jpg", "./../outside/secret.jpg"]
    lines = [json.dumps({"file_name": name, "caption": name}) for name in names]
    (data / "metadata.jsonl").write_text("\n".join(lines))
    source = FolderSource(str(data))
    assert len(source) == 1 and b"secret" not in everything(source)
    assert source.report.skipped == {"link out of the folder": 1, "unsafe name": 3}


def test_metadata_that_are_a_link_out_of_the_folder(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "good.png").write_bytes(picture())
    line = json.dumps({"file_name": "good.png", "caption": "c"})
    (tmp_path / "metadata.jsonl").write_text(line)
    (data / "metadata.jsonl").symlink_to("../metadata.jsonl")
    with pytest.raises(UserError, match=r"metadata\.jsonl is a link out of the folder"):
        FolderSource(str(data))
    (data / "mine.jsonl").write_text(line)
    (data / "metadata.jsonl").unlink()
    (data / "metadata.jsonl").symlink_to("mine.jsonl")
    assert len(FolderSource(str(data))) == 1


def external_link(file: h5py.File, name: str, other: Path) -> None:
    file[name] = h5py.ExternalLink(str(other), "/jpg")


def external_group(file: h5py.File, name: str, other: Path) -> None:
    file["elsewhere"] = h5py.ExternalLink(str(other), "/")
    file[name] = h5py.SoftLink("/elsewhere/jpg")


def external_storage(file: h5py.File, name: str, other: Path) -> None:
    file.create_dataset(name, (2,), "V8", external=[(str(other), 0, 16)])


def virtual(file: h5py.File, name: str, other: Path) -> None:
    layout = h5py.VirtualLayout((2,), "V8")
    layout[:] = h5py.VirtualSource(str(other), "jpg", (2,), "V8")
    file.create_virtual_dataset(name, layout)


@pytest.mark.parametrize("how", [external_link, external_group, external_storage, virtual])
@pytest.mark.parametrize("name", ["jpg", "caption", "labels", "train_labels", "class_names", "train/jpg"])
def test_rows_of_hdf5_in_another_file(tmp_path: Path, how: Callable[..., None], name: str) -> None:
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["jpg"] = np.frombuffer(b"a secret" * 2, "V8")
    (tmp_path / "data").mkdir()
    with h5py.File(tmp_path / "data" / "0.h5", "w") as file:
        how(file, name, other)
        for own in {"jpg", "labels"} - {name.rpartition("/")[2]}:
            file[own] = np.frombuffer(b"a row" * 2, "V5") if own == "jpg" else np.arange(2)
    split = "train" if "/" in name else ""
    with pytest.raises(UserError, match=rf"the rows of {name} are in another file") as error:
        HDF5Source(str(tmp_path / "data"), SourceOptions(split=split))
    assert "\n" not in str(error.value)


def test_links_to_elsewhere_that_nobody_asks_for_are_no_matter(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.h5")  # whoever opens it waits for ever
    with h5py.File(tmp_path / "0.h5", "w") as file:
        file["jpg"] = np.frombuffer(b"a row" * 2, "V5")
        file["other"] = h5py.ExternalLink("pipe.h5", "/jpg")
        file["group/other"] = h5py.ExternalLink("pipe.h5", "/jpg")
    assert len(HDF5Source(str(tmp_path / "0.h5"))) == 2


def test_pickles_in_hdf5_are_bytes(tmp_path: Path, ran: Path) -> None:
    data = pickle.dumps(np.array([Bomb(ran)], object))
    with h5py.File(tmp_path / "0.h5", "w") as file:
        file.create_dataset("jpg", data=np.array([np.void(data)]))
        rows = file.create_dataset("caption", (1,), h5py.vlen_dtype(np.uint8))
        rows[0] = np.frombuffer(data, np.uint8)
    record = HDF5Source(str(tmp_path / "0.h5")).read(np.array([0]))[0]
    assert record["image"] == record["caption"] == data and not ran.exists()


def test_an_index_with_pickles_is_built_anew(tmp_path: Path, ran: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "data" / "0.tar", [("a.png", picture()), ("a.txt", b"caption")])
    options = SourceOptions(index_dir=str(tmp_path / "index"))
    WebDatasetSource(path, options)
    (index,) = (tmp_path / "index").iterdir()
    with np.load(index, allow_pickle=False) as file:
        whole = dict(file)
    for name in whole:
        np.savez(index, **(whole | {name: np.array([Bomb(ran)], object)}))
        caplog.clear()
        assert len(WebDatasetSource(path, options)) == 1
        assert "is built anew" in caplog.text and not ran.exists(), name


def test_parquet_names_neither_files_nor_classes(tmp_path: Path, outside: Path, ran: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Older versions of the library unpickled this kind of column (CVE-2023-47248).
    bomb = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Bomb(ran))}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([pa.field("image", image), pa.field("text", pa.string(), metadata=bomb)])
    rows = [{"bytes": None, "path": str(outside / "secret.jpg")}, {"bytes": b"a row", "path": "x"}]
    pq.write_table(pa.table([pa.array(rows, image), pa.array(["c", "d"])], schema=schema), tmp_path / "0.parquet")
    with contextlib.suppress(UserError):
        source = ParquetSource(str(tmp_path / "0.parquet"))
        assert b"secret" not in everything(source)
    assert not ran.exists()


@pytest.mark.parametrize("start", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\xc5\xd0\xd3\xc6"])
def test_no_picture_starts_a_program(start: bytes) -> None:
    with pytest.raises(images.Unusable, match=images.NO_PICTURE):
        images.open_picture(start + b"(%pipe%touch ran) (w) file" + bytes(99))


# --- data sets of TensorFlow Datasets ----------------------------------------------------------------------

LIBRARY = "tensorflow_datasets.core.features."
TEXTS = {"pythonClassName": f"{LIBRARY}features_dict.FeaturesDict"}
TEXT = {"pythonClassName": f"{LIBRARY}text_feature.Text", "text": {}}
EVIL = {"pythonClassName": "evil_module.Evil", "text": {}}
OLD_EVIL = {"type": "evil_module.Evil", "content": {}}
NOTATIONS: dict[str, dict[str, Any]] = {
    "at the top": EVIL,
    "snake case": {"python_class_name": "evil_module.Evil", "text": {}},
    "nested": TEXTS | {"featuresDict": {"features": {"text": EVIL}}},
    "old": {"type": TEXTS["pythonClassName"], "content": {"text": OLD_EVIL}},
    "JSON in a string": TEXTS | {"jsonFeature": {"json": json.dumps({"text": OLD_EVIL})}},
    "old, a message in a string": {
        "type": TEXTS["pythonClassName"],
        "proto_cls": "tensorflow_datasets.FeaturesDict",
        "content": json.dumps({"features": {"text": EVIL}}),
    },
}


def prepared(folder: Path, described: dict[str, Any], **info: Any) -> str:
    """A data set of one text."""
    import tensorflow as tf

    folder.mkdir(exist_ok=True)
    text = tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"a text"]))
    example = tf.train.Example(features=tf.train.Features(feature={"text": text}))
    with tf.io.TFRecordWriter(str(folder / "texts-train.tfrecord-00000-of-00001")) as file:
        file.write(example.SerializeToString())
    split = {"name": "train", "shardLengths": ["1"], "numBytes": "1"} | info.pop("split", {})
    about = {"name": "texts", "version": "1.0.0", "fileFormat": "tfrecord", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(about | info))
    (folder / "features.json").write_text(json.dumps(described))
    return str(folder)


GOOD = TEXTS | {"featuresDict": {"features": {"text": TEXT}}}


@pytest.mark.parametrize("notation", NOTATIONS)
def test_features_of_tfds_import_nothing(tmp_path: Path, ran: Path, notation: str) -> None:
    with pytest.raises(UserError, match=r"features\.json.*'evil_module\.Evil'.*package\.module:BuilderClass") as error:
        TFDSSource(prepared(tmp_path / "data", NOTATIONS[notation]))
    assert str(tmp_path / "data") in str(error.value) and "\n" not in str(error.value)
    assert not ran.exists()


def test_infos_of_tfds_import_nothing(tmp_path: Path, ran: Path) -> None:
    with pytest.raises(UserError, match=r"evil_module\.Evil"):
        TFDSSource(prepared(tmp_path / "data", GOOD, features=EVIL))
    assert len(TFDSSource(prepared(tmp_path / "data", GOOD, moduleName="evil_module"))) == 1
    assert not ran.exists()


def test_a_feature_of_ones_own_is_taken_once_its_module_is_imported(tmp_path: Path, ran: Path) -> None:
    import tensorflow_datasets as tfds

    code = "import tensorflow_datasets as tfds\nclass Mine(tfds.features.Text):\n    pass\n"
    (tmp_path / "code" / "own_feature_of_a_test.py").write_text(code)
    mine = {"pythonClassName": "own_feature_of_a_test.Mine", "text": {}}
    path = prepared(tmp_path / "data", TEXTS | {"featuresDict": {"features": {"text": mine}}})
    before = tfds.features.FeatureConnector.__dict__["cls_from_name"]
    with pytest.raises(UserError, match="own_feature_of_a_test"):
        TFDSSource(path)
    __import__("own_feature_of_a_test")
    assert len(TFDSSource(path)) == 1
    assert tfds.features.FeatureConnector.__dict__["cls_from_name"] is before


@pytest.mark.parametrize("template", ["../outside/{SPLIT}-{SHARD_X_OF_Y}", "/{SPLIT}", "a/../../{SPLIT}"])
def test_files_of_tfds_are_in_its_folder(tmp_path: Path, outside: Path, ran: Path, template: str) -> None:
    with pytest.raises(UserError, match=r"dataset_info\.json names a file outside of"):
        TFDSSource(prepared(tmp_path / "data", GOOD, split={"filepathTemplate": template}))


# --- prepared data -----------------------------------------------------------------------------------------


def job(tmp_path: Path, **options: Any) -> Any:
    pytest.importorskip("array_record.python.array_record_module")
    from m3ae_jax.data.prepare import Job

    members = []
    for number, key in enumerate(("../../outside/evil", "a/b/c", "con:aux|", "\\evil", "..", "...")):
        members += [(f"{key}/{number}.png", picture()), (f"{key}/{number}.txt", f"../../outside/evil{number}".encode())]
    path = write_tar(tmp_path / "data" / "0.tar", [("x.png", picture()), ("x.txt", b"/../outside"), *members])
    return Job("webdataset", path, str(tmp_path / "out"), workers=1, **options)


@pytest.mark.parametrize("form", ["array_record", "tfds"])
def test_prepare_writes_below_its_output_alone(tmp_path: Path, outside: Path, ran: Path, form: str) -> None:
    from m3ae_jax.data.prepare import prepare

    here = job(tmp_path, format=form)
    before = contents(tmp_path)
    prepare(here)
    new = {name for name, data in contents(tmp_path).items() if before.get(name) != data}
    assert {name.split("/")[0] for name in new} <= {"out", "cache"}
    assert {"train.array_record-00000-of-00001", "train.manifest.json"} <= {p.name for p in Path(here.output).iterdir()}


@pytest.mark.parametrize(
    "named", ["../outside/new", "/tmp/new", "val.array_record-00001-of-00001", "val.manifest.json"]
)
def test_a_manifest_that_came_with_data_names_its_own_files(
    tmp_path: Path, outside: Path, ran: Path, named: str
) -> None:
    from m3ae_jax.data.prepare import prepare

    here = job(tmp_path, format="tfds")
    prepare(here)
    text = (tmp_path / "out" / "train.manifest.json").read_text().replace('"split": "train"', '"split": "val"')
    hostile = text.replace("train.array_record-00000-of-00001", named)
    (tmp_path / "out" / "val.manifest.json").write_text(hostile)
    with pytest.raises(UserError, match=r"val\.manifest\.json is no manifest of this program's"):
        prepare(here)
    (tmp_path / "out" / "val.manifest.json").rename(tmp_path / "out" / "test.manifest.json")
    with pytest.raises(UserError, match=r"test\.manifest\.json is no manifest"):
        prepare(here)


def test_links_left_in_the_output_are_not_written_through(tmp_path: Path, outside: Path, ran: Path) -> None:
    from m3ae_jax.data.prepare import prepare

    out = tmp_path / "out"
    out.mkdir()
    shard = "train.array_record-00000-of-00001"
    for name in (".train.lock", ".train.manifest.json.tmp", f".{shard}.tmp", ".m3ae_jax_index_array_record.npz"):
        (out / name).symlink_to(outside / "secret.txt")
    prepare(job(tmp_path))
    assert (out / shard).is_file() and not (out / shard).is_symlink()


# --- stored configs ----------------------------------------------------------------------------------------


def stored(folder: Path, **fields: Any) -> tuple[str, config_lib.ConfigDict]:
    """A run's config.json with fields changed, and what it gives."""
    config = config_lib.default()
    for name, value in fields.items():
        group, _, last = name.replace("__", ".").rpartition(".")
        target = config
        for part in filter(None, group.split(".")):
            target[part] = config_lib.source_fields() if part not in target else target[part]
            target = target[part]
        target[last] = value
    path = folder / "config.json"
    path.write_text(config_lib.to_json(config))
    return str(path), config_lib.load(str(path))


NAMED: list[tuple[str, dict[str, Any]]] = [
    ("objective", {"objective": "evil_module:Evil"}),
    ("data.train.source", {"data__train__source": "evil_module:Evil"}),
    ("data.val.source", {"data__val__source": "evil_module:Evil"}),
    ("data.mixture.a.source", {"data__mixture__a__source": "evil_module:Evil"}),
    ("data.val.path", {"data__val__source": "tfds", "data__val__path": "evil_module:Evil"}),
    ("metrics.writers", {"metrics__writers": ("evil_module:Evil",)}),
    ("data.mixture.a.path", {"data__mixture__a__source": "tfds", "data__mixture__a__path": "evil_module:Evil@/d"}),
]


@pytest.mark.parametrize(("field", "fields"), NAMED)
def test_a_stored_config_names_no_code(tmp_path: Path, ran: Path, field: str, fields: dict[str, str]) -> None:
    path, config = stored(tmp_path, **fields)
    with pytest.raises(UserError) as error:
        config_lib.check_named_code(path, config, [("seed", "1")])
    message, value = str(error.value), fields[field.replace(".", "__")]
    value = ",".join(value) if isinstance(value, tuple) else value
    assert path in message and "\n" not in message
    # What it says to add allows it.
    overrides, rest = config_lib.split_overrides(shlex.split(message.rpartition(" too: ")[2]))
    assert overrides == [(field, value)] and not rest
    config_lib.apply_overrides(config, overrides)
    config_lib.check_named_code(path, config, overrides)
    config_lib.check_named_code("configs/mine.py", config, [])  # is code itself
    assert not ran.exists()


def test_all_code_that_is_named_is_told_at_once_and_quoted(tmp_path: Path) -> None:
    odd = "a:B'; touch x\n\x1b[2J"
    path, config = stored(tmp_path, objective=odd, data__val__source="c:D")
    with pytest.raises(UserError) as error:
        config_lib.check_named_code(path, config, [])
    assert str(error.value).isprintable()
    parts = shlex.split(str(error.value).rpartition(" too: ")[2])
    assert (
        len(parts) == 2
        and parts[0].startswith("--config.objective=a:B'")
        and parts[1] == "--config.data.val.source=c:D"
    )


def test_item_13_a_stored_config_names_no_writer_beside_those_of_the_project(tmp_path: Path, ran: Path) -> None:
    config_lib.check_named_code(*stored(tmp_path, metrics__writers=("tensorboard", "wandb")), [])
    path, config = stored(tmp_path, metrics__writers=("tensorboard", "evil_module:Evil"))
    config_lib.resolve(config)  # as whoever loads its model does
    with pytest.raises(UserError, match=r"--config\.metrics\.writers=tensorboard,evil_module:Evil$"):
        config_lib.check_named_code(path, config, [])
    assert not ran.exists()


def test_paths_with_colons_are_no_code(tmp_path: Path) -> None:
    for path in ("coco_captions:1.0.0", "coco/2014:1.1.*@gs://b/tfds", "gs://b/tfds/coco", "/data/a:b", ""):
        config_lib.check_named_code(*stored(tmp_path, data__val__source="tfds", data__val__path=path), [])
    config_lib.check_named_code(*stored(tmp_path, data__val__path="a:b.tar"), [])


@pytest.mark.slow
@pytest.mark.parametrize("program", [["m3ae_jax.main", "--mode=print_config"], ["m3ae_jax.benchmark", "--own_data"]])
def test_the_programs_refuse_it_in_one_line(tmp_path: Path, ran: Path, program: list[str]) -> None:
    path, _ = stored(tmp_path, objective="evil_module:Evil")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "code"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", *program, f"--config={path}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--config.objective=evil_module:Evil" in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not ran.exists()


@pytest.mark.parametrize(
    "text",
    [
        '{"__class__": {}}',
        '{"objective": ["evil_module:Evil"]}',
        '{"seed": {"__reduce__": ["os.system", "ls"]}}',
        '{"data": {"mixture": {"../../evil": {}}}}',
        '{"data": {"train": {"py/object": "evil_module.Evil"}}}',
        "[" * 100_000,
        '{"seed": ' + "9" * 5000 + "}",
        "!!python/object/apply:os.system ['ls']",
    ],
)
def test_odd_configs_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        config_lib.from_json(text)


def test_evaluations_are_the_projects_own() -> None:
    config = config_lib.default()
    for name in ("../evil", "evil_module", ".base", "..data.prepare"):
        config.evals = (name,)
        with pytest.raises(UserError, match=r"is not one of .*grounding"):
            check_evals(config)


# --- checkpoints -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder, keep=2)
    config = config_lib.default().to_dict() | {"objective": "evil_module:Evil", "evil": "evil_module:Evil"}
    checkpoints.save(state(), {"config": config}, {})
    checkpoints.close()
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "checkpoints")


def state() -> TrainState:
    return TrainState(jnp.int32(7), {"layer": {"kernel": jnp.ones((2, 3))}}, (), {})


def use(folder: Path) -> None:
    """Does with a checkpoint what runs do; what is refused is no matter here."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state())
    checkpoints = Checkpoints(folder, keep=1, read_only=True)
    for action in (
        lambda: find(str(folder)),
        lambda: load_params(str(folder)),
        lambda: checkpoints.meta(7),
        lambda: checkpoints.restore(7, abstract),
        lambda: Checkpoints(folder, keep=1).close(),
    ):
        with contextlib.suppress(Exception):
            action()
    checkpoints.close()


@pytest.mark.parametrize("name", ["../../outside/secret.txt", "/dev/zero", "state/../../../outside/secret.txt"])
def test_checksums_name_files_of_their_checkpoint(folder: Path, outside: Path, name: str) -> None:
    path = folder / "7" / manifest.NAME
    files = json.loads(path.read_text())["files"]
    entry = {"bytes": 0, "sha256": "0" * 64}
    path.write_text(manifest._text(files | {name: entry}))  # as its author would, with a true sum over it
    assert manifest.problems(folder / "7") == [f"{manifest.NAME}: damaged"]
    with pytest.raises(UserError, match="no whole checkpoint"):
        find(str(folder))
    use(folder)


def test_what_a_checkpoint_says_of_its_config_is_not_built(folder: Path, ran: Path) -> None:
    checkpoints = Checkpoints(folder, keep=1, read_only=True)
    meta = checkpoints.meta(7)
    checkpoints.close()
    assert meta["config"]["objective"] == "evil_module:Evil"
    with pytest.raises(UserError, match="the config's field evil is unknown here"):
        config_lib.from_json(json.dumps(meta["config"]))
    del meta["config"]["evil"]
    difference = config_lib.difference(config_lib.from_json(json.dumps(meta["config"])), config_lib.default())
    assert difference == [("objective", "evil_module:Evil", "m3ae")] and not ran.exists()


def test_names_of_classes_in_a_checkpoint_import_nothing(folder: Path, outside: Path, ran: Path) -> None:
    handlers, tree = folder / "7" / "_CHECKPOINT_METADATA", folder / "7" / "state" / "_METADATA"
    whole = {path: path.read_text() for path in (handlers, tree)}
    rich = {
        "category": "namedtuple",
        "module": "evil_module",
        "clazz": "Evil",
        "entries": [{"key": "params", "value": {"category": "custom", "clazz": "evil_module.Evil", "data": {}}}],
    }
    as_rich = json.loads(whole[tree]) | {"value_metadata_tree": rich}
    for path, text in (
        (handlers, whole[handlers].replace("orbax.checkpoint._src.handlers.", "evil_module.")),
        (tree, whole[tree].replace("jax.Array", "evil_module.Evil")),
        (tree, whole[tree].replace('"layer"', '"../../../outside"').replace("'layer'", "'../../../outside'")),
        (tree, json.dumps(as_rich)),
    ):
        assert text != whole[path]
        path.write_text(text)
        manifest.write(folder / "7")
        use(folder)
        assert not ran.exists()
        path.write_text(whole[path])


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)  # orbax
def test_pickles_in_a_checkpoint_stay_pickled(folder: Path, ran: Path) -> None:
    for path in [path for path in (folder / "7").rglob("*") if path.is_file() and path.name != manifest.NAME]:
        whole = path.read_bytes()
        path.write_bytes(pickle.dumps(Bomb(ran)))
        manifest.write(folder / "7")
        use(folder)
        assert not ran.exists(), path
        path.write_bytes(whole)
