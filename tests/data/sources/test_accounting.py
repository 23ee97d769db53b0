"""What went in = what is read + what is counted: 200 seeded mixtures of odd names, keys and nulls over all formats."""

import csv
import dataclasses
import io
import json
import tarfile

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from m3ae_jax.config import default
from m3ae_jax.data.images import EMPTY_CAPTION, REASONS
from m3ae_jax.data.masking import RandomSubset
from m3ae_jax.data.pipeline import Batches, Feed, eval_view
from m3ae_jax.data.sources import open_format
from m3ae_jax.data.sources.base import SourceOptions, report_of
from m3ae_jax.data.text import load_tokenizer
from m3ae_jax.data.tokens import Group, modality_table
from m3ae_jax.errors import UserError
from m3ae_jax.train import data_report
from tests.data.sources import test_array_record, test_tfds, test_tfrecord

pytestmark = pytest.mark.slow

ABSENT = "absent"
STEMS = ("{}", "{:06d} Photo v1.5 (copy)", "ü ñ {}", "{}.left", "IMG-{}", "{:05d}", "a b.c.{}", "{}_x")


@dataclasses.dataclass
class Item:
    """One example that goes in: its number, picture and caption (bytes, a list, None or `ABSENT`)."""

    number: int
    image: bytes
    caption: object

    @property
    def captions(self):
        values = self.caption if isinstance(self.caption, list) else [self.caption]
        return [value for value in values if isinstance(value, bytes)]

    @property
    def readable(self):
        return self.image.startswith(b"\x89PNG") and len(self.image) > 60

    @property
    def expected(self):
        """``used``, ``empty`` (used, its caption counted) or ``lost``; of several captions one empty is none."""
        if not self.readable or not self.captions:
            return "lost"
        return "used" if all(self.captions) else "empty"


