"""The scenes are a pure function of (seed, split, index), and every caption is true."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3ae_jax.config import default
from m3ae_jax.data.sources import build_source, scenes
from m3ae_jax.data.sources.scenes import Mention, Scene, SceneObject, SceneOptions, ScenesSource, Span
from m3ae_jax.errors import UserError

CROWDED = SceneOptions(max_objects=6, clutter=4)
VARIANTS = [("train", SceneOptions()), ("val", CROWDED), ("val_novel", CROWDED)]
# Mean RGB of 20 scenes each: pixels may differ by a rounding between platforms.
MEANS = [
    ("train", (130.0, 119.1, 117.0)),
    ("val", (125.0, 127.1, 128.4)),
    ("val_novel", (119.4, 121.7, 115.7)),
]


def drawn(split: str, options: SceneOptions, count: int) -> list[Scene]:
    source = ScenesSource(split, options)
    return [source.scene(i) for i in range(count)]


def words_of(scene: Scene, mention: Mention) -> dict[str, str]:
    return {span.attribute: scene.caption[span.start : span.end] for span in mention.spans}


def made(caption: str, mentions: tuple[Mention, ...], *objects: SceneObject) -> Scene:
    empty = np.zeros((16, 16), np.uint8)
    return Scene(empty, caption, objects, empty, empty, "plain", mentions)


def item(shape: str, color: str, size: str = "small", visible: float = 1.0) -> SceneObject:
    return SceneObject(shape, color, size, "plain", (8, 8), 3, (5, 5, 11, 11), visible)


class TestSource:
    def test_an_example_depends_on_its_index_alone(self) -> None:
        source = ScenesSource("train")
        order = np.array([5, 2**31 - 1, 0, 5, 123_456_789])
        records = source.read(order)
        assert records == source.read(order[::-1])[::-1]
        assert records[0] == records[3] != records[2]
        assert records == ScenesSource("train").read(order)

    def test_threads_read_the_same(self) -> None:
        source = ScenesSource("train", SceneOptions(image_size=37))
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(source.read, [np.arange(20)] * 4))
        assert all(result == results[0] for result in results)

    def test_records_hold_the_scene(self) -> None:
        for size in (33, 64):  # rows of a BMP are padded where 3 * size is no multiple of 4
            source = ScenesSource("train", SceneOptions(image_size=size))
            record, scene = source.read(np.array([7]))[0], source.scene(7)
            assert record["caption"].decode() == scene.caption
            np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(record["image"]))), scene.image)

    def test_splits_and_seeds_share_no_picture(self) -> None:
        variants = [("train", 0), ("val", 0), ("train", 1)]
        hashes: set[bytes] = set()
        for split, seed in variants:
            for scene in drawn(split, SceneOptions(seed=seed, image_size=32), 2000):
                hashes.add(hashlib.sha256(scene.image.tobytes()).digest())
        assert len(hashes) == 2000 * len(variants)

    def test_fingerprint_tells_contents_apart(self) -> None:
        sources = [
            ScenesSource("train"),
            ScenesSource("val"),
            ScenesSource("train", SceneOptions(seed=1)),
            ScenesSource("train", SceneOptions(image_size=65)),
        ]
        assert len({source.fingerprint for source in sources}) == len(sources)
        assert ScenesSource("train").fingerprint == sources[0].fingerprint

    def test_length_bounds_the_index(self) -> None:
        source = ScenesSource("train", SceneOptions(num_examples=3))
        assert len(source) == 3
        for index in (-1, 3):
            with pytest.raises(IndexError, match=r"is not in 0\.\.2"):
                source.read(np.array([index]))

    def test_golden(self, golden: Callable[[str, object], None]) -> None:
        """Captions and ground truth do not change unnoticed; pixels are left to `test_mean_colors`."""
        truth = {}
        for split, options in VARIANTS:
            digest = hashlib.sha256()
            for scene in drawn(split, options, 200):
                digest.update(repr((scene.caption, scene.background, scene.mentions)).encode())
                for o in scene.objects:
                    floats = [f"{x:.3f}" for x in (*o.center, o.radius, *o.box, o.visible_fraction)]
                    digest.update(repr((o.shape, o.color, o.size, o.texture, floats)).encode())
            captions = [scene.caption for scene in drawn(split, options, 8)]
            truth[split] = {"captions": captions, "sha256_of_200": digest.hexdigest()}
        golden("scenes.json", truth)

    @pytest.mark.parametrize(("split", "mean"), MEANS)
    def test_mean_colors(self, split: str, mean: tuple[float, float, float]) -> None:
        images = np.stack([scene.image for scene in drawn(split, SceneOptions(clutter=2), 20)])
        np.testing.assert_allclose(images.mean(axis=(0, 1, 2)), mean, atol=0.1)


EASIER = SceneOptions(
    colors=("green", "pink", "red"),
    shapes=("ring", "circle"),
    sizes=("large",),
    textures=("dotted",),
    backgrounds=("plain",),
)


class TestEasierScenes:
    @pytest.mark.parametrize("split", ["train", "val_novel"])
    def test_hold_what_is_named_alone(self, split: str) -> None:
        shown = drawn(split, EASIER, 200)
        objects = [o for scene in shown for o in scene.objects]
        for attribute in ("color", "shape", "size", "texture"):
            assert {getattr(o, attribute) for o in objects} == set(getattr(EASIER, f"{attribute}s")), attribute
        assert {scene.background for scene in shown} == {"plain"}
        words = {word for scene in shown for word in scene.caption.split()}
        assert not words & ({*scenes.COLORS, *scenes.SHAPES, "small", "striped"} - {*EASIER.colors, *EASIER.shapes})

    def test_are_another_data_set_but_where_all_is_named(self) -> None:
        everything = SceneOptions(colors=tuple(scenes.COLORS), shapes=list(scenes.SHAPES))  # type: ignore[arg-type]
        assert everything == SceneOptions()
        assert SceneOptions(backgrounds=("shaded", "plain")) == SceneOptions(backgrounds=("plain", "shaded"))
        fingerprints = {ScenesSource("train", of).fingerprint for of in (everything, SceneOptions(), EASIER)}
        assert len(fingerprints) == 2

    @pytest.mark.parametrize(
        ("split", "options", "message"),
        [
            ("train", {"shapes": ("circel",)}, "scenes.shapes='circel'.*did you mean 'circle'"),
            ("train", {"textures": ()}, r"scenes.textures=\(\) must name one of plain"),
            ("train", {"colors": ("red", "red")}, "none twice"),
            ("train", {"colors": ("green",), "shapes": ("circle",)}, "no training picture has these"),
            ("val_novel", {"colors": ("green",), "shapes": ("ring",)}, "of these there is none"),
        ],
    )
    def test_what_cannot_be_drawn_is_refused(self, split: str, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            ScenesSource(split, SceneOptions(**options))


class TestHeldOut:
    def test_pairs_leave_each_color_and_shape_to_training(self) -> None:
        assert len(set(scenes.HELD_OUT)) == len(scenes.HELD_OUT)
        share = len(scenes.HELD_OUT) / (len(scenes.COLORS) * len(scenes.SHAPES))
        assert 0.08 <= share <= 0.13
        objects = [o for scene in drawn("train", SceneOptions(image_size=16), 600) for o in scene.objects]
        assert {o.color for o in objects} == set(scenes.COLORS)
        assert {o.shape for o in objects} == set(scenes.SHAPES)
        pairs = {(o.color, o.shape) for o in objects}
        assert len(pairs) == len(scenes.COLORS) * len(scenes.SHAPES) - len(scenes.HELD_OUT)

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_training_and_validation_never_draw_one(self, split: str) -> None:
        for scene in drawn(split, SceneOptions(max_objects=6, image_size=16), 500):
            assert not {(o.color, o.shape) for o in scene.objects} & set(scenes.HELD_OUT)

    @pytest.mark.parametrize("options", [SceneOptions(), CROWDED])
    def test_novel_scenes_name_one(self, options: SceneOptions) -> None:
        for scene in drawn("val_novel", options, 300):
            named = [scene.objects[m.object] for m in scene.mentions]
            assert any((o.color, o.shape) in scenes.HELD_OUT for o in named), scene.caption


class TestCaption:
    @pytest.mark.parametrize(("split", "options"), VARIANTS)
    def test_words_are_few_known_and_lower_case(self, split: str, options: SceneOptions) -> None:
        known = set(scenes.vocabulary())
        for scene in drawn(split, options, 500):
            words = scene.caption.split(" ")
            assert 3 <= len(words) <= scenes.MAX_WORDS
            assert set(words) <= known, scene.caption
            assert re.fullmatch("[a-z ]+", scene.caption)
            for article, noun in itertools.pairwise(words):
                if article in ("a", "an"):
                    assert (article == "an") == (noun[0] in "aeiou"), scene.caption

    def test_every_word_of_the_vocabulary_is_used(self) -> None:
        used = {word for scene in drawn("train", CROWDED, 1500) for word in scene.caption.split()}
        assert used == set(scenes.vocabulary())

    @pytest.mark.parametrize(("split", "options"), VARIANTS)
    def test_attribute_words_are_true(self, split: str, options: SceneOptions) -> None:
        mentions = []
        for scene in drawn(split, options, 500):
            assert len({m.object for m in scene.mentions}) == len(scene.mentions) >= 1
            for mention in scene.mentions:
                words = words_of(scene, mention)
                assert len(words) == len(mention.spans)
                for attribute, word in words.items():
                    assert getattr(scene.objects[mention.object], attribute) == word, scene.caption
                mentions.append(words)
            if match := re.search(r"on a (\w+) background", scene.caption):
                assert match[1] == scene.background
        for attribute in ("color", "shape"):
            assert np.mean([attribute in words for words in mentions]) >= 0.9

    def test_size_words_are_true(self) -> None:
        radii: dict[str, list[float]] = {"small": [], "large": []}
        for scene in drawn("train", CROWDED, 300):
            for o in scene.objects:
                radii[o.size].append(o.radius / 64)
        assert min(radii["small"]) >= 0.14 and max(radii["small"]) < 0.18
        assert min(radii["large"]) > 0.22 and max(radii["large"]) <= 0.28

    def test_relations_are_true(self) -> None:
        seen = set()
        for scene in drawn("val", CROWDED, 2000):
            if len(scene.mentions) != 2:
                continue
            first, second = scene.mentions
            between = scene.caption[first.spans[-1].end : second.spans[0].start]
            relation = re.search(r"left|right|above|below|under|front|behind", between)
            if relation is None:
                continue
            seen.add(relation[0])
            self.check(scene, first.object, relation[0], second.object)
        assert seen == {"left", "right", "above", "below", "under", "front", "behind"}

    def check(self, scene: Scene, first: int, relation: str, second: int) -> None:
        a, b = scene.objects[first], scene.objects[second]
        dx, dy = b.center[0] - a.center[0], b.center[1] - a.center[1]
        if relation in ("left", "right"):
            assert (dx if relation == "left" else -dx) > 0.1 * 64, scene.caption
        elif relation in ("above", "below", "under"):
            assert (dy if relation == "above" else -dy) > 0.1 * 64, scene.caption
        else:
            assert (first > second) == (relation == "front"), scene.caption
            rear = (a, b)[first > second]
            assert rear.visible_fraction < 1, scene.caption

    def test_one_object_is_told_alone(self) -> None:
        for scene in drawn("train", SceneOptions(max_objects=1), 100):
            assert len(scene.objects) == len(scene.mentions) == 1
            assert not re.search("left|right|and|behind", scene.caption)


class TestGroundTruth:
    @pytest.mark.parametrize("size", [16, 33, 64, 128])
    def test_maps_agree(self, size: int) -> None:
        for scene in drawn("train", SceneOptions(image_size=size, max_objects=6), 40):
            assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
            assert scene.segmentation.shape == (size, size) and scene.segmentation.dtype == np.uint8
            assert scene.depth.shape == (size, size) and scene.depth.dtype == np.float32
            assert scene.segmentation.max() <= len(scene.objects)
            depths = [1.0]
            for i, o in enumerate(scene.objects):
                mine = scene.segmentation == i + 1
                x0, y0, x1, y1 = o.box
                assert 0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size
                assert x0 < o.center[0] < x1 and y0 < o.center[1] < y1
                rows, columns = np.nonzero(mine)
                if len(rows) == 0:
                    continue
                # Pixel centres; the anti-aliasing distance of corners may be a little off.
                assert x0 - 0.1 <= columns.min() + 0.5 and columns.max() + 0.5 <= x1 + 0.1
                assert y0 - 0.1 <= rows.min() + 0.5 and rows.max() + 0.5 <= y1 + 0.1
                if o.visible_fraction == 1:
                    assert columns.min() - x0 < 1.5 and x1 - columns.max() < 2.5
                (level,) = set(scene.depth[mine].tolist())
                depths.append(level)
            assert depths == sorted(depths, reverse=True) and depths[-1] > 0
            assert set(scene.depth[scene.segmentation == 0].tolist()) <= {1.0}

    def test_visible_fraction_agrees_with_the_pixels(self) -> None:
        source = ScenesSource("train", SceneOptions(image_size=128, min_objects=2))
        for index in range(60):
            scene = source.scene(index)
            for i, o in enumerate(scene.objects[:-1]):
                alone = self.area(o.shape, o.radius)
                shown = np.count_nonzero(scene.segmentation == i + 1)
                assert shown / alone == pytest.approx(o.visible_fraction, abs=0.06)

    def area(self, shape: str, radius: float) -> float:
        x = (np.arange(128) - 63.5) / radius
        return float(np.count_nonzero(scenes._DRAWN[shape].distance(x[None, :], x[:, None]) < 0))

    def test_most_objects_stay_visible(self) -> None:
        visible = [o.visible_fraction for s in drawn("train", SceneOptions(), 500) for o in s.objects]
        assert np.mean(np.array(visible) >= scenes.DETERMINED_VISIBLE) > 0.9

    def test_an_object_has_its_color(self) -> None:
        names, values = zip(*scenes.COLORS.items(), strict=True)
        for scene in drawn("train", SceneOptions(), 200):
            for i, o in enumerate(scene.objects):
                pixels = scene.image[scene.segmentation == i + 1].astype(int)
                if o.texture == "plain" and o.visible_fraction > 0.5:
                    errors = np.abs(np.median(pixels, axis=0) - np.array(values)).sum(axis=1)
                    assert names[errors.argmin()] == o.color

    def test_every_size_shows_the_same_scene(self) -> None:
        for split, options in VARIANTS:
            small, large = (
                ScenesSource(split, SceneOptions(image_size=size, max_objects=options.max_objects)) for size in (16, 96)
            )
            for index in range(30):
                a, b = small.scene(index), large.scene(index)
                assert (a.caption, a.mentions, a.background) == (b.caption, b.mentions, b.background)
                for p, q in zip(a.objects, b.objects, strict=True):
                    np.testing.assert_allclose(np.array(p.box) * 6, q.box)
                    assert p.visible_fraction == q.visible_fraction
                reduced = b.image.reshape(16, 6, 16, 6, 3).mean(axis=(1, 3))
                assert np.abs(reduced - a.image).mean() < 16

    def test_clutter_changes_marks_only(self) -> None:
        plain, cluttered = (ScenesSource("train", SceneOptions(clutter=n)).scene(3) for n in (0, 8))
        assert (plain.caption, plain.objects) == (cluttered.caption, cluttered.objects)
        np.testing.assert_array_equal(plain.segmentation, cluttered.segmentation)
        changed = (plain.image != cluttered.image).any(axis=-1)
        assert changed.any() and changed.mean() < 0.3


class TestDeterminedSpans:
    COLOR, SHAPE = Span("color", 2, 5), Span("shape", 6, 12)
    CAPTION = "a red circle"

    def determined(self, *objects: SceneObject) -> set[str]:
        mentions = (Mention(0, (self.COLOR, self.SHAPE)),)
        scene = made(self.CAPTION, mentions, *objects)
        return {span.attribute for _, span in scene.determined_spans()}

    def test_an_object_alone_determines_both(self) -> None:
        assert self.determined(item("circle", "red")) == {"color", "shape"}

    def test_a_rival_leaves_open_what_differs(self) -> None:
        assert self.determined(item("circle", "red"), item("circle", "blue")) == {"shape"}
        assert self.determined(item("circle", "red"), item("square", "red")) == {"color"}
        assert self.determined(item("circle", "red"), item("square", "blue")) == {"color", "shape"}
        assert self.determined(item("circle", "red"), item("circle", "red")) == {"color", "shape"}

    def test_a_hidden_rival_does_not_count(self) -> None:
        assert self.determined(item("circle", "red"), item("circle", "blue", visible=0.49)) == {"color", "shape"}
        assert self.determined(item("circle", "red"), item("circle", "blue", visible=0.5)) == {"shape"}

    def test_a_hidden_referent_determines_nothing(self) -> None:
        assert self.determined(item("circle", "red", visible=0.49)) == set()
        # A twin in plain sight is another object.
        assert self.determined(item("circle", "red", visible=0.49), item("circle", "red")) == set()

    def test_further_words_narrow_the_candidates(self) -> None:
        size, color, shape = Span("size", 2, 7), Span("color", 8, 11), Span("shape", 12, 18)
        mentions = (Mention(0, (size, color, shape)),)
        scene = made("a small red circle", mentions, item("circle", "red"), item("circle", "blue", "large"))
        assert scene.determined_spans() == ((mentions[0], color), (mentions[0], shape))

    def test_a_mention_without_further_words_has_all_as_candidates(self) -> None:
        mentions = (Mention(0, (self.COLOR,)),)
        scene = made("a red shape", mentions, item("circle", "red"), item("square", "red"))
        assert len(scene.determined_spans()) == 1
        scene = made("a red shape", mentions, item("circle", "red"), item("square", "blue"))
        assert scene.determined_spans() == ()

    def test_most_color_and_shape_words_are_determined(self) -> None:
        drawn_scenes = drawn("val", SceneOptions(), 300)
        total = sum(s.attribute in ("color", "shape") for d in drawn_scenes for m in d.mentions for s in m.spans)
        determined = sum(len(d.determined_spans()) for d in drawn_scenes)
        assert 0.6 < determined / total < 1


class TestUserErrors:
    def test_unknown_split_names_the_nearest(self) -> None:
        with pytest.raises(UserError, match=r"scenes\.split='val_novle' .* did you mean 'val_novel'"):
            ScenesSource("val_novle")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("seed", -1),
            ("image_size", 15),
            ("image_size", 64.0),
            ("min_objects", 0),
            ("max_objects", 7),
            ("clutter", -1),
            ("num_examples", 0),
        ],
    )
    def test_out_of_range(self, name: str, value: float) -> None:
        with pytest.raises(UserError, match=rf"scenes\.{name}={value} is not an integer in \d+\.\.\d+"):
            SceneOptions(**{name: value})  # type: ignore[arg-type]

    def test_minimum_above_maximum(self) -> None:
        with pytest.raises(UserError, match=r"scenes\.min_objects=4 is above scenes\.max_objects=3"):
            SceneOptions(min_objects=4)


def test_a_path_or_a_key_beside_scenes_is_refused() -> None:
    config = default()
    config.data.train.source, config.data.train.path = "scenes", "DIR"
    with pytest.raises(
        UserError, match=r"data\.train\.path='DIR': .*'scenes' draws.*set data\.train\.source to one of"
    ):
        build_source(config, "train")
    config.data.train.path, config.data.train.caption_key = "", "text"
    with pytest.raises(UserError, match=r"data\.train\.caption_key='text': the format scenes does not read it"):
        build_source(config, "train")


@pytest.mark.parametrize("attribute", ["color", "shape"])
@pytest.mark.parametrize("split", scenes.SPLITS)
def test_a_twin_is_of_the_same_words_names_pairs_of_the_split_and_is_untrue(split, attribute):
    source = ScenesSource(split, SceneOptions(image_size=16, min_objects=2, max_objects=3))
    found = 0
    for index in range(400):
        scene = source.scene(index)
        twin = scene.twin(attribute)
        if twin is None:
            continue
        found += 1
        assert twin != scene.caption
        a, b = (sorted(word for word in text.split() if word not in ("a", "an")) for text in (twin, scene.caption))
        assert a == b
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", twin)
        words = twin.split()
        colors, shapes = ([w for w in words if w in kind] for kind in (scenes.COLORS, scenes.SHAPES))
        shown = {(o.color, o.shape) for o in scene.objects}
        pairs = set(zip(colors, shapes, strict=True))
        novel = any(pair in scenes.HELD_OUT for pair in shown)
        assert novel or not any(pair in scenes.HELD_OUT for pair in pairs)
    assert found > 30
