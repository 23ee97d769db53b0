"""The pipeline: the batch contract, purity, replacement of broken examples, storage that fails, views."""

from __future__ import annotations

import io
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from m3ae_jax.config import default
from m3ae_jax.data import images, pipeline
from m3ae_jax.data.masking import RandomSubset
from m3ae_jax.data.order import ATTEMPTS, Order
from m3ae_jax.data.pipeline import Batches, Feed, View, eval_view, train_view
from m3ae_jax.data.sources import build_source
from m3ae_jax.data.sources.base import Record, called
from m3ae_jax.data.text import Tokenizer, load_tokenizer
from m3ae_jax.data.tokens import Group, Modality, modality_table, patch_grid
from m3ae_jax.errors import UserError

N = 10
B = 4
PATCHES = 16
WORDS = 6
IMAGE = Group("image", (Modality("image", "picture", PATCHES, features=48, grid=(4, 4)),), RandomSubset(0.5))
TEXT = Group("text", (Modality("text", "text", WORDS, vocabulary=1000),), RandomSubset(0.5))
BROKEN = b"not a picture"
CONTRACT = {
    "groups.image.visible.value": ((B, 8, 48), np.uint8),
    "groups.image.visible.position": ((B, 8), np.int32),
    "groups.image.visible.valid": ((B, 8), np.bool_),
    "groups.image.target.value": ((B, 8, 48), np.uint8),
    "groups.image.target.position": ((B, 8), np.int32),
    "groups.image.target.valid": ((B, 8), np.bool_),
    "groups.text.visible.value": ((B, 3), np.int32),
    "groups.text.visible.position": ((B, 3), np.int32),
    "groups.text.visible.valid": ((B, 3), np.bool_),
    "groups.text.target.value": ((B, 3), np.int32),
    "groups.text.target.position": ((B, 3), np.int32),
    "groups.text.target.valid": ((B, 3), np.bool_),
    "example.source": ((B,), np.int32),
    "example.position": ((B,), np.int32),
    "example.index": ((B,), np.int32),
    "example.image_id": ((B,), np.int32),
    "example.caption_id": ((B,), np.int32),
    "example.attempt": ((B,), np.int32),
    "example.reason": ((B,), np.int32),
    "example.valid": ((B,), np.bool_),
}


class FakeSource:
    """Records in memory; `failures` reads fail before the next one works."""

    fingerprint = "fake"
    classes: tuple[str, ...] = ()

    def __init__(self, records: list[Record], modalities: tuple[str, ...] = ("image", "text")) -> None:
        self.records, self.modalities = records, modalities
        self.failures, self.calls = 0, 0

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: np.ndarray) -> list[Record]:
        self.calls += 1
        if self.failures > 0:
            self.failures -= 1
            raise OSError("the disk is gone")
        return [self.records[i] for i in indices]


class Numbers:
    """A tokenizer whose captions are its ids: ``3 3 3``."""

    vocab_size = 1000
    fingerprint = "numbers"

    def encode(self, captions: Sequence[bytes | str]) -> list[list[int]]:
        return [[int(word) for word in caption.split()] for caption in captions]


NUMBERS = cast(Tokenizer, Numbers())


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def record(index: int) -> Record:
    """A picture in one colour (so that a crop keeps it) and a caption, both of which tell the index."""
    return {
        "image": png(np.full((20, 24, 3), 20 * index + 5, np.uint8)),
        "caption": b" ".join([b"%d" % (index + 1)] * (1 + index % WORDS)),
    }


def source(broken: Sequence[int] = ()) -> FakeSource:
    records = [record(index) for index in range(N)]
    for index in broken:
        records[index]["image"] = BROKEN
    return FakeSource(records)


def config() -> ConfigDict:
    c = default()
    c.data.train.source = c.data.val.source = "scenes"
    c.data.image_size, c.data.patch_size, c.data.max_text_tokens = 16, 4, WORDS
    return c


def batches(
    data: FakeSource, view: View | None = None, groups: tuple[Group, ...] = (IMAGE, TEXT), **options: Any
) -> Batches:
    tokenizer = NUMBERS if TEXT in groups else None
    options = {"batch_size": B, "stop_step": 5} | options
    feed = Feed((data,), (view or train_view(config(), data),))
    return Batches(config(), groups, feed, tokenizer, **options)


