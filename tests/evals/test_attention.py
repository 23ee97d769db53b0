"""Attention between words and patches: weights against NumPy, figures against loops, and the marks in the picture."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.tree_util import keystr

from m3ae_jax import config as config_lib
from m3ae_jax.errors import UserError
from m3ae_jax.evals import attention
from m3ae_jax.evals.attention import Pairs
from m3ae_jax.evals.clean import clean_batches
from m3ae_jax.evals.run import check_objective
from m3ae_jax.models import attention as kernels
from m3ae_jax.models.embeddings import sincos_1d, sincos_2d
from m3ae_jax.objectives.base import build
from m3ae_jax.parallel.mesh import make_mesh
from m3ae_jax.report import pictures
from m3ae_jax.train import setup as run_setup

pytestmark = pytest.mark.usefixtures("one_device")

ATTENTION = "encoder/transformer/blocks/attention/"


def config(**changes):
    c = config_lib.load("configs/tiny.py")
    c.model.width, c.model.depth, c.model.heads, c.m3ae.decoder_depth = 16, 2, 4, 1
    c.m3ae.decoder_heads = 4
    c.data.image_size = 24
    c.eval.batch_size, c.eval.attention.examples, c.eval.attention.pictures = 4, 6, 2
    c.evals = ("attention",)
    config_lib.apply_overrides(c, [(k, str(v)) for k, v in changes.items()])
    return config_lib.resolve(c)


@pytest.fixture(scope="module")
def setup():
    return run_setup.prepare(config())


@pytest.fixture(scope="module")
def state(setup):
    """Fresh, but with positions that tell patches from each other enough for uneven attention."""
    state = setup.init_state()

    def grown(path, x):
        return x * 3.0 if keystr(path, simple=True, separator="/").startswith(ATTENTION) else x

    return state.replace(params=jax.tree_util.tree_map_with_path(grown, state.params))


@pytest.fixture(scope="module")
def batch(setup):
    return {"groups": next(clean_batches(setup, setup.val_source, 4))["groups"]}


@pytest.fixture(scope="module")
def pairs(setup, state):
    return attention.read(setup, state)


def whole(weights):
    """The blocks put together again, `[B, N, N]`."""
    names = ("cls", "image", "text")
    return np.concatenate([np.concatenate([weights[a][b] for b in names], axis=2) for a in names], axis=1)


def first_layer(setup, params, batch):
    """The first layer's weights `[B, N, N]`, in NumPy and float64 from the parameters."""
    p, data = jax.tree.map(lambda x: np.asarray(x, np.float64), params["encoder"]), setup.config.data
    image, text = (batch["groups"][name]["visible"] for name in ("image", "text"))
    pixels = (image["value"] / 255 - np.tile(data.image_mean, 64)) / np.tile(data.image_std, 64)
    of_patch, of_word = p["image"]["embedding"], p["text"]["embedding"]["embedding"]
    patches = pixels @ of_patch["kernel"] + of_patch["bias"] + np.asarray(sincos_2d(16, (3, 3)))
    words = of_word[text["value"]] + np.asarray(sincos_1d(16, np.arange(16)))[text["position"]]
    patches, words = patches + p["image"]["type_embedding"], words + p["text"]["type_embedding"]
    x = np.concatenate([np.broadcast_to(p["cls_token"], (len(patches), 1, 16)), patches, words], axis=1)
    block = jax.tree.map(lambda leaf: leaf[0], p["transformer"]["blocks"])
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = x * block["norm_attention"]["scale"] + block["norm_attention"]["bias"]
    q, k, _ = np.einsum("bnd,dthc->tbhnc", x, block["attention"]["qkv"]["kernel"]) + np.expand_dims(
        block["attention"]["qkv"]["bias"], (1, 3)
    )
    logits = np.einsum("bhqc,bhkc->bhqk", q, k) / np.sqrt(4)
    valid = np.concatenate([np.ones((len(x), 1), bool), image["valid"], text["valid"]], axis=1)
    e = np.exp(logits - logits.max(-1, keepdims=True)) * valid[:, None, None]
    return (e / e.sum(-1, keepdims=True)).mean(axis=1)


def test_weights_are_those_of_the_parameters(setup, state, batch):
    found = jax.jit(setup.objective.attention, static_argnums=2)(state.params, batch, 0)
    np.testing.assert_allclose(whole(found), first_layer(setup, state.params, batch), atol=1e-5)
    last = jax.jit(setup.objective.attention)(state.params, batch)
    again = jax.jit(setup.objective.attention, static_argnums=2)(state.params, batch, 1)
    assert {a: {b: x.shape for b, x in row.items()} for a, row in last.items()} == {
        a: {b: (4, n, m) for b, m in (("cls", 1), ("image", 9), ("text", 16))}
        for a, n in (("cls", 1), ("image", 9), ("text", 16))
    }
    np.testing.assert_array_equal(whole(last), whole(again))
    assert np.abs(whole(last) - whole(found)).max() > 0.01


