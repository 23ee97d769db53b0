"""Latent targets: normalised, never a way for the gradient, and watched for collapse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3ae_jax.objectives.batch import mean, row_total
from m3ae_jax.objectives.parts.latents import absolute_error, collapse_monitors, normalized, sinkhorn, squared_error

B, K, D = 4, 6, 8


def features(seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(2.0, 3.0, (B, K, D)).astype(np.float32))


def figures(x: jax.Array, valid: jax.Array) -> dict[str, float]:
    return {name: float(mean(*term)) for name, term in collapse_monitors(x, valid).items()}


def test_targets_are_normalised_as_said() -> None:
    x = features()
    layer = np.asarray(normalized(x, "layer_norm"))
    np.testing.assert_allclose(layer.mean(-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(layer.std(-1), 1.0, rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(normalized(x, "l2"), axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(normalized(x, "none"), x)


@pytest.mark.parametrize(("error", "of"), [(squared_error, np.square), (absolute_error, np.abs)])
def test_errors_are_means_over_channels_without_a_gradient_to_the_target(error, of) -> None:
    a, b = features(1), features(2)
    np.testing.assert_allclose(error(a, b), of(np.asarray(a - b)).mean(-1), rtol=1e-5)
    to_prediction, to_target = jax.grad(lambda p, t: error(p, t).sum(), argnums=(0, 1))(a, b)
    assert np.asarray(to_prediction).any() and not np.asarray(to_target).any()


def test_only_masked_slots_count_and_none_costs_nothing() -> None:
    a, b = features(1), features(2)
    valid = jnp.asarray(np.random.default_rng(3).random((B, K)) < 0.5)
    loss = mean(*(x.sum() for x in row_total(squared_error(a, b), valid, "token")))
    changed = jnp.where(valid[..., None], a, a + 100.0)
    assert float(loss) == float(mean(*(x.sum() for x in row_total(squared_error(changed, b), valid, "token"))))
    moved = jnp.where(valid[..., None], a + 1.0, a)
    assert float(loss) != float(mean(*(x.sum() for x in row_total(squared_error(moved, b), valid, "token"))))
    none = jnp.zeros_like(valid)
    assert float(mean(*(x.sum() for x in row_total(squared_error(a, b), none, "token")))) == 0.0


def test_monitors_tell_spread_targets_from_collapsed_ones() -> None:
    valid = jnp.ones((B, K), bool)
    spread = figures(features(), valid)
    flat = np.asarray(features()).reshape(-1, D).astype(np.float64)
    assert np.isclose(spread["deviation"], flat.std(0).mean(), rtol=1e-4)
    covariance = np.cov(flat.T, bias=True)
    assert np.isclose(spread["rank"], np.trace(covariance) ** 2 / np.trace(covariance @ covariance), rtol=1e-4)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    cosine = (unit @ unit.T)[~np.eye(B * K, dtype=bool)].mean()
    assert np.isclose(spread["cosine"], cosine, rtol=1e-4)
    point = figures(jnp.ones((B, K, D)), valid)
    assert point["deviation"] < 1e-6 and point["cosine"] > 0.999
    line = figures(features()[..., :1] * jnp.arange(1.0, D + 1), valid)
    assert np.isclose(line["rank"], 1.0, atol=1e-3)


def test_monitors_do_not_see_padding() -> None:
    x, valid = features(), jnp.arange(K) < jnp.asarray([6, 4, 0, 1])[:, None]
    a, b = figures(x, valid), figures(jnp.where(valid[..., None], x, 1e3), valid)
    assert a == b and figures(x, jnp.zeros_like(valid)) == dict.fromkeys(a, 0.0)


def test_sinkhorn_uses_all_clusters_alike() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)) * 4 + jnp.arange(6.0) * 3
    valid = jnp.arange(60) < 48
    assigned = np.asarray(sinkhorn(logits, valid, rounds=30))
    np.testing.assert_allclose(assigned[:48].sum(1), 1.0, rtol=1e-5)
    assert not assigned[48:].any()
    np.testing.assert_allclose(assigned.sum(0), 8.0, rtol=0.05)
    assert jax.nn.softmax(logits)[:48].sum(0).max() > 30  # without it one cluster takes all
