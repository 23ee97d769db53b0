"""Attention by groups of heads equals attention at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from m3ae_jax.models.attention import attend
from m3ae_jax.models.transformer import REMAT

BATCH, HEADS, TOKENS, CHANNELS = 2, 4, 6, 8


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(1), 3)
    query, key, value = (jax.random.normal(k, (BATCH, HEADS, TOKENS, CHANNELS)) for k in keys)
    return query, key, value, jnp.arange(TOKENS) < jnp.array([[6], [4]])


@functools.partial(jax.jit, static_argnames=("real", "head_groups", "kernel"))
def output_and_gradients(query, key, value, valid, real=False, **options):
    """With `real`, what is made of padding does not count."""

    def loss(*qkv):
        mixed = attend(*qkv, valid, **options)
        mixed = mixed * valid[:, None, :, None] if real else mixed
        return jnp.sum(jnp.sin(mixed)), mixed

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, value)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_of_heads_change_nothing(inputs, groups):
    (_, want), gradients = output_and_gradients(*inputs)
    (_, got), found = output_and_gradients(*inputs, head_groups=groups)
    assert np.allclose(got, want, atol=1e-6)
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(found, gradients, strict=True))


@pytest.mark.parametrize("remat", ["attention", "full"])
def test_attention_is_computed_anew_only_where_asked(inputs, remat):
    query, key, value, valid = inputs

    def loss(q):
        mixed = attend(q, key, value, valid, head_groups=2)
        return jnp.sum(jnp.sin(mixed))

    again = jax.checkpoint(loss, policy=REMAT[remat])
    assert np.allclose(jax.grad(again)(query), jax.grad(loss)(query), atol=1e-6)
    text = str(jax.make_jaxpr(jax.grad(again))(query))
    # The running maximum belongs to the forward pass alone.
    assert text.count("reduce_max") == {"attention": 1, "full": 2}[remat]


def test_flash_equals_xla_on_real_tokens(inputs):
    with pltpu.force_tpu_interpret_mode():
        (_, got), found = output_and_gradients(*inputs, real=True, kernel="flash")
    (_, want), gradients = output_and_gradients(*inputs, real=True)
    assert np.allclose(got, want, atol=1e-5)
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(found, gradients, strict=True))


@pytest.fixture(scope="module")
def apart():
    """Tokens that ask others: five ask six, of which the second example has four."""
    keys = jax.random.split(jax.random.key(2), 3)
    query, key, value = (
        jax.random.normal(k, (BATCH, HEADS, count, CHANNELS)) for k, count in zip(keys, (5, 6, 6), strict=True)
    )
    return query, key, value, jnp.arange(6) < jnp.array([[6], [4]])


@pytest.mark.parametrize("options", [{"head_groups": 2}, {"kernel": "flash"}])
def test_tokens_attend_to_a_context_of_another_length(apart, options):
    (_, want), gradients = output_and_gradients(*apart)
    assert want.shape == (BATCH, HEADS, 5, CHANNELS)
    with pltpu.force_tpu_interpret_mode():
        (_, got), found = output_and_gradients(*apart, **options)
    assert np.allclose(got, want, atol=1e-5)
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(found, gradients, strict=True))


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