def test_rows_sum_to_one_and_padding_is_not_looked_at(setup, state, batch):
    found = jax.jit(setup.objective.attention)(state.params, batch)
    padding = ~batch["groups"]["text"]["visible"]["valid"]
    assert padding.any() and not padding.all()
    np.testing.assert_allclose(whole(found).sum(axis=-1), 1.0, atol=1e-5)
    for asking in ("cls", "image", "text"):
        by_padding = np.asarray(found[asking]["text"]).swapaxes(1, 2)[padding]
        assert not by_padding.any()
    alone = setup.objective.attention(state.params, {"groups": {"image": batch["groups"]["image"]}})
    assert set(alone) == {"cls", "image"} == set(alone["cls"]) and alone["image"]["image"].shape == (4, 9, 9)


@pytest.mark.parametrize(
    "changes",
    [
        {"compute.unroll": "false"},
        {"compute.remat": "full", "compute.unroll": "false"},
        {"compute.attention_head_groups": 2},
        {"compute.attention": "cudnn"},
        {"compute.attention": "flash"},
    ],
)
def test_however_it_is_computed_the_weights_are_the_same(setup, state, batch, changes, monkeypatch):
    def plain(query, key, value, valid, causal):  # in place of kernels that a CPU lacks
        assert not causal
        return kernels.mix(kernels.weights(query, key, valid), value)

    monkeypatch.setattr(kernels, "_cudnn", plain)
    monkeypatch.setattr(kernels, "_flash", plain)
    other = build(config(**changes), setup.tokenizer.vocab_size)
    found, wanted = (jax.jit(o.attention)(state.params, batch) for o in (other, setup.objective))
    np.testing.assert_allclose(whole(found), whole(wanted), atol=1e-5)


# --- figures


def test_every_pair_is_asked_once(setup, state, pairs):
    assert len(pairs.ids) == 6, "of batches of four"
    batch = next(clean_batches(setup, setup.val_source, 6, size=6))
    visible = batch["groups"]["text"]["visible"]
    np.testing.assert_array_equal(pairs.ids, visible["value"])
    wanted = jax.jit(setup.objective.attention)(state.params, {"groups": batch["groups"]})
    real = visible["valid"]
    np.testing.assert_allclose(
        pairs.weights["text"]["image"][real], np.asarray(wanted["text"]["image"])[real], atol=1e-5
    )
    assert not pairs.weights["text"]["image"][~real].any()


def test_figures_against_loops(pairs):
    for asking, asked in (("text", "image"), ("image", "text"), ("cls", "text"), ("text", "text")):
        shares, entropies = [], []
        for i in range(len(pairs.ids)):
            rows = pairs.weights[asking][asked][i][pairs.valid[asking][i]][:, pairs.valid[asked][i]]
            shares.append(np.mean([row.sum() for row in rows]))
            entropies.append(np.mean([-(row / row.sum() * np.log(row / row.sum())).sum() for row in rows]))
        found = attention.measured(pairs, asking, asked)
        assert found["share"] == pytest.approx(np.mean(shares)) and found["entropy"] == pytest.approx(
            np.mean(entropies)
        )
        assert found["entropy"] <= found["even_entropy"] + 1e-9


def test_even_attention_has_the_even_share_and_entropy():
    text = np.arange(4) < np.array([[4], [1]])
    valid = {"cls": np.ones((2, 1), bool), "image": np.ones((2, 3), bool), "text": text}
    every = sum(x.sum(axis=1) for x in valid.values())[:, None, None]
    weights = {a: {b: valid[a][:, :, None] * valid[b][:, None] / every for b in valid} for a in valid}
    found = attention.measured(Pairs(weights, np.zeros((2, 3, 1)), np.zeros((2, 4)), valid), "image", "text")
    assert found["share"] == pytest.approx(np.mean([4 / 8, 1 / 5])) == found["even_share"]
    assert found["entropy"] == pytest.approx(np.log(4) / 2) == found["even_entropy"]


def test_evaluation(setup, state, pairs):
    found = attention.evaluate(setup, state)
    assert all(np.isfinite(value) for value in found.scalars.values()) and found.scalars["attention/n"] == 6
    to = [found.scalars[f"attention/text_to_{asked}/share"] for asked in ("image", "text")]
    to_cls = attention.measured(pairs, "text", "cls")["share"]
    assert sum(to) + to_cls == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(attention.evaluate(setup, state).pictures["maps"], found.pictures["maps"])
    other = run_setup.prepare(config(**{"eval.attention.layer": 0, "eval.attention.pictures": 0}))
    first = attention.evaluate(other, state)
    assert first.scalars["attention/n"] == 6 and first.pictures == {}
    assert first.scalars["attention/text_to_image/share"] != pytest.approx(to[0], abs=1e-4)


