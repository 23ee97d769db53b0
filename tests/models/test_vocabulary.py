"""The blockwise cross-entropy equals the dense one, and never holds all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from m3ae_jax.models.vocabulary import cross_entropy

BATCH, SLOTS, WIDTH, WORDS = 3, 5, 8, 41


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (BATCH, SLOTS, WIDTH))
    kernel = jax.random.normal(keys[1], (WIDTH, WORDS))
    bias = 3 * jax.random.normal(keys[2], (WORDS,))
    labels = jax.random.randint(keys[3], (BATCH, SLOTS), 0, WORDS)
    labels = labels.at[0].set(jnp.argmax(x[0] @ kernel + bias, axis=-1))  # some right answers
    return x, kernel, bias, labels


@functools.partial(jax.jit, static_argnames="blocks")
def loss_and_gradients(x, kernel, bias, labels, blocks):
    weights = jnp.arange(BATCH * SLOTS, dtype=jnp.float32).reshape(BATCH, SLOTS)

    def loss(x, kernel, bias):
        words = cross_entropy(x, kernel, bias, labels, blocks)
        return jnp.sum(words.loss * weights), words

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x, kernel, bias)


@pytest.mark.parametrize("blocks", [2, 4, 7, 41, 60])
def test_blocks_change_nothing(inputs, blocks):
    (_, dense), gradients = loss_and_gradients(*inputs, blocks=1)
    (_, words), got = loss_and_gradients(*inputs, blocks=blocks)
    assert np.allclose(words.loss, dense.loss, rtol=1e-6, atol=1e-6)
    correct = words.best == inputs[3]
    assert np.array_equal(words.best, dense.best) and correct[0].all() and not correct.all()
    for a, b in zip(got, gradients, strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)


def test_large_logits_stay_finite(inputs):
    x, kernel, bias, labels = inputs
    x = 1e4 * x
    labels = labels.at[0].set(jnp.argmax(x[0] @ kernel + bias, axis=-1))
    (_, words), gradients = loss_and_gradients(x, kernel, bias, labels, blocks=4)
    assert np.isfinite(words.loss).all() and all(np.isfinite(g).all() for g in gradients)
    assert not np.asarray(words.loss[0]).any()


def test_bfloat16_features_get_bfloat16_gradients(inputs):
    x, kernel, bias, labels = inputs
    (_, words), (dx, dkernel, _) = loss_and_gradients(x.astype(jnp.bfloat16), kernel, bias, labels, blocks=4)
    assert words.loss.dtype == jnp.float32 and dx.dtype == jnp.bfloat16 and dkernel.dtype == jnp.float32


def sizes(jaxpr):
    """Entries of every array that a program makes, its inner programs' too."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval.size
        for inner in jaxprs_in_params(equation.params):
            yield from sizes(inner)


def test_no_array_holds_all_logits(inputs):
    all_logits = BATCH * SLOTS * WORDS
    make = jax.make_jaxpr(loss_and_gradients, static_argnums=4)
    assert max(sizes(make(*inputs, 1).jaxpr)) >= all_logits
    assert max(sizes(make(*inputs, 4).jaxpr)) < all_logits
