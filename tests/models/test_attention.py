"""Attention by groups of heads equals attention at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3ae_jax.models.attention import attend

BATCH, HEADS, TOKENS, CHANNELS = 2, 4, 6, 8


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(1), 3)
    query, key, value = (jax.random.normal(k, (BATCH, HEADS, TOKENS, CHANNELS)) for k in keys)
    return query, key, value, jnp.arange(TOKENS) < jnp.array([[6], [4]])


def output_and_gradients(query, key, value, valid, **options):
    def loss(*qkv):
        mixed = attend(*qkv, valid, **options)
        return jnp.sum(jnp.sin(mixed)), mixed

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, value)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_of_heads_change_nothing(inputs, groups):
    (_, want), gradients = output_and_gradients(*inputs)
    (_, got), found = output_and_gradients(*inputs, head_groups=groups)
    assert np.allclose(got, want, atol=1e-6)
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(found, gradients, strict=True))


def test_padding_is_no_key(inputs):
    query, key, value, valid = inputs
    changed = attend(query, key.at[1, :, 4:].add(9.0), value.at[1, :, 4:].add(9.0), valid, head_groups=2)
    assert np.array_equal(changed, attend(query, key, value, valid, head_groups=2))


def test_dropout_draws_for_each_group(inputs):
    query, key, value, valid = inputs
    value = jnp.ones_like(value)
    mixed = attend(query, key, value, valid, head_groups=4, dropout=0.5, rng=jax.random.key(0))
    assert not np.allclose(mixed[:, 0], mixed[:, 1])
    assert np.array_equal(mixed, attend(query, key, value, valid, head_groups=4, dropout=0.5, rng=jax.random.key(0)))
    assert np.allclose(attend(query, key, value, valid, head_groups=4), 1.0)
