"""The update is that of optax, and can be left out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.errors import UserError
from m3ae_jax.train.optimizer import decay_mask, optimizer, rate_factors

SCHEDULE = optax.linear_schedule(0.1, 0.0, 10)
SHAPES = {"dense": {"kernel": (48, 32), "bias": (32,)}, "scale": ()}


def drawn(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def ours(clip=0.0, dtype="float32"):
    config = config_lib.default()
    config.optimizer.clip_norm, config.optimizer.first_moment_dtype = clip, dtype
    return config.optimizer, optimizer(config, SCHEDULE)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_update_is_that_of_optax(clip, dtype):
    o, chain = ours(clip, dtype)
    plain = optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        optax.adamw(
            SCHEDULE,
            o.b1,
            o.b2,
            mu_dtype=dtype,
            weight_decay=o.weight_decay,
            mask=lambda params: decay_mask(params, tuple(o.no_decay)),
        ),
    )
    params = {"ours": drawn(0), "plain": drawn(0)}
    states = {"ours": chain.init(params["ours"]), "plain": plain.init(params["plain"])}
    update = {"ours": jax.jit(chain.update), "plain": jax.jit(plain.update)}
    for step in range(6):
        for name in params:
            updates, states[name] = update[name](drawn(step + 1), states[name], params[name])
            params[name] = optax.apply_updates(params[name], updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), params["ours"], params["plain"])
    moments = [optax.tree.get(states[name], "mu") for name in params]
    assert jax.tree.map(lambda x: x.dtype.name, moments[0]) == jax.tree.map(lambda x: dtype, moments[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_fine_leaves_the_state_as_it_was(bad, dtype):
    _, chain = ours(1.0, dtype)
    params, update = drawn(0), jax.jit(chain.update)
    _, state = update(drawn(1), chain.init(params), params)
    _, same = update(jax.tree.map(lambda g: g * bad, drawn(2)), state, params, fine=jnp.bool_(False))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, state, same)))
    _, other = update(drawn(2), state, params, fine=jnp.bool_(True))
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, state, other)))


def test_rates_of_parts_scale_the_update_and_a_frozen_part_stays_bit_for_bit():
    config = config_lib.default()
    params, grads = drawn(0), drawn(1)
    plain = optimizer(config, SCHEDULE)
    config.optimizer.rates = ("dense=0.5", "dense/bias=0")
    scaled = optimizer(config, SCHEDULE)
    want, _ = plain.update(grads, plain.init(params), params)
    got, _ = scaled.update(grads, scaled.init(params), params)
    np.testing.assert_allclose(got["dense"]["kernel"], 0.5 * want["dense"]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(got["dense"]["bias"], 0.0)
    np.testing.assert_array_equal(got["scale"], want["scale"])
    assert rate_factors(params, ("dense=2",)) == {"dense": {"kernel": 2.0, "bias": 2.0}, "scale": 1.0}


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        (("dense=0", "dense=1"), "optimizer.rates: 'dense' is there twice"),
        (("dens=0.5",), "optimizer.rates='dens' is not one of dense, scale; did you mean 'dense'"),
        (("dense/kernl=0",), "did you mean 'dense/kernel'"),
    ],
)
def test_rates_of_parts_that_do_not_exist_are_refused_with_the_nearest(rates, message):
    with pytest.raises(UserError, match=message):
        rate_factors(drawn(0), rates)


@pytest.mark.parametrize("rate", ["dense", "dense=fast", "dense=-1", "=1", "dense=nan"])
def test_rates_that_are_none_are_refused(rate):
    config = config_lib.load("configs/tiny.py")
    config.optimizer.rates = (rate,)
    with pytest.raises(UserError, match="is not PATH=FACTOR"):
        config_lib.resolve(config)