@pytest.mark.slow
def test_eight_devices_say_the_same(setup, state, pairs, monkeypatch):
    monkeypatch.setattr(run_setup, "make_mesh", make_mesh)
    many = run_setup.prepare(config(batch_size=64, **{"mesh.preset": "fsdp"}))
    assert many.mesh.size == 8
    params = jax.tree.map(
        lambda x, like: jax.device_put(np.asarray(x), like.sharding), state.params, many.abstract_state().params
    )
    found = attention.evaluate(many, many.init_state().replace(params=params)).scalars
    for name, value in attention.evaluate(setup, state).scalars.items():
        assert found[name] == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize("layer", [2, -3])
def test_a_layer_that_is_not_there_is_told(setup, layer):
    other = dataclasses.replace(setup, config=config(**{"eval.attention.layer": layer}))
    with pytest.raises(UserError, match=rf"eval\.attention\.layer={layer}: the encoder has 2, 0 to 1, or -1") as error:
        check_objective(other)
    assert "\n" not in str(error.value)


# --- what is drawn


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([" a", " straw", "berry", " ", "x"], [("a", [0]), ("strawberry", [1, 2]), ("x", [3, 4])]),
        (["a", "straw", "##berr", "##ies", "."], [("a", [0]), ("strawberries", [1, 2, 3]), (".", [4])]),
        (["berry", " x"], [("berry", [0]), ("x", [1])]),
        ([], []),
    ],
)
def test_pieces_make_words(pieces, words):
    assert attention.whole_words(pieces) == words


def test_the_longest_words_are_drawn():
    assert attention.longest(["a", "green", "triangle", "above", "a", "green", "circle"]) == [2, 6]
    assert attention.longest(["green", "green", "blue!!!", "dog"]) == [0, 2], "none twice; signs are no letters"
    assert attention.longest(["a"]) == [0]


def known(setup, pairs):
    """The first pair, whose words look at patch 5 most and patch 5 at the second word."""
    length = int(pairs.valid["text"][0].sum())
    to_image, to_text = np.full((1, 16, 9), 0.01), np.full((1, 9, 16), 0.01)
    to_image[0, :, 5], to_image[0, 0, 2] = 0.3, 0.4  # one word alone looks at patch 2 more
    to_text[0, 5, 1] = 0.5
    one = {name: valid[:1] for name, valid in pairs.valid.items()}
    weights = {"text": {"image": to_image * one["text"][..., None]}, "image": {"text": to_text * one["text"][:, None]}}
    assert length >= 3
    return Pairs(weights, pairs.patches[:1], pairs.ids[:1], one)


def test_the_patch_that_words_look_at_is_marked(setup, pairs):
    row = attention.attended(setup, known(setup, pairs), 0)
    assert row.patch == 5 and row.to_words.argmax() == 1 and row.to_words.sum() == pytest.approx(1)
    assert len(row.to_patches) == 2 and all(
        share.argmax() == 5 or number == 0 for number, share in row.to_patches.items()
    )
    assert all(share.sum() == pytest.approx(1) for share in row.to_patches.values())
    assert " ".join(row.words) == setup.tokenizer.decode(pairs.ids[0][pairs.valid["text"][0]])
    marked = np.asarray(pictures._marked(row)).astype(int)
    plain = np.asarray(pictures._fit(row.picture, pictures._ATTENTION_CELL)).astype(int)
    ys, xs = np.nonzero((marked != plain).any(axis=-1))
    side = pictures._ATTENTION_CELL / 3  # patch 5 is the last of the second row
    np.testing.assert_allclose(
        [ys.min(), ys.max() + 1, xs.min(), xs.max() + 1], [side, 2 * side, 2 * side, 3 * side], atol=1.5
    )


def test_heat_lies_on_its_patch():
    share = np.full(12, 0.02)
    share[7] = 0.78  # of three rows of four: second row, last column
    grey = np.full((48, 48, 3), 99, np.uint8)
    grey[:4] = 0
    grey[-4:] = 255
    heat = np.asarray(pictures.heated(grey, share, (3, 4))).astype(int)
    dark = heat.sum(axis=-1) < heat.sum(axis=-1).mean() / 2
    ys, xs = np.nonzero(dark)
    high, wide = pictures._ATTENTION_CELL / 3, pictures._ATTENTION_CELL / 4
    np.testing.assert_allclose(
        [ys.min(), ys.max() + 1, xs.min(), xs.max() + 1], [high, 2 * high, 3 * wide, 4 * wide], atol=1.5
    )
