"""Quantizers: ids and vectors, the straight-through gradient, a codebook that follows the data and revives its dead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3ae_jax.objectives.parts.quantize import FSQ, VQ, usage

LATENTS = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7, 4)), jnp.float32)


def every(ids: jax.Array) -> jax.Array:
    return jnp.ones(ids.shape, bool)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(2, 8), min_size=1, max_size=5))
def test_fsq_numbers_every_combination_of_levels_once(levels: list[int]) -> None:
    quantizer = FSQ(tuple(levels))
    ids = jnp.arange(quantizer.codes)
    vectors = np.asarray(quantizer.vectors({}, ids))
    assert quantizer.codes == np.prod(levels) == len(np.unique(vectors, axis=0))
    for number, level in enumerate(levels):
        values = np.unique(vectors[:, number])
        assert len(values) == level and values.min() == -1.0 and values.max() == (1.0 if level % 2 else 1 - 2 / level)
    # Latents far out reach the outer levels; what is quantized has its id's vector.
    latents = jnp.asarray(np.random.default_rng(1).normal(size=(1, 500, len(levels))) * 3, jnp.float32)
    quantized = quantizer({}, latents)
    np.testing.assert_allclose(quantized.value, quantizer.vectors({}, quantized.ids), atol=1e-6)
    assert int(quantized.ids.min()) >= 0 and int(quantized.ids.max()) < quantizer.codes
    far = quantizer({}, jnp.full((1, 1, len(levels)), 50.0))
    assert int(far.ids[0, 0]) == quantizer.codes - 1


def test_fsq_rounds_to_the_nearest_level_of_the_bounded_number() -> None:
    """By the paper's formula of an odd and an even number of levels, written out."""
    quantized = FSQ((5, 4))({}, jnp.asarray([[[0.3, 0.0]]]))
    odd = np.round(np.tanh(0.3) * 2 * 1.001) / 2
    half = 1.5 * 1.001
    even = np.round(np.tanh(0.0 + np.arctanh(0.5 / half)) * half - 0.5) / 2
    np.testing.assert_allclose(quantized.value[0, 0], [odd, even], atol=1e-6)


def test_the_gradient_goes_straight_through() -> None:
    weights = jnp.asarray(np.random.default_rng(2).normal(size=LATENTS.shape), jnp.float32)
    vq = VQ(8, 4)
    state = vq.init(jax.random.key(0))
    np.testing.assert_allclose(jax.grad(lambda z: jnp.sum(vq(state, z).value * weights))(LATENTS), weights)
    # FSQ's is that of the bound, as if nothing was rounded.
    fsq = FSQ((5, 5, 5, 5))
    slope = (1 - np.tanh(LATENTS) ** 2) * 2 * 1.001 / 2
    gradient = jax.grad(lambda z: jnp.sum(fsq({}, z).value * weights))(LATENTS)
    np.testing.assert_allclose(gradient, weights * slope, atol=1e-5)


def test_the_codebook_has_no_gradient_and_the_latent_is_drawn_to_its_code() -> None:
    vq = VQ(8, 4)
    state = vq.init(jax.random.key(0))

    def loss(state: dict[str, jax.Array], latents: jax.Array) -> jax.Array:
        quantized = vq(state, latents)
        return jnp.sum(quantized.loss) + jnp.sum(quantized.value)

    assert not np.any(jax.grad(loss)(state, LATENTS)["codes"])
    codes = np.asarray(state["codes"])
    cosine = np.asarray(LATENTS) / np.linalg.norm(LATENTS, axis=-1, keepdims=True) @ codes.T
    quantized = vq(state, LATENTS)
    np.testing.assert_array_equal(quantized.ids, cosine.argmax(-1))
    np.testing.assert_allclose(quantized.loss, ((codes[cosine.argmax(-1)] - LATENTS) ** 2).mean(-1), atol=1e-6)


