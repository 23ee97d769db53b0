"""TFDSSource: tiny data sets prepared in the test; no network. The source never decodes a picture."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.utils import gcs_utils

from m3ae_jax.data.sources.base import Source, SourceOptions
from m3ae_jax.data.sources.tfds import TFDSSource
from m3ae_jax.errors import UserError

Example = dict[str, Any]


def build(
    folder: Path,
    features: dict[str, Any],
    splits: dict[str, list[Example]],
    file_format: str = "tfrecord",
    version: str = "1.0.0",
    config: str = "",
    name: str = "tiny_pairs",
) -> str:
    """Prepares a data set; returns its path as a name and where it is. The records keep their order."""
    gcs_utils._is_gcs_disabled = True  # a builder asks Google's servers for what is not there yet

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        code_path = None  # asking for it needs a package that the library does not require
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, Example]]:
            yield from enumerate(splits[split])

    Tiny.name = name
    builder = Tiny(data_dir=str(folder), file_format=file_format)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return f"{name}@{folder}"


def write(folder: Path, pairs: list[tuple[bytes, bytes]], file_format: str = "tfrecord") -> str:
    """Stores pictures and captions as this source reads them; returns its path."""
    features = {"image": tfds.features.Image(), "caption": tfds.features.Text()}
    examples = [{"image": io.BytesIO(image), "caption": caption} for image, caption in pairs]
    return build(folder, features, {"train": examples}, file_format)


def write_array_record(folder: Path, pairs: list[tuple[bytes, bytes]]) -> str:
    """As `write`."""
    return write(folder, pairs, "array_record")


def picture(i: int, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 6), (i % 256, i // 256, 3)).save(data, kind)
    return data.getvalue()


def read(source: Source) -> list[Any]:
    return list(source.read(np.arange(len(source))))


def pairs_of(source: Source) -> list[tuple[bytes, bytes | None]]:
    """Pictures and captions; None: it has none."""
    return [(record["image"], record.get("caption")) for record in read(source)]


PAIRS = [(picture(i, "PNG" if i % 2 else "JPEG"), f"größe {i}".encode() * (i != 3)) for i in range(8)]
NUMBERS = {"number": np.int64, "text": tfds.features.Text()}


def numbered(n: int) -> list[Example]:
    return [{"number": i, "text": f"text {i}"} for i in range(n)]


@pytest.fixture(autouse=True)
def no_network(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may write into the user's cache, or ask a server."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)

    def fail(*args: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(gcs_utils, "gcs_dataset_info_files", fail)
    monkeypatch.setattr(gcs_utils, "_is_gcs_disabled", True)
    monkeypatch.setattr(tfds.core.DatasetInfo, "initialize_from_bucket", lambda self: None)


# --- reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_pictures_come_back_byte_for_byte(tmp_path: Path, file_format: str) -> None:
    path = write(tmp_path, PAIRS, file_format)
    source: Source = TFDSSource(path)
    assert source.modalities == ("image", "text") and source.classes == ()
    assert [(r["image"], r["caption"]) for r in read(source)] == PAIRS
    order = np.array([5, 0, 5, 7, 2])
    assert [(r["image"], r["caption"]) for r in source.read(order)] == [PAIRS[i] for i in order]
    assert source.read(np.array([], np.int64)) == []
    assert (source.report.shards, source.report.examples) == (1, 8)  # type: ignore[attr-defined]

    def work(seed: int) -> bool:
        order = np.random.default_rng(seed).integers(0, 8, 100)
        return [(r["image"], r["caption"]) for r in source.read(order)] == [PAIRS[i] for i in order]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
@pytest.mark.parametrize("captions", ["draw", "all"])
def test_captions_in_a_sequence(tmp_path: Path, file_format: str, captions: str) -> None:
    features = {
        "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
        "image": tfds.features.Image(),
        "image/filename": tfds.features.Text(),
        "objects": tfds.features.Sequence(
            {"bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(names=["a"])}
        ),
    }
    texts = [["one", "two"], [], ["three"]]
    examples = [
        {
            "captions": [{"id": 0, "text": text} for text in of_picture],
            "image": io.BytesIO(picture(i)),
            "image/filename": f"{i}.jpg",
            "objects": [],
        }
        for i, of_picture in enumerate(texts)
    ]
    path = build(tmp_path, features, {"train": examples}, file_format)
    source = TFDSSource(path, SourceOptions(captions=captions))
    assert source.modalities == ("image", "text") and source.classes == ()
    if captions == "draw":
        assert read(source) == [
            {"image": picture(0), "caption": b"one", "captions": (b"one", b"two")},
            {"image": picture(1)},
            {"image": picture(2), "caption": b"three"},
        ]
        return
    each = [(picture(0), b"one"), (picture(0), b"two"), (picture(2), b"three")]
    assert [(r["image"], r["caption"]) for r in read(source)] == each
    assert source.report.skipped == {"no caption": 1} and "00001:record 1" in source.report.samples["no caption"]
    part = TFDSSource(path, SourceOptions(captions=captions, split="train[1:]"))
    assert [(r["image"], r["caption"]) for r in read(part)] == each[2:]


def test_labels_and_templates(tmp_path: Path) -> None:
    features = {
        "image": tfds.features.Image(),
        "file_name": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=["guinea_pig", "dog"]),
        "segmentation": tfds.features.LabeledImage(labels=3, shape=(None, None, 1)),
    }
    examples = [
        {
            "image": io.BytesIO(picture(i)),
            "file_name": "x",
            "label": label,
            "segmentation": np.zeros((2, 2, 1), np.uint8),
        }
        for i, label in enumerate([1, 0, -1])
    ]
    path = build(tmp_path, features, {"train": examples})
    source = TFDSSource(path)
    assert source.modalities == ("image",) and source.classes == ("guinea_pig", "dog")
    assert [record.get("label") for record in read(source)] == [1, 0, None]
    assert all("caption" not in record for record in read(source))
    captioned = TFDSSource(path, SourceOptions(template="a photo of a {}"))
    assert captioned.modalities == ("image", "text") and captioned.classes == source.classes
    assert [r.get("caption") for r in read(captioned)] == [b"a photo of a dog", b"a photo of a guinea pig", None]
    named = TFDSSource(path, SourceOptions(caption_key="file_name"))
    assert [record["caption"] for record in read(named)] == [b"x"] * 3
    with pytest.raises(UserError, match=r"data\.\*\.template='a photo' must have one \{\}"):
        TFDSSource(path, SourceOptions(template="a photo"))
    with pytest.raises(UserError, match=r"caption_key='filename': .* has only file_name; did you mean 'file_name'"):
        TFDSSource(path, SourceOptions(caption_key="filename"))


def test_texts_alone_in_nested_features(tmp_path: Path) -> None:
    turns = tfds.features.Sequence(tfds.features.Sequence(tfds.features.Text()))
    features = {"meta": {"text": tfds.features.Text()}, "turns": turns}
    examples = [{"meta": {"text": f"t{i}"}, "turns": [["a", "b"], ["c"]]} for i in range(2)]
    path = build(tmp_path, features, {"train": examples})
    with pytest.raises(UserError, match=r"no picture and no caption by a usual name; it has meta/text \(Text\), turns"):
        TFDSSource(path)
    source = TFDSSource(path, SourceOptions(caption_key="meta/text"))
    assert source.modalities == ("text",) and read(source) == [{"caption": b"t0"}, {"caption": b"t1"}]
    nested = TFDSSource(path, SourceOptions(caption_key="turns"))
    assert read(nested)[0]["captions"] == (b"a", b"b", b"c")


def test_items_1_2_and_13_keys_groups_and_what_is_not_read(tmp_path: Path) -> None:
    features = {
        "image": tfds.features.Image(),
        "caption": tfds.features.Text(),
        "concept": np.int64,
        "url": tfds.features.Text(),
    }
    rows = [{"image": io.BytesIO(picture(i)), "caption": "c", "concept": i // 2, "url": "u"} for i in range(4)]
    path = build(tmp_path, features, {"train": rows})
    for _ in range(2):
        report = TFDSSource(path).report
        assert report.unused == {"feature concept": 1, "feature url": 1} and report.skipped == {}
        assert report.samples["feature url"] == "in features.json"
    grouped = TFDSSource(path, SourceOptions(group_key="concept"))
    assert [record["group"] for record in read(grouped)] == ["0", "0", "1", "1"]
    assert grouped.report.unused == {"feature url": 1}
    with pytest.raises(UserError, match=r"group_key='concpet': .*; did you mean 'concept'\?"):
        TFDSSource(path, SourceOptions(group_key="concpet"))
    with pytest.raises(UserError, match=r"template='a \{\}' is not read: the data have captions"):
        TFDSSource(path, SourceOptions(template="a {}"))


@pytest.mark.parametrize("captions", ["draw", "all"])
def test_item_6_a_record_above_the_limit_is_not_read(tmp_path: Path, captions: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).save(data, "PNG")
    pairs = [*PAIRS[:2], (data.getvalue(), b"large"), *PAIRS[4:]]
    path = write(tmp_path, pairs)
    limited = TFDSSource(path, SourceOptions(captions=captions, max_bytes=2000))
    assert pairs_of(limited) == pairs[:2] + pairs[3:]
    assert limited.report.skipped == {"too many bytes (data.max_bytes)": 1}
    whole = TFDSSource(path, SourceOptions(captions=captions))
    assert pairs_of(whole) == pairs and whole.fingerprint != limited.fingerprint


# --- splits ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("splits")
    return build(folder, NUMBERS, {"train": numbered(10), "validation": numbered(3)}, "array_record")


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train", range(10)),
        ("train[:30%]", range(3)),
        ("train[7:]", range(7, 10)),
        ("train[8:]+validation[:2]", [8, 9, 0, 1]),
        ("validation+train[:1]+train[5:6]", [0, 1, 2, 0, 5]),
    ],
)
def test_slices_of_splits(splits: str, split: str, numbers: range | list[int]) -> None:
    source = TFDSSource(splits, SourceOptions(split=split))
    assert [record["caption"] for record in read(source)] == [f"text {i}".encode() for i in numbers]
    assert source.report.examples == len(source) == len(numbers)
    order = np.random.default_rng(0).integers(0, len(source), 20)
    assert [r["caption"] for r in source.read(order)] == [f"text {numbers[i]}".encode() for i in order]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("val", "data.*.split='val' is not one of train, validation (the splits of tiny_pairs@"),
        ("val", "; did you mean 'validation'?"),
        ("train+tset", "data.*.split='tset' is not one of train, validation"),
        ("train[:x]", "data.*.split='train[:x]': "),
        ("train[99:120]", "data.*.split='train[99:120]': "),
        ("", "data.*.split='' is not one of"),
    ],
)
def test_splits_that_are_none(splits: str, split: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        TFDSSource(splits, SourceOptions(split=split))
    assert message in str(error.value) and "\n" not in str(error.value)


# --- finding the data --------------------------------------------------------------------------------------


def test_folders_configs_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, number in (("1.0.0", 1), ("1.10.0", 2), ("1.9.0", 3)):
        build(tmp_path, NUMBERS, {"train": numbered(number)}, version=version, config="small")
    (tmp_path / "tiny_pairs" / "small" / "incomplete.ABCDEF_2.0.0").mkdir()
    (tmp_path / "tiny_pairs" / "small" / "incomplete.ABCDEF_2.0.0" / "dataset_info.json").write_text("{}")
    for path, number in {
        f"tiny_pairs@{tmp_path}": 2,
        f"TinyPairs@{tmp_path}": 2,
        f"tiny_pairs/small@{tmp_path}": 2,
        f"tiny_pairs:1.9.0@{tmp_path}": 3,
        f"tiny_pairs/small:1.0.*@{tmp_path}": 1,
        f"{tmp_path}/tiny_pairs": 2,
        f"{tmp_path}/tiny_pairs/small/": 2,
        f"{tmp_path}/tiny_pairs/small/1.0.0": 1,
    }.items():
        assert len(TFDSSource(path)) == number, path
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert len(TFDSSource("tiny_pairs")) == 2
    monkeypatch.chdir(tmp_path)
    assert len(TFDSSource("tiny_pairs")) == 2
    with pytest.raises(UserError, match=r"is not prepared: .*/tiny_pairs has only small/1\.0\.0, .*; run: tfds build"):
        TFDSSource(f"tiny_pairs/large@{tmp_path}")
    shutil.copytree(tmp_path / "tiny_pairs" / "small", tmp_path / "tiny_pairs" / "large")
    assert len(TFDSSource("tiny_pairs/large")) == 2
    assert len(TFDSSource("tiny_pairs")) == 2  # .config/metadata.json knows the default
    (tmp_path / "tiny_pairs" / ".config" / "metadata.json").write_text(json.dumps({"default_config_name": 3}))
    with pytest.raises(UserError, match="holds several; name one of large, small"):
        TFDSSource("tiny_pairs")


def test_a_builder_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_package.py").write_text(
        "import tensorflow_datasets as tfds\n"
        "class TinyPairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):\n"
        "    VERSION = tfds.core.Version('1.0.0')\n"
        "    def _info(self): raise AssertionError('was built')\n"
        "    def _split_generators(self, dl_manager): return {}\n"
        "    def _generate_examples(self): yield\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = f"own_package:TinyPairs@{tmp_path}/data"
    with pytest.raises(UserError) as error:
        TFDSSource(path)
    assert f'there is no {tmp_path}/data/tiny_pairs; run: python -c "from own_package import' in str(error.value)
    build(tmp_path / "data", NUMBERS, {"train": numbered(2)})
    assert len(TFDSSource(path)) == 2
    assert len(TFDSSource(f"own_package:TinyPairs:1.0.0@{tmp_path}/data")) == 2
    for missing in ("own_package:Other", "no_such_package:Other", "json:JSONDecoder"):
        with pytest.raises(UserError, match="cannot be imported as a builder"):
            TFDSSource(f"{missing}@{tmp_path}")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("coco_captions@{0}", "is not prepared: there is no {0}/coco_captions; run: tfds build coco_captions --data"),
        ("MNIST:3.0.1", "run: tfds build MNIST:3.0.1"),
        ("mnits@{0}", "'mnits' is no data set of TensorFlow Datasets, nor in {0}; did you mean 'mnist'"),
        ("qqqqqqqq", "; it takes NAME[/CONFIG][:VERSION][@DATA_DIR]"),
        ("{0}", "holds no prepared data set (dataset_info.json)"),
        ("{0}/nothing", "is no name of a data set; it takes NAME"),
        ("a b", "is no name of a data set"),
        ("", "is no name of a data set"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError) as error:
        TFDSSource(path.format(tmp_path))
    assert message.format(tmp_path) in str(error.value)
    assert "data.*.path" in str(error.value) and "\n" not in str(error.value)


# --- damage, the index -------------------------------------------------------------------------------------


def shard_of(path: str) -> Path:
    return next(p for p in Path(path.partition("@")[2]).rglob("*-of-00001") if "train" in p.name)


def test_a_damaged_record_is_no_error(tmp_path: Path) -> None:
    path = write(tmp_path, PAIRS)
    data = bytearray(shard_of(path).read_bytes())
    at = data.index(PAIRS[2][0])
    data[at + 30] ^= 1
    shard_of(path).write_bytes(data)
    assert pairs_of(TFDSSource(path)) == [*PAIRS[:2], (b"", None), *PAIRS[3:]]
    each = TFDSSource(path, SourceOptions(captions="all"))
    assert pairs_of(each) == [*PAIRS[:2], *PAIRS[3:]] and each.report.skipped == {"wrong checksum": 1}


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    path = write(tmp_path, PAIRS)
    source = TFDSSource(path)
    os.truncate(shard_of(path), shard_of(path).stat().st_size - 5)
    with pytest.raises(OSError, match="changed since it was indexed"):
        source.read(np.array([7]))
    source = TFDSSource(path)
    assert [(r["image"], r["caption"]) for r in read(source)] == PAIRS[:7]
    assert source.report.skipped == {"damaged file": 1}
    assert TFDSSource(path, SourceOptions(split="train[:7]")).report.skipped == {}  # nothing of it is lost
    shard_of(path).unlink()
    with pytest.raises(OSError, match="No such file"):
        TFDSSource(path)


def test_index_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a", PAIRS)
    first = TFDSSource(path)

    def fail(self: Any, path: str) -> None:
        raise AssertionError(f"{path} was scanned")

    with monkeypatch.context() as patch:
        patch.setattr(type(first._storage), "scan", fail)
        again = TFDSSource(path)
    assert read(again) == read(first)
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns(".m3ae*"))
    copy = TFDSSource(f"tiny_pairs@{tmp_path}/b")
    assert again.fingerprint == first.fingerprint == copy.fingerprint
    part = TFDSSource(path, SourceOptions(split="train[1:]"))
    assert (
        len({first.fingerprint, part.fingerprint, TFDSSource(path, SourceOptions(split="train[:7]")).fingerprint}) == 3
    )


def test_formats_without_random_access(tmp_path: Path) -> None:
    path = build(tmp_path, NUMBERS, {"train": numbered(2)})
    info = next(tmp_path.rglob("dataset_info.json"))
    info.write_text(info.read_text().replace('"tfrecord"', '"riegeli"'))
    with pytest.raises(UserError, match=r"is stored as riegeli, which allows no random access; .*tfds convert_format"):
        TFDSSource(path)
    info.write_text("{not json")
    with pytest.raises(UserError, match="cannot be opened: "):
        TFDSSource(path)
