"""The decoder whose target tokens attend to the visible ones alone, and steps that restore a share of the patches."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.data.order import RandomStream
from m3ae_jax.data.pipeline import masked
from m3ae_jax.errors import UserError
from m3ae_jax.objectives.base import build
from m3ae_jax.train.flops import flops_per_example

VOCABULARY = 50


def small(**fields):
    c = config_lib.default()
    c.data.image_size, c.data.patch_size, c.data.max_text_tokens, c.data.tokenizer = 32, 8, 16, "scenes"
    c.model.update(width=16, depth=1, heads=2)
    c.m3ae.update(decoder_width=16, decoder_depth=2, decoder_heads=2)
    c.batch_size = 3
    for name, value in fields.items():
        next(group for group in (c.model, c.m3ae, c.compute) if name in group)[name] = value
    return config_lib.resolve(c)


@functools.cache
def made(**fields):
    """An objective, parameters away from their start, and a part of a batch."""
    objective = build(small(**fields), VOCABULARY)
    rng = np.random.default_rng(0)
    fresh = nn.unbox(jax.jit(objective.init)(jax.random.key(0)))
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), fresh)
    return objective, params, part_of(objective.groups)


def part_of(groups):
    """Three examples with captions of 5, 16 and 9 words, masked."""
    rng = np.random.default_rng(0)
    image, text = (group.modalities[0] for group in groups)
    patches = rng.integers(0, 256, (3, image.tokens, image.features), dtype=np.uint8)
    words = rng.integers(0, text.vocabulary, (3, text.tokens), dtype=np.int32)
    tokens = {
        "image": (patches, np.ones((3, image.tokens), bool)),
        "text": (words, np.arange(text.tokens) < np.array([[5], [16], [9]])),
    }
    streams = [RandomStream(0, draw) for draw in range(3)]
    return {"groups": {group.name: masked(group, streams, tokens) for group in groups}}


def fewer(batch, keep):
    """The batch with the first `keep` target patches of each example."""
    image = batch["groups"]["image"]
    target = {name: x[:, :keep] for name, x in image["target"].items()}
    return {**batch, "groups": {**batch["groups"], "image": {**image, "target": target}}}


@pytest.mark.parametrize(("kind", "same"), [("cross", True), ("self", False)])
def test_a_target_does_not_depend_on_the_others_if_it_attends_to_the_visible_alone(kind, same):
    objective, params, batch = made(decoder_attention=kind)
    predict = jax.jit(objective.predict)
    whole, part = predict(params, batch), predict(params, fewer(batch, 5))
    assert whole["image"].shape == (3, 12, 192) and part["image"].shape == (3, 5, 192)
    assert np.allclose(whole["image"][:, :5], part["image"], atol=1e-5) == same
    assert np.allclose(whole["text"], part["text"], atol=1e-5) == same


def test_the_cross_decoder_reads_no_padding_and_every_visible_token():
    objective, params, batch = made(decoder_attention="cross")
    predict = jax.jit(objective.predict)
    text = batch["groups"]["text"]["visible"]
    row = int(np.argmin(text["valid"].sum(1)))
    before = predict(params, batch)["image"]

    def changed(slot):
        value = text["value"].copy()
        value[row, slot] = (value[row, slot] + 1) % VOCABULARY
        groups = {**batch["groups"], "text": {**batch["groups"]["text"], "visible": {**text, "value": value}}}
        return np.abs(np.array(predict(params, {**batch, "groups": groups})["image"] - before)).max(axis=(1, 2))

    assert not text["valid"][row, -1] and not changed(-1).any()
    assert changed(0)[row] > 1e-6 and not np.delete(changed(0), row).any()


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_a_step_restores_another_share_of_the_patches_each_time(kind):
    objective, params, batch = made(decoder_attention=kind, image_target_share=0.25)
    share = jax.jit(lambda seed: objective._restored_share(batch, jax.random.key(seed))["groups"]["image"]["target"])
    shares = [jax.device_get(share(seed)) for seed in range(40)]
    hidden = batch["groups"]["image"]["target"]
    seen = set()
    for target in shares:
        assert target["value"].shape == (3, 3, 192) and target["valid"].all()
        for row in range(3):
            places = target["position"][row].tolist()
            assert len(set(places)) == 3
            seen |= set(places) if row == 0 else set()
            where = [hidden["position"][row].tolist().index(place) for place in places]
            np.testing.assert_array_equal(target["value"][row], hidden["value"][row][where])
    assert seen == set(hidden["position"][0].tolist())  # each comes in its turn
    # Without a key, as in validation and pictures, all are restored.
    assert objective._restored_share(batch, None) is batch
    output = jax.jit(lambda key: objective.loss(params, {}, batch, key, jnp.int32(0)))(jax.random.key(0))
    assert output.terms["image_loss"][1] == 3 and np.isfinite(output.terms["image_loss"][0])


@pytest.mark.slow
def test_of_the_shares_mean_loss_is_the_whole_loss_if_targets_do_not_depend_on_each_other():
    objective, params, batch = made(decoder_attention="cross", image_target_share=0.25)

    def loss(key):
        return objective.loss(params, {}, batch, key, jnp.int32(0)).terms["image_loss"][0]

    some = np.array(jax.jit(jax.vmap(loss))(jax.random.split(jax.random.key(7), 400)))
    assert some.std() > 0
    assert abs(some.mean() - loss(None)) < 4 * some.std() / np.sqrt(len(some))


def test_what_is_not_asked_is_not_computed():
    at = {
        (kind, share): flops_per_example(small(decoder_attention=kind, image_target_share=share), VOCABULARY)
        for kind in ("self", "cross")
        for share in (1.0, 0.25)
    }
    assert at["self", 1.0] > at["cross", 1.0] > at["cross", 0.25]
    assert at["self", 1.0] > at["self", 0.25] > at["cross", 0.25]


def test_a_wrong_decoder_is_told():
    with pytest.raises(UserError, match=r"m3ae\.decoder_attention='crossed' is not one of .*did you mean 'cross'"):
        small(decoder_attention="crossed")
    with pytest.raises(UserError, match=r"m3ae\.image_target_share"):
        small(image_target_share=0.0)