def png(number):
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (9, 11, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def items(rng, *, several=True, null=True, broken=True):
    """A few examples, most of them whole; `null`: the format knows nulls and absent fields."""
    result = []
    for number in range(int(rng.integers(6, 20))):
        words = f"a red circle {number}".encode()
        image, caption = png(number), words
        kind = rng.integers(14)
        if kind == 0:
            caption = b""
        elif kind == 1 and null:
            caption = None
        elif kind == 2 and null:
            caption = ABSENT
        elif kind == 3 and several:
            caption = [words, words + b" too"]
        elif kind == 4 and several and null:
            caption = [None, words]
        elif kind == 5 and several:
            caption = []
        elif kind == 6 and broken:
            image = b""
        elif kind == 7 and broken:
            image = b"<html>no picture</html>"
        elif kind == 8 and broken:
            image = image[:40]
        result.append(Item(number, image, caption))
    result[0].caption = b"a red circle 0"  # a first record that shows the keys
    result[0].image = png(0)
    return result


def texts(caption):
    values = caption if isinstance(caption, list) else [caption]
    values = [value.decode() if isinstance(value, bytes) else value for value in values]
    return values if isinstance(caption, list) else values[0]


def fields_of(item, key):
    return {} if item.caption is ABSENT else {key: texts(item.caption)}


# --- one writer a format: (path, options, what went in) ----------------------------------------------------


def webdataset(folder, rng):
    kind = rng.choice(["txt", "json", "both"])
    key = str(rng.choice(["caption", "text", "TEXT", "title", "my own key"]))
    given = items(rng, several=kind == "json", null=kind != "txt")
    stem = str(rng.choice(STEMS))
    ending = str(rng.choice(["png", "PNG", "left.png"]))
    with tarfile.open(folder / "0.tar", "w") as tar:

        def put(name, data):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

        for item in given:
            name = stem.format(item.number)
            put(f"{name}.{ending}", item.image)
            if kind == "json" or (kind == "both" and not isinstance(item.caption, bytes)):
                put(f"{name}.json", json.dumps({"url": "x", **fields_of(item, key)}).encode())
            elif isinstance(item.caption, bytes):
                put(f"{name}.txt", item.caption)
            if rng.integers(5) == 0:
                put(f"{name}.npy", b"numbers")
        if rng.integers(2):
            put("README.md", b"of the data")
    options = {"caption_key": key} if key == "my own key" and kind == "json" else {}
    if ending == "left.png":
        options["image_key"] = "left.png"
    # A record of a .txt shard whose caption is in a .json with no usual key has none.
    if kind == "both" and key == "my own key":
        for item in given:
            item.caption = item.caption if isinstance(item.caption, bytes) else None
    return str(folder), options, given


def example_records(given, rng, key, image_key):
    for item in given:
        features = {image_key: [item.image] if item.image or rng.integers(2) else []}
        if item.caption is not ABSENT:
            features[key] = [
                one for one in (item.caption if isinstance(item.caption, list) else [item.caption]) if one is not None
            ]
        if rng.integers(3):
            features["url"] = [b"http://x"]
        lists = {name: tf.train.Feature(bytes_list=tf.train.BytesList(value=v)) for name, v in features.items()}
        yield tf.train.Example(features=tf.train.Features(feature=lists)).SerializeToString()


def examples(folder, rng, write, ending):
    given = items(rng)
    key, image_key = str(rng.choice(["caption", "txt", "mine"])), str(rng.choice(["image", "jpg", "own"]))
    payloads = list(example_records(given, rng, key, image_key))
    half = len(payloads) // 2
    write(folder / f"0.{ending}", payloads[:half])
    write(folder / f"1.{ending}", payloads[half:])
    options = {"caption_key": key} if key == "mine" else {}
    return str(folder), options | ({"image_key": image_key} if image_key == "own" else {}), given


def tfrecord(folder, rng):
    return examples(folder, rng, test_tfrecord.write_file, "tfrecord")


def array_record(folder, rng):
    return examples(folder, rng, test_array_record.write_file, "array_record")


def hdf5(folder, rng):
    given = items(rng, several=False, null=False)
    key, image_key = str(rng.choice(["caption", "text", "texts"])), str(rng.choice(["jpg", "image", "images"]))
    kind = h5py.vlen_dtype(np.uint8)
    with h5py.File(folder / "0.h5", "w") as file:
        for name, values in ((image_key, [i.image for i in given]), (key, [i.caption for i in given])):
            data = file.create_dataset(name, (len(given),), kind)
            for row, value in enumerate(values):
                data[row] = np.frombuffer(value, np.uint8)
        if rng.integers(2):
            file["url"] = np.arange(len(given))
    return str(folder), {}, given


def parquet(folder, rng):
    several = bool(rng.integers(2))
    given = items(rng, several=several)
    key, image_key = str(rng.choice(["caption", "text", "mine"])), str(rng.choice(["image", "img", "images"]))
    captions = [texts(i.caption) if i.caption is not ABSENT else None for i in given]
    if several:
        captions = [value if isinstance(value, list) or value is None else [value] for value in captions]
    form = rng.integers(3)
    images = [i.image for i in given]
    if form == 1:
        images = [{"bytes": image, "path": "x.png"} for image in images]
    elif form == 2:
        images = [[{"bytes": image, "path": "x.png"}] for image in images]
    columns = {image_key: images, key: captions}
    if rng.integers(2):
        columns["url"] = ["x"] * len(given)
    pq.write_table(pa.table(columns), folder / "0.parquet", row_group_size=5)
    return str(folder), {"caption_key": key} if key == "mine" else {}, given


def folder_of_pictures(folder, rng):
    kind = rng.choice(["metadata.jsonl", "metadata.csv", "captions.csv", "metadata.parquet", "beside"])
    is_json = kind == "metadata.jsonl"
    given = items(rng, several=is_json, null=kind not in ("metadata.csv", "captions.csv", "beside"))
    key, name_key = str(rng.choice(["caption", "text"])), str(rng.choice(["file_name", "filename", "image"]))
    stem = str(rng.choice(STEMS))
    rows = []
    for item in given:
        name = stem.format(item.number) + ".png"
        (folder / name).write_bytes(item.image)
        rows.append({name_key: name, **fields_of(item, key), "url": "x"})
    if is_json:
        (folder / kind).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    elif kind == "metadata.parquet":
        columns = {name: [row.get(name) for row in rows] for name in (name_key, key, "url")}
        pq.write_table(pa.table(columns), folder / kind)
    elif kind == "beside":
        ending = str(rng.choice([".txt", ".png.txt"]))
        for item in given:
            (folder / (stem.format(item.number) + ending)).write_bytes(item.caption)
    else:
        with open(folder / kind, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [name_key, key, "url"], delimiter=str(rng.choice([",", ";", "\t"])))
            writer.writeheader()
            writer.writerows(rows)
    if rng.integers(2):
        (folder / "notes.md").write_text("of the data")
    return str(folder), {}, given


def class_folders(folder, rng):
    given = items(rng, several=False, null=False)
    for item in given:
        place = folder / f"class {item.number % 3}"
        place.mkdir(exist_ok=True)
        (place / (str(rng.choice(STEMS)).format(item.number) + f"-{item.number}.png")).write_bytes(item.image)
        item.caption = f"a red class {item.number % 3}".encode()
    (folder / "class 0" / "notes.txt").write_text("of the data")
    (folder / "empty").mkdir()
    return str(folder), {"template": "a red {}"}, given


def text(folder, rng):
    given = [item for item in items(rng, several=False, null=False) if item.caption]
    lines = [line for item in given for line in [item.caption] + [b"   "] * int(rng.integers(2))]
    (folder / "0.txt").write_bytes(b"\n".join(lines) + b"\n" * int(rng.integers(3)))
    for item in given:
        item.image = png(item.number)
    return str(folder), {}, given


def tfds_data(folder, rng):
    given = items(rng, several=False, null=False, broken=False)
    key = str(rng.choice(["caption", "text"]))
    features = {"image": tfds.features.Image(), key: tfds.features.Text(), "url": tfds.features.Text()}
    rows = [{"image": io.BytesIO(item.image), key: item.caption, "url": "x"} for item in given]
    return test_tfds.build(folder, features, {"train": rows}), {}, given


WRITERS = {
    "webdataset": webdataset,
    "tfrecord": tfrecord,
    "array_record": array_record,
    "hdf5": hdf5,
    "parquet": parquet,
    "folder": folder_of_pictures,
    "class_folders": class_folders,
    "text": text,
    "tfds": tfds_data,
}
SEEDS = {name: 4 if name == "tfds" else 25 if name in ("webdataset", "folder") else 24 for name in WRITERS}
assert sum(SEEDS.values()) >= 198


def counted_by_the_pipeline(source):
    """``{reason: examples}`` as training counts them, each example once."""
    config = default()
    config.data.image_size, config.data.patch_size, config.data.max_text_tokens = 16, 8, 16
    table = [m for m in modality_table(config, 0).values() if m.name in source.modalities]
    groups = tuple(Group(m.name, (m,), RandomSubset(0.5)) for m in table)
    feed = Feed((source,), (eval_view(config, source, len(source)),))
    counts = dict.fromkeys(REASONS, 0)
    steps = -(-len(source) // 8)
    for batch in Batches(config, groups, feed, load_tokenizer("scenes"), batch_size=8, stop_step=steps):
        example = batch["example"]
        for position, reason in zip(example["position"], example["reason"], strict=True):
            if position < len(source):
                counts[REASONS[reason]] += 1
    return counts


def check_pairs(source, given):
    """Each record holds one example's own picture and caption, and none comes twice."""
    by_image = {item.image: item for item in given if item.readable}
    seen = []
    for record in source.read(np.arange(len(source))):
        if item := by_image.get(record.get("image", b"")):
            seen.append(item.number)
            held = [*record.get("captions", ()), *([record["caption"]] if "caption" in record else [])]
            assert set(held) <= set(item.captions), (item, held)
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("name", WRITERS)
def test_what_went_in_is_read_or_counted(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    refused = 0
    for seed in range(SEEDS[name]):
        folder = tmp_path / f"data{seed}"
        folder.mkdir()
        path, options, given = WRITERS[name](folder, np.random.default_rng([seed, len(name)]))
        try:
            source = open_format(name, path, SourceOptions(**options), "data.train.")
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and all(item.expected == "lost" for item in given[1:]), (seed, error)
            continue
        report = report_of(source)
        assert report is not None and report.examples == len(source), seed
        assert len(source) + sum(report.skipped.values()) == len(given), (seed, report)
        counts = counted_by_the_pipeline(source)
        expected = [item.expected for item in given]
        if source.modalities == ("text",):
            expected = ["used"] * len(given)
        assert counts[EMPTY_CAPTION] == expected.count("empty"), (seed, counts, report)
        assert counts[""] == expected.count("used"), (seed, counts, report)
        lost = sum(report.skipped.values()) + sum(counts.values()) - counts[""] - counts[EMPTY_CAPTION]
        assert lost == expected.count("lost"), (seed, counts, report)
        check_pairs(source, given)
        # Told alike at the next start, whoever built the index, and on the page.
        again = open_format(name, path, SourceOptions(**options), "data.train.")
        assert report_of(again) == report
        data_report.save(tmp_path, {"data.train": again}, {"data.train": {"format": name, "path": path}})
        told = json.loads((tmp_path / "data.json").read_text("utf-8"))["sources"]["data.train"]
        assert {kind: count for kind, (count, _) in told["left_out"].items()} == report.skipped
        assert {kind: count for kind, (count, _) in told["not_read"].items()} == report.unused
    assert refused <= SEEDS[name] // 10