def leaves(tree: Any, at: str = "") -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{at}.{key}" if at else key)
    else:
        yield at, tree


def assert_equal(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    """Bit for bit."""
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        left, right = dict(leaves(one)), dict(leaves(other))
        assert left.keys() == right.keys()
        for name, array in left.items():
            assert array.dtype == right[name].dtype
            np.testing.assert_array_equal(array, right[name], err_msg=name)


def column(found: list[dict[str, Any]], name: str) -> np.ndarray:
    """One leaf of all batches, the batches joined."""
    return np.concatenate([dict(leaves(batch))[name] for batch in found])


def parts(found: list[dict[str, Any]], group: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each example, visible and target joined: value, position, valid."""
    joined = [
        np.concatenate([column(found, f"groups.{group}.{part}.{key}") for part in ("visible", "target")], axis=1)
        for key in ("value", "position", "valid")
    ]
    yield from zip(*joined, strict=True)


def assert_paired(found: list[dict[str, Any]]) -> None:
    """Picture and caption are those of `index`, and whole."""
    index = column(found, "example.index")
    for i, (value, position, valid) in zip(index, parts(found, "image"), strict=True):
        assert (value == 20 * i + 5).all() and valid.all()
        assert sorted(position) == list(range(PATCHES))
    for i, (value, position, valid) in zip(index, parts(found, "text"), strict=True):
        assert (value[valid] == i + 1).all() and not value[~valid].any()
        assert sorted(position[valid]) == list(range(1 + i % WORDS))


@pytest.fixture(scope="module")
def whole() -> list[dict[str, Any]]:
    """Two epochs in five batches."""
    return list(batches(source()))


# -- the contract


def test_batch_contract(whole: list[dict[str, Any]]) -> None:
    for batch in whole:
        assert set(batch) == {"groups", "example"}
        assert {name: (array.shape, array.dtype.type) for name, array in leaves(batch)} == CONTRACT
    np.testing.assert_array_equal(column(whole, "example.position"), np.arange(5 * B))
    view = train_view(config(), source())
    np.testing.assert_array_equal(column(whole, "example.index"), view.order.index(np.arange(5 * B)))
    assert column(whole, "example.valid").all() and not column(whole, "example.attempt").any()
    assert_paired(whole)


def test_slots_and_views_follow_the_config() -> None:
    c = config()
    assert patch_grid(c) == (4, 4)
    assert modality_table(c, 1000) == {group.name: group.modalities[0] for group in (IMAGE, TEXT)}
    c.data.caption_fraction = 0.5
    training, validation = train_view(c, source()), eval_view(c, source(), 7)
    assert training.order.shuffle and training.augment and training.caption_fraction == 0.5
    assert not validation.order.shuffle and not validation.augment and validation.caption_fraction == 1.0
    assert validation.end == 7 and eval_view(c, source(), 99).end == N
    assert training.seed != validation.seed
    c.seed += 1
    assert train_view(c, source()).seed != training.seed


# -- purity


def test_a_later_start_gives_the_same_batches(whole: list[dict[str, Any]]) -> None:
    assert_equal(list(batches(source(), start_step=3)), whole[3:])


def test_processes_read_their_rows_of_the_same_batches(whole: list[dict[str, Any]]) -> None:
    halves = [list(batches(source(), rows=rows, stop_step=3)) for rows in (np.arange(2), np.arange(2, 4))]

    def join(left: Any, right: Any) -> Any:
        if isinstance(left, dict):
            return {key: join(left[key], right[key]) for key in left}
        return np.concatenate([left, right])

    assert_equal([join(left, right) for left, right in zip(*halves, strict=True)], whole[:3])


def test_an_example_is_masked_anew_each_epoch(whole: list[dict[str, Any]]) -> None:
    index = column(whole, "example.index")
    target = column(whole, "groups.image.target.position")
    first, second = (dict(zip(index[part], target[part], strict=True)) for part in (slice(N), slice(N, 2 * N)))
    assert first.keys() == second.keys() == set(range(N))
    assert all(list(first[i]) != list(second[i]) for i in range(N))
    assert len({tuple(p) for p in target}) == 2 * N


# -- broken examples


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_broken_picture_is_replaced_with_its_caption(shuffle: bool) -> None:
    broken = {1, 2, 6}
    view = View(Order(N, 5, shuffle), seed=5, augment=shuffle)
    found = list(batches(source(sorted(broken)), view))
    candidates = np.stack([view.order.index(np.arange(5 * B), attempt) for attempt in range(ATTEMPTS)])
    attempt = (~np.isin(candidates, list(broken))).argmax(0)
    assert attempt.max() >= 2
    np.testing.assert_array_equal(column(found, "example.attempt"), attempt)
    np.testing.assert_array_equal(column(found, "example.index"), candidates[attempt, np.arange(5 * B)])
    np.testing.assert_array_equal(column(found, "example.position"), np.arange(5 * B))
    assert column(found, "example.valid").all()
    assert_paired(found)


def test_where_nothing_decodes_nothing_is_valid() -> None:
    found = list(batches(source(range(N)), stop_step=2))
    assert (column(found, "example.attempt") == ATTEMPTS).all()
    assert not column(found, "example.valid").any()
    np.testing.assert_array_equal(column(found, "example.position"), np.arange(2 * B))
    for batch in found:
        for name, array in leaves(batch["groups"]):
            assert not array.any(), name


# -- storage that fails


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were to be slept."""
    slept: list[float] = []
    monkeypatch.setattr(pipeline, "time", types.SimpleNamespace(sleep=slept.append))
    return slept


def test_a_failing_read_is_tried_again(whole: list[dict[str, Any]], naps: list[float]) -> None:
    data = source()
    data.failures = 2
    assert_equal(list(batches(data, stop_step=1)), whole[:1])
    assert naps == pytest.approx([0.2, 0.8])


@pytest.mark.parametrize("groups", [(IMAGE, TEXT), (TEXT,)], ids=["pairs", "text"])
def test_storage_that_stays_away_stops_the_run(groups: tuple[Group, ...], naps: list[float]) -> None:
    data = source()
    data.failures = 10**9
    with pytest.raises(UserError, match="reading the data failed 4 times: the disk is gone"):
        next(iter(batches(data, groups=groups)))
    assert data.calls <= 3 * 4  # as patient in each of the reads ahead, and not in each candidate of each example
    assert len(naps) <= 3 * 3


@pytest.mark.parametrize("field", ["data.train.", "data.val.", "eval.test."])
def test_item_12_a_message_names_the_data_that_it_is_of(naps: list[float], field: str) -> None:
    data = called(source(), field)
    data.failures = 10**9
    with pytest.raises(UserError, match=rf"^{field[:-1]}: reading the data failed 4 times"):
        next(iter(batches(data)))
    data.modalities = ("image",)
    with pytest.raises(UserError, match=rf"data\.modalities asks for 'text', but {field[:-1]} holds only image"):
        batches(data)


def test_good_batches_before_the_storage_went_are_the_same(whole: list[dict[str, Any]], naps: list[float]) -> None:
    class Failing(FakeSource):
        def read(self, indices: np.ndarray) -> list[Record]:
            if self.calls >= 1:
                self.failures = 10**9
            return super().read(indices)

    found: list[dict[str, Any]] = []
    with pytest.raises(UserError, match="the disk is gone"):
        found.extend(batches(Failing(source().records)))
    assert_equal(found, whole[: len(found)])


# -- one modality


def test_pictures_alone(whole: list[dict[str, Any]]) -> None:
    data = FakeSource([{"image": r["image"]} for r in source([3]).records], ("image",))
    found = list(batches(data, groups=(IMAGE,)))
    assert all(list(batch["groups"]) == ["image"] for batch in found)
    for i, (value, _, valid) in zip(column(found, "example.index"), parts(found, "image"), strict=True):
        assert (value == 20 * i + 5).all() and valid.all()
    assert column(found, "example.attempt").any()


def test_text_alone_looks_at_no_picture() -> None:
    for data in (FakeSource([{"caption": r["caption"]} for r in source().records], ("text",)), source(range(N))):
        found = list(batches(data, groups=(TEXT,)))
        assert all(list(batch["groups"]) == ["text"] for batch in found)
        assert not column(found, "example.attempt").any() and column(found, "example.valid").all()
        for i, (value, _, valid) in zip(column(found, "example.index"), parts(found, "text"), strict=True):
            assert (value[valid] == i + 1).all() and valid.sum() == 1 + i % WORDS


def test_a_text_without_words_is_replaced() -> None:
    blank = {2, 5}
    data = FakeSource([{"caption": b"" if i in blank else record(i)["caption"]} for i in range(N)], ("text",))
    found = list(batches(data, groups=(TEXT,)))
    index, attempt = column(found, "example.index"), column(found, "example.attempt")
    assert not set(index) & blank and (attempt > 0).any()
    assert set(column(found, "example.reason")[attempt > 0]) == {images.REASONS.index(images.NO_WORDS)}
    for i, (value, _, valid) in zip(index, parts(found, "text"), strict=True):
        assert (value[valid] == i + 1).all() and valid.sum() == 1 + i % WORDS
    nothing = list(batches(FakeSource([{"caption": b""}] * N, ("text",)), groups=(TEXT,), stop_step=1))
    assert (column(nothing, "example.attempt") == ATTEMPTS).all() and not column(nothing, "example.valid").any()


@pytest.mark.parametrize("error", [ValueError("two\nlines"), MemoryError(), StopIteration()])
def test_whatever_a_source_raises_becomes_one_line(error: Exception) -> None:
    class Raising(FakeSource):
        def read(self, indices: np.ndarray) -> list[Record]:
            raise error

    with pytest.raises(UserError, match=rf"Raising: reading examples \[.*\] failed: {type(error).__name__}") as found:
        next(iter(batches(Raising(source().records))))
    assert "\n" not in str(found.value)


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(UserError, match=r"'text'.*only image"):
        batches(FakeSource([], ("image",)), View(Order(1, 0), 0, False))
    with pytest.raises(UserError, match=r"data\.tokenizer is empty"):
        Batches(config(), (TEXT,), Feed((source(),), (train_view(config(), source()),)), None, batch_size=B)


# -- captions


@pytest.mark.parametrize(("fraction", "kept"), [(0.3, 3), (0.0, 0)])
def test_a_share_of_the_examples_keeps_its_caption(fraction: float, kept: int) -> None:
    view = View(Order(N, 5), seed=5, augment=True, caption_fraction=fraction)
    found = list(batches(source(), view))
    index = column(found, "example.index")
    with_text = np.array([valid.any() for _, _, valid in parts(found, "text")])
    epochs = [set(index[part][with_text[part]]) for part in (slice(N), slice(N, 2 * N))]
    assert epochs[0] == epochs[1] and len(epochs[0]) == kept
    assert column(found, "example.valid").all() and column(found, "groups.image.target.valid").all()
    for i, (value, _, valid) in zip(index, parts(found, "text"), strict=True):
        assert valid.sum() == (1 + i % WORDS if i in epochs[0] else 0) and not value[~valid].any()


def test_an_empty_caption_has_no_valid_token() -> None:
    captions = [b"", b" \t ", b"\x00", b"a red square", "\U0001f600".encode(), b"\xff\xfe", b"a " * 100]
    data = FakeSource([{**record(i), "caption": caption} for i, caption in enumerate(captions)])
    view = View(Order(len(captions), 0, shuffle=False), 0, augment=False)
    options: dict[str, Any] = {"batch_size": len(captions), "stop_step": 1}
    (batch,) = Batches(config(), (IMAGE, TEXT), Feed((data,), (view,)), load_tokenizer("scenes"), **options)
    count = np.array([valid.sum() for _, _, valid in parts([batch], "text")])
    assert count[3] >= 3 and count[6] == WORDS
    assert not count[[0, 1, 2, 4, 5]].any()
    assert batch["example"]["valid"].all() and batch["groups"]["image"]["target"]["valid"].all()


# -- views


def textured() -> FakeSource:
    """Pictures of the model's own size, no two of whose pixels are alike."""
    rng = np.random.default_rng(0)
    return FakeSource([{"image": png(p)} for p in rng.integers(0, 256, (N, 16, 16, 3), np.uint8)], ("image",))


def pictures(found: list[dict[str, Any]]) -> np.ndarray:
    """`[n, 16, 16, 3]`, visible and target put together again."""
    rows = [value[np.argsort(position)] for value, position, _ in parts(found, "image")]
    return images.unpatchify(np.stack(rows), 4, (4, 4))


def test_validation_sees_fixed_examples_unaugmented_and_pads_the_last_batch() -> None:
    data = textured()
    validation = batches(data, eval_view(config(), data, 7), (IMAGE,), stop_step=2)
    found = list(validation)
    assert_equal(list(validation), found)
    valid = column(found, "example.valid")
    np.testing.assert_array_equal(valid, np.arange(2 * B) < 7)
    np.testing.assert_array_equal(column(found, "example.index")[:7], np.arange(7))
    stored = np.stack([np.asarray(Image.open(io.BytesIO(r["image"]))) for r in data.records[:7]])
    np.testing.assert_array_equal(pictures(found)[:7], stored)
    for part in ("visible", "target"):
        assert column(found, f"groups.image.{part}.valid")[:7].all()
        for key in ("value", "position", "valid"):
            assert not column(found, f"groups.image.{part}.{key}")[7:].any()


def test_training_crops_anew_each_epoch() -> None:
    data = textured()
    found = list(batches(data, groups=(IMAGE,)))
    index, seen = column(found, "example.index"), pictures(found)
    for i in range(N):
        first, second = seen[index == i]
        stored = np.asarray(Image.open(io.BytesIO(data.records[i]["image"])))
        assert (first != second).any() and (first != stored).any()


# -- sources and shutting down


def test_build_source() -> None:
    c = config()
    c.data.train.split = "val"
    assert build_source(c, "train").modalities == ("image", "text")
    c.data.train.source = "webdataset"
    with pytest.raises(UserError, match=r"data\.train\.path is empty"):
        build_source(c, "train")
    c.data.val.source = "scense"
    with pytest.raises(UserError, match=r"data\.val\.source='scense'.*did you mean 'scenes'"):
        build_source(c, "val")


LEFT_EARLY = """
import contextlib, sys
from m3ae_jax.configs.tiny import get_config
from m3ae_jax.data.masking import WHOLE
from m3ae_jax.data.pipeline import Batches, Feed, train_view
from m3ae_jax.data.sources import build_source
from m3ae_jax.data.text import load_tokenizer
from m3ae_jax.data.tokens import Group, modality_table

c = get_config()
source = build_source(c, "train")
groups = tuple(Group(name, (modality,), WHOLE) for name, modality in modality_table(c, 0).items())
batches = Batches(c, groups, Feed((source,), (train_view(c, source),)), load_tokenizer("scenes"), batch_size=8)
with contextlib.closing(iter(batches)) as endless:
    print(sorted(next(endless)))
"""


@pytest.mark.slow
def test_the_process_can_end_while_batches_are_read_ahead() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", LEFT_EARLY], cwd=root, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['example', 'groups']"


def test_equal_pictures_and_captions_have_equal_ids() -> None:
    records = [record(index) for index in range(N)]
    records[3]["image"], records[4]["caption"], records[5]["caption"] = records[2]["image"], records[1]["caption"], b""
    view = View(Order(N, 0, shuffle=False), seed=5, augment=False)
    found = list(batches(FakeSource(records), view, batch_size=N, stop_step=1))
    picture, caption = column(found, "example.image_id"), column(found, "example.caption_id")
    assert picture[3] == picture[2] and caption[4] == caption[1]
    assert len(set(picture.tolist())) == N - 1 and len(set(caption.tolist())) == N - 1
    assert caption[5] == 0 and (picture > 0).all() and np.flatnonzero(caption == 0).tolist() == [5]


def test_draws_beyond_31_bits_are_told_modulo_and_stay_different_examples() -> None:
    far = 2**31 // B + 2
    found = list(batches(source(), start_step=far, stop_step=far + 1))
    np.testing.assert_array_equal(column(found, "example.position"), (far * B + np.arange(B)) % 2**31)
    assert_paired(found)
    near = list(batches(source(), start_step=2, stop_step=3))
    assert not np.array_equal(
        column(found, "groups.image.target.position"), column(near, "groups.image.target.position")
    )
