"""What every source promises, and that the format makes no difference to a batch."""

import hashlib
import io
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from m3ae_jax.config import default
from m3ae_jax.data.masking import RandomSubset
from m3ae_jax.data.pipeline import Batches, Feed, train_view
from m3ae_jax.data.sources import SOURCES, build_source, open_format
from m3ae_jax.data.sources.base import SourceOptions
from m3ae_jax.data.text import load_tokenizer
from m3ae_jax.data.tokens import Group, modality_table
from m3ae_jax.errors import UserError
from tests.data.sources import (
    test_array_record,
    test_folder,
    test_hdf5,
    test_parquet,
    test_tfds,
    test_tfrecord,
    test_webdataset,
)

COUNT = 12


def picture(index):
    file = io.BytesIO()
    pixels = np.random.default_rng(index).integers(0, 256, (24 + index, 30, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


PAIRS = [(picture(i), f"a red square {'and a blue circle ' * (i % 3)}".strip().encode()) for i in range(COUNT)]


def write_webdataset(folder, pairs):
    for shard in range(2):
        members = []
        for i in range(shard * len(pairs) // 2, (shard + 1) * len(pairs) // 2):
            members += [(f"{i:05d}.jpg", pairs[i][0]), (f"{i:05d}.txt", pairs[i][1])]
        test_webdataset.write_tar(folder / f"{shard:05d}.tar", members)
    return str(folder)


WRITERS = {
    "webdataset": ("webdataset", write_webdataset),
    "tfrecord": ("tfrecord", test_tfrecord.write),
    "array_record": ("array_record", test_array_record.write),
    "hdf5": ("hdf5", test_hdf5.write),
    "parquet": ("parquet", test_parquet.write),
    "folder": ("folder", test_folder.write),
    "tfds": ("tfds", test_tfds.write),
    "tfds of array_record": ("tfds", test_tfds.write_array_record),
}


@pytest.fixture(scope="module", params=WRITERS)
def stored(request, tmp_path_factory):
    """The same pairs in one format: (name, path)."""
    name, write = WRITERS[request.param]
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        (folder / "data").mkdir()
        yield name, write(folder / "data", PAIRS)


def opened(stored):
    return open_format(*stored, SourceOptions(), "data.train.")


def pairs(records):
    return [(r["image"], r["caption"]) for r in records]


def test_it_gives_what_was_stored(stored):
    source = opened(stored)
    assert len(source) == COUNT and source.modalities == ("image", "text")
    assert isinstance(source.classes, tuple)
    order = np.random.default_rng(0).permutation(np.arange(COUNT).repeat(2))
    assert pairs(source.read(order)) == [PAIRS[i] for i in order]
    assert source.read(np.array([], np.int64)) == []
    again = opened(stored)
    assert again.fingerprint == source.fingerprint and len(source.fingerprint) >= 8


def test_threads_read_at_once(stored):
    source = opened(stored)

    def read(seed):
        order = np.random.default_rng(seed).integers(0, COUNT, 20)
        return pairs(source.read(order)) == [PAIRS[i] for i in order]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(40)))


def batches(source, *, name="", start=0, rows=None):
    c = default()
    c.data.image_size, c.data.patch_size, c.data.max_text_tokens, c.data.train.source = 16, 8, 16, name
    groups = tuple(Group(m.name, (m,), RandomSubset(0.5)) for m in modality_table(c, 0).values())
    feed = Feed((source,), (train_view(c, source),))
    options = {"batch_size": 8, "start_step": start, "stop_step": 4, "rows": rows}
    return list(Batches(c, groups, feed, load_tokenizer("scenes"), **options))


def leaves(tree):
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    return [tree]


def digest(result):
    return hashlib.sha256(b"".join(leaf.tobytes() for batch in result for leaf in leaves(batch))).hexdigest()


class InMemory:
    modalities, classes, fingerprint = ("image", "text"), (), "memory"

    def __len__(self):
        return COUNT

    def read(self, indices):
        return [{"image": PAIRS[i][0], "caption": PAIRS[i][1]} for i in indices]


@pytest.fixture(scope="module")
def wanted():
    return batches(InMemory())


def test_every_format_gives_the_same_batches_bit_for_bit(stored, wanted):
    assert digest(batches(opened(stored), name=stored[0])) == digest(wanted)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_every_format_goes_on_anywhere_on_any_number_of_hosts(stored, wanted, hosts):
    source = opened(stored)
    per = 8 // hosts
    result = [batches(source, start=2, rows=np.arange(h * per, (h + 1) * per)) for h in range(hosts)]
    for step, want in enumerate(wanted[2:]):
        for number, leaf in enumerate(leaves(want)):
            assert np.array_equal(np.concatenate([leaves(host[step])[number] for host in result]), leaf)


@pytest.mark.parametrize("name", SOURCES)
def test_a_missing_path_is_named(name, tmp_path):
    with pytest.raises(UserError, match=r"data\.train\.path is empty; it takes"):
        open_format(name, "", SourceOptions(), "data.train.")
    with pytest.raises(UserError, match="absent"):
        open_format(name, str(tmp_path / "absent"), SourceOptions(), "data.train.")


def test_an_unknown_source_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"data\.train\.source='tfrecords'.*tfrecord"):
        open_format("tfrecords", "x", SourceOptions(), "data.train.")
    with pytest.raises(UserError, match=r"source='nowhere:Nothing' cannot be imported"):
        open_format("nowhere:Nothing", "x", SourceOptions(), "data.train.")


@pytest.mark.parametrize("part", ["train", "val"])
def test_item_12_each_refusal_names_the_data_once(part, tmp_path, monkeypatch):
    module = types.ModuleType("source_of_a_test")

    class Refuses:
        def __init__(self, path, options):
            raise UserError(f"{path} needs a package")

    module.Refuses = Refuses
    monkeypatch.setitem(sys.modules, module.__name__, module)
    config = default()
    config.data[part].update(source="source_of_a_test:Refuses", path="x")
    with pytest.raises(UserError) as error:
        build_source(config, part)
    assert str(error.value) == f"data.{part}.path='x': x needs a package"
    config.data[part].update(source="folder", path=str(tmp_path / "none"))
    with pytest.raises(UserError) as error:
        build_source(config, part)
    assert str(error.value).count(f"data.{part}") == 1