def test_a_code_follows_the_mean_direction_of_what_it_stands_for() -> None:
    vq = VQ(3, 2, decay=0.9, restart=0.0)
    state = {"codes": jnp.asarray([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), "hits": jnp.asarray([1.0, 2.0, 3.0])}
    latents = jnp.asarray([[[4.0, 1.0], [2.0, -1.0], [0.1, 3.0]]])
    ids = vq(state, latents).ids
    np.testing.assert_array_equal(ids, [[0, 0, 1]])
    after = vq.update(state, vq.sums(latents, ids, every(ids)), latents, every(ids), jax.random.key(0))
    directions = np.asarray(latents[0]) / np.linalg.norm(latents[0], axis=-1, keepdims=True)
    mean = directions[:2].sum(0) / np.linalg.norm(directions[:2].sum(0))
    expected = 0.9 * np.array([1.0, 0.0]) + 0.1 * mean
    np.testing.assert_allclose(after["codes"][0], expected / np.linalg.norm(expected), atol=1e-6)
    np.testing.assert_array_equal(after["codes"][2], state["codes"][2])  # nothing was near
    np.testing.assert_allclose(after["hits"], [0.9 * 1 + 0.2, 0.9 * 2 + 0.1, 0.9 * 3], atol=1e-6)


def test_sums_of_parts_add_up_to_those_of_the_batch() -> None:
    vq = VQ(5, 4)
    ids = vq(vq.init(jax.random.key(1)), LATENTS).ids
    whole = vq.sums(LATENTS, ids, every(ids))
    parts = [vq.sums(LATENTS[i : i + 1], ids[i : i + 1], every(ids[i : i + 1])) for i in range(3)]
    for name, value in whole.items():
        np.testing.assert_allclose(value, sum(part[name] for part in parts), atol=1e-5)


def test_dead_codes_alone_are_replaced_and_the_usage_rises() -> None:
    """All latents lie around four directions, none near the codes that are drawn first."""
    generator = np.random.default_rng(3)
    vq = VQ(16, 8)
    state = vq.init(jax.random.key(2))
    centres = generator.normal(size=(16, 8))
    shares = []
    for step in range(30):
        chosen = centres[generator.integers(0, 16, (8, 16))]
        latents = jnp.asarray(chosen + 0.05 * generator.normal(size=chosen.shape), jnp.float32)
        ids = vq(state, latents).ids
        sums = vq.sums(latents, ids, every(ids))
        shares.append(float(usage(sums["hits"])["share"]))
        before, state = state, vq.update(state, sums, latents, every(ids), jax.random.key(step))
        threshold = 8 * 16 / 16 / 32
        alive = np.asarray(state["hits"]) >= threshold
        near = np.sum(np.asarray(before["codes"]) * np.asarray(state["codes"]), axis=-1)
        assert np.all(near[alive] > 0.9)
    assert shares[-1] > shares[0] and shares[-1] > 0.6


def test_without_cosine_it_is_k_means_with_moving_means() -> None:
    """The nearest by distance; a code is the mean of what it stood for, each latent weighed by its age."""
    vq = VQ(2, 2, cosine=False, decay=0.5, restart=0.0)
    state = {"codes": jnp.asarray([[0.0, 0.0], [10.0, 0.0]]), "hits": jnp.zeros(2)}
    batches = [[[1.0, 0.0], [3.0, 0.0], [9.0, 2.0]], [[2.0, 2.0], [12.0, 0.0], [12.0, 4.0]]]
    total, count = np.zeros((2, 2)), np.zeros(2)
    for batch in batches:
        latents = jnp.asarray([batch])
        ids = vq(state, latents).ids
        distance = ((np.asarray(batch)[:, None] - np.asarray(state["codes"])) ** 2).sum(-1)
        np.testing.assert_array_equal(ids[0], distance.argmin(-1))
        one_hot = np.eye(2)[np.asarray(ids[0])]
        total, count = 0.5 * total + 0.5 * one_hot.T @ np.asarray(batch), 0.5 * count + 0.5 * one_hot.sum(0)
        state = vq.update(state, vq.sums(latents, ids, every(ids)), latents, every(ids), jax.random.key(0))
        np.testing.assert_allclose(state["codes"], total / count[:, None], rtol=1e-5)
        np.testing.assert_allclose(state["hits"], count)


@pytest.mark.parametrize("cosine", [True, False])
def test_padding_moves_no_code_and_becomes_none(cosine: bool) -> None:
    vq = VQ(4, 4, cosine)
    state = vq.init(jax.random.key(0))
    valid = jnp.arange(7)[None] < jnp.asarray([[7], [3], [0]])
    moved = []
    for fill in (0.0, 1e3):
        latents = jnp.where(valid[..., None], LATENTS, fill)
        sums = vq.sums(latents, vq(state, latents).ids, valid)
        assert float(sums["hits"].sum()) == 10
        moved.append(vq.update(state, sums, latents, valid, jax.random.key(1)))
    for name in state:
        np.testing.assert_array_equal(moved[0][name], moved[1][name])
    nothing = jnp.zeros_like(valid)
    after = vq.update(state, vq.sums(LATENTS, vq(state, LATENTS).ids, nothing), LATENTS, nothing, jax.random.key(1))
    np.testing.assert_array_equal(after["codes"], state["codes"])


@pytest.mark.parametrize(
    ("hits", "share", "perplexity"), [([2, 2, 2, 2], 1.0, 4.0), ([5, 0, 0, 0], 0.25, 1.0), ([0] * 4, 0, 1)]
)
def test_usage(hits: list[int], share: float, perplexity: float) -> None:
    figures = usage(jnp.asarray(hits, jnp.float32))
    assert float(figures["share"]) == share and float(figures["perplexity"]) == pytest.approx(perplexity)
