"""Mixtures: counts, turns and draws are closed forms, the same on any number of hosts and after any resume."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m3ae_jax.config import apply_overrides, default, from_json, resolve, source_fields, to_json
from m3ae_jax.data import mixture as mixture_lib
from m3ae_jax.data.masking import RandomSubset
from m3ae_jax.data.mixture import Member, Mixture, apportion, cut, cut_mixture, open_mixture, spread
from m3ae_jax.data.order import Order
from m3ae_jax.data.pipeline import Batches
from m3ae_jax.data.text import load_tokenizer
from m3ae_jax.data.tokens import Group, modality_table, restricted
from m3ae_jax.errors import UserError

BOTH, TEXT, IMAGE = ("image", "text"), ("text",), ("image",)


class Colours:
    """Pictures in one colour, whose captions say nothing but a number; `length` of them."""

    classes: tuple[str, ...] = ()

    def __init__(self, length, modalities=BOTH, level=0):
        self.length, self.modalities, self.level = length, modalities, level
        self.fingerprint = f"{length} {level}"

    def __len__(self):
        return self.length

    def read(self, indices):
        return [{"image": self.picture(int(i)), "caption": b"a red square"} for i in indices]

    def picture(self, index):
        file = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), (self.level + index) % 256, np.uint8)).save(file, "PNG")
        return file.getvalue()


def config(**changes):
    c = default()
    c.data.image_size, c.data.patch_size, c.data.max_text_tokens = 8, 4, 8
    c.data.crop_scale = (1.0, 1.0)
    apply_overrides(c, [(name, str(value)) for name, value in changes.items()])
    return c


GROUPS = tuple(Group(name, (m,), RandomSubset(0.5)) for name, m in modality_table(config(), 100).items())


def mixed(batch_size=8, unit=2):
    members = (
        Member("few", Colours(5), BOTH, 1.0),
        Member("many", Colours(100, level=100), BOTH, 2.0),
        Member("pictures", Colours(7, IMAGE), IMAGE, 0.5),
        Member("words", Colours(3, TEXT), TEXT, 0.5),
    )
    parts = cut([m.modalities for m in members], [m.weight for m in members], batch_size, unit)
    return Mixture(members, parts, batch_size, 1)


def batches(data, start=0, stop=6, rows=None):
    """{part: its batches}, of these rows of each part."""
    c = config()
    found = {}
    for part in data.parts:
        groups = restricted(GROUPS, part.modalities)
        mine = None if rows is None else np.arange(part.size)[rows(part.size)]
        options = {"batch_size": part.size, "start_step": start, "stop_step": stop, "rows": mine}
        found[part.name] = list(Batches(c, groups, data.feed(part, c), load_tokenizer("scenes"), **options))
    return found


def flat(tree, at=""):
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in flat(value, f"{at}.{key}").items()}
    return {at: tree}


@pytest.fixture(scope="module")
def whole():
    return batches(mixed())


@pytest.fixture(scope="module")
def wide():
    return batches(mixed(16, 4))


# -- counts


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(6, 500))
def test_counts_add_up_and_are_nearest_to_the_weights(weights, total):
    counts = apportion(weights, total)
    exact = np.array(weights) / np.sum(weights) * total
    assert counts.sum() == total and counts.min() >= 1
    if exact.min() >= 1:
        assert np.abs(counts - exact).max() < 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_turns_are_spread_evenly(counts):
    turns = spread(np.array(counts))
    assert list(np.bincount(turns, minlength=len(counts))) == counts
    for i, count in enumerate(counts):
        before = np.cumsum(turns == i)
        assert np.abs(before - count * np.arange(1, len(turns) + 1) / len(turns)).max() <= len(counts)


def test_a_batch_holds_fixed_counts_of_each_kind():
    data = mixed()
    assert [(part.name, part.size) for part in data.parts] == [("image+text", 4), ("image", 2), ("text", 2)]
    big = mixed(batch_size=800, unit=8)
    assert [part.size for part in big.parts] == [600, 104, 96]
    assert sum(big.share(i) for i in range(4)) == pytest.approx(1)
    assert big.share(1) == pytest.approx(2 * big.share(0), rel=0.01)
    assert big.epoch_examples == round(100 / big.share(1))


def test_too_small_a_batch_is_refused_with_its_numbers():
    with pytest.raises(UserError, match=r"batch_size=8 is too small for 3 kinds of data .*: each needs 4 rows"):
        mixed(batch_size=8, unit=4)


@pytest.mark.parametrize("unit", [1, 2, 8, 64, 256])
def test_no_mesh_changes_the_parts(unit):
    c = two(**{"data.mixture.a_pairs.weight": 5.0})
    assert [part.size for part in open_mixture(c, unit).parts] == [2560, 1536]
    assert open_mixture(c, unit).fingerprint == open_mixture(c, 1).fingerprint


def test_a_mesh_that_does_not_divide_the_parts_is_refused():
    with pytest.raises(UserError, match=r"data\.mixture_rows=256 .* is not divisible by 512"):
        open_mixture(two(), 512)
    with pytest.raises(UserError, match=r"batch_size=4096 is not divisible by data\.mixture_rows=48"):
        open_mixture(two(**{"data.mixture_rows": 48}), 1)
    assert [part.size for part in open_mixture(two(**{"data.mixture_rows": 512}), 512).parts] == [1024, 3072]


def test_a_share_of_the_captions_leaves_texts_alone():
    data = open_mixture(two(**{"data.caption_fraction": 0.1}), 1)
    shares = {part.name: data.feed(part, two(**{"data.caption_fraction": 0.1})).views[0] for part in data.parts}
    assert {name: view.caption_fraction for name, view in shares.items()} == {"image+text": 0.1, "text": 1.0}


# -- draws


def test_every_source_is_drawn_in_its_own_order_without_gaps(whole):
    data = mixed()
    for name, found in whole.items():
        example = {k: np.concatenate([b["example"][k] for b in found]) for k in found[0]["example"]}
        for number in np.unique(example["source"]):
            mine = example["source"] == number
            draws = example["position"][mine]
            assert list(draws) == list(range(len(draws)))
            part = next(p for p in data.parts if p.name == name)
            view = data.feed(part, config()).views[part.members.index(number)]
            order = Order(len(data.members[number].source), view.seed)
            assert list(example["index"][mine]) == list(order.index(draws).numpy())
    pictures = np.concatenate([b["groups"]["image"]["visible"]["value"] for b in whole["image+text"]])
    example = {k: np.concatenate([b["example"][k] for b in whole["image+text"]]) for k in ("source", "index")}
    assert (pictures[:, 0, 0] == example["source"] * 100 + example["index"]).all()  # no picture of another source


def test_progress_is_what_was_drawn(whole):
    data = mixed()
    progress = data.progress(6)
    for number, member in enumerate(data.members):
        drawn = sum((b["example"]["source"] == number).sum() for found in whole.values() for b in found)
        assert progress[f"epochs/{member.name}"] == drawn / len(member.source)
        assert progress[f"share/{member.name}"] == data.share(number)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**12))
def test_draws_are_a_closed_form_of_the_step(step):
    data = mixed()
    for part in data.parts:
        for member in part.members:
            here, after = part.drawn(member, step), part.drawn(member, step + 1)
            assert 0 <= after - here <= part.size
        assert sum(part.drawn(m, step) for m in part.members) == step * part.size


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_hosts_and_resumes_read_the_same_batches(wide, hosts, start):
    def rows_of(host):
        return lambda size: slice(host * size // hosts, (host + 1) * size // hosts)

    by_host = [batches(mixed(16, 4), start=start, rows=rows_of(host)) for host in range(hosts)]
    for name, found in wide.items():
        for number, want in enumerate(found[start:]):
            got = [flat(host[name][number]) for host in by_host]
            for key, value in flat(want).items():
                assert np.array_equal(np.concatenate([g[key] for g in got]), value), key


# -- opening


def two(**changes):
    c = config()
    for name in ("b_words", "a_pairs"):
        c.data.mixture[name] = source_fields()
        c.data.mixture[name].source = "scenes"
    c.data.mixture.b_words.modalities = ("text",)
    c.data.mixture.b_words.weight = 3.0
    apply_overrides(c, [(name, str(value)) for name, value in changes.items()])
    return resolve(c)


def test_a_mixture_is_opened_from_its_config():
    data = open_mixture(two(), 1)
    assert data.names == ("a_pairs", "b_words")
    assert data.members[1].modalities == ("text",) and data.members[data.epoch_source].name == "b_words"
    assert {part.name: part.size for part in data.parts} == {"image+text": 1024, "text": 3072}
    assert [(p.name, p.size) for p in cut_mixture(two(), 4096, 1)] == [("image+text", 1024), ("text", 3072)]
    chosen = open_mixture(two(**{"data.epoch_source": "a_pairs", "data.mixture.a_pairs.weight": 3.0}), 1)
    assert chosen.epoch_source == 0 and chosen.fingerprint != data.fingerprint
    again = open_mixture(resolve(from_json(to_json(two()))), 1)
    assert again.fingerprint == data.fingerprint


def test_a_single_source_is_a_mixture_of_one():
    c = config(**{"data.train.source": "scenes"})
    data = open_mixture(resolve(c), 1)
    assert data.names == () and data.progress(3) == {}
    assert data.fingerprint == data.members[0].source.fingerprint
    assert data.epoch_examples == len(data.members[0].source)
    (part,) = cut_mixture(c, 4096, 1)
    assert (part.name, part.size, part.members) == ("image+text", 4096, (0,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.mixture.a_pairs.modalities": "sound"}, r"data\.mixture\.a_pairs\.modalities='sound'"),
        ({"data.mixture.a_pairs.weight": 0.0}, r"data\.mixture\.a_pairs\.weight=0\.0: must be more than 0"),
        ({"data.epoch_source": "pairs"}, r"data\.epoch_source='pairs'.*a_pairs"),
        ({"data.mixture.a_pairs.captions": "some"}, r"captions='some'"),
    ],
)
def test_mistakes_get_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        two(**changes)


def test_what_a_source_does_not_hold_is_refused(monkeypatch):
    monkeypatch.setattr(mixture_lib, "open_source", lambda *_: Colours(3, TEXT))
    with pytest.raises(UserError, match=r"a_pairs\.modalities=\('image',\), but the source holds only text"):
        open_mixture(two(**{"data.mixture.a_pairs.modalities": "image"}), 1)
    with pytest.raises(UserError, match="trains none of it"):
        open_mixture(two(**{"data.modalities": "image", "data.mixture.b_words.modalities": "text"}), 1)
