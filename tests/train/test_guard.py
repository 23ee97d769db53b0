"""Which steps are skipped, and that a skipped step changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.objectives.base import LossOutput
from m3ae_jax.train import guard as guards
from m3ae_jax.train.guard import FINE, NOT_FINITE, SPIKE, WINDOW
from m3ae_jax.train.optimizer import optimizer
from m3ae_jax.train.step import TrainState, train_step

judge = jax.jit(guards.judge, static_argnums=3)
after = jax.jit(guards.after)


def follow(guard, losses, spike=10.0, norm=1.0):
    verdicts = []
    for loss in losses:
        verdict = judge(guard, jnp.float32(loss), jnp.float32(norm), spike)
        guard = after(guard, jnp.float32(loss), verdict)
        verdicts.append(int(verdict))
    return guard, verdicts


@pytest.fixture(scope="module")
def settled():
    losses = np.random.default_rng(0).normal(2.0, 0.1, WINDOW)
    guard, verdicts = follow(guards.fresh(), losses)
    assert set(verdicts) == {FINE}
    return guard


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_skipped_from_the_first_step_on(bad):
    guard, verdicts = follow(guards.fresh(), [bad, 1.0, bad, bad])
    assert verdicts == [NOT_FINITE, FINE, NOT_FINITE, NOT_FINITE]
    assert (int(guard.accepted), int(guard.skipped), int(guard.in_a_row)) == (1, 3, 2)
    assert np.isfinite(guard.losses).all()
    assert follow(guards.fresh(), [1.0], norm=bad)[1] == [NOT_FINITE]


def test_a_spike_is_far_above_the_recent_losses(settled):
    mean, std = float(jnp.mean(settled.losses)), float(jnp.std(settled.losses))
    assert follow(settled, [mean + 9 * std])[1] == [FINE]
    assert follow(settled, [mean + 11 * std])[1] == [SPIKE]
    assert follow(settled, [-100.0])[1] == [FINE]  # good news
    assert follow(settled, [1e6], spike=0.0)[1] == [FINE]


def test_a_spike_does_not_enter_the_distribution(settled):
    guard, verdicts = follow(settled, [100.0] * 5 + [2.0])
    assert verdicts == [SPIKE] * 5 + [FINE]
    assert int(guard.in_a_row) == 0 and float(guard.losses.max()) < 3


def test_before_a_window_is_full_nothing_is_a_spike():
    _, verdicts = follow(guards.fresh(), [2.0] * (WINDOW - 1) + [1e6])
    assert set(verdicts) == {FINE}


def test_a_loss_that_hardly_varies_may_ripple():
    guard, _ = follow(guards.fresh(), [2.0] * WINDOW)
    assert follow(guard, [2.1])[1] == [FINE]
    assert follow(guard, [2.5])[1] == [SPIKE]


class Toy:
    """A loss that is the batch's number times the parameter's square; `extra` counts updates."""

    couples_examples = chunked = False

    def __init__(self):
        self.term_weights = {"toy_loss": 1.0}

    def loss(self, params, extra, part, rng, step):
        total = jnp.sum(part["x"]) * jnp.sum(jnp.square(params["w"]))
        return LossOutput({"toy_loss": (total, jnp.float32(part["x"].shape[0]))}, {})

    def update_extra(self, extra, params, rows, sums, step):
        return {"updates": extra["updates"] + 1, "mean": 0.9 * extra["mean"] + 0.1 * params["w"]}


def batch(*x):
    return {"all": {"groups": {}, "example": {"source": jnp.zeros(len(x), int)}, "x": jnp.array(x)}}


def toy(spike, micro_batches=1):
    config = config_lib.default()
    config.optimizer.clip_norm = 1.0
    chain = optimizer(config, optax.constant_schedule(0.1))
    params = {"w": jnp.ones(3)}
    extra = {"updates": jnp.int32(0), "mean": jnp.zeros(3)}
    state = TrainState(jnp.int32(0), params, chain.init(params), extra)
    return state, jax.jit(train_step(Toy(), chain, 0, micro_batches, spike=spike))


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_a_skipped_step_changes_the_step_and_the_guard_alone(bad, micro_batches):
    state, step = toy(10.0, micro_batches)
    good = batch(1.0, 1.0, 1.0, 1.0)
    state, figures = step(state, good)
    assert int(figures["skipped"]) == FINE
    after_bad, figures = step(state, batch(1.0, bad, 1.0, 1.0))
    assert int(figures["skipped"]) == NOT_FINITE
    for name in ("params", "opt_state", "extra"):
        same = jax.tree.map(np.array_equal, getattr(state, name), getattr(after_bad, name))
        assert all(jax.tree.leaves(same)), name
    assert int(after_bad.step) == 2
    assert int(after_bad.guard.skipped) == int(after_bad.guard.in_a_row) == 1
    again, _ = step(after_bad, good)
    assert int(again.extra["updates"]) == 2 and np.isfinite(again.params["w"]).all()


def test_without_a_guard_the_same_numbers():
    (state, guarded), (plain_state, plain) = toy(10.0), toy(None)
    for _ in range(3):
        state, figures = guarded(state, batch(1.0, 1.0, 1.0, 1.0))
        plain_state, plain_figures = plain(plain_state, batch(1.0, 1.0, 1.0, 1.0))
    assert np.array_equal(state.params["w"], plain_state.params["w"])
    assert "skipped" in figures and "skipped" not in plain_figures


def test_the_step_tells_norms_of_each_group():
    state, step = toy(10.0)
    _, figures = step(state, batch(1.0, 1.0, 1.0, 1.0))
    assert np.isclose(figures["gradient_norm"], 2 * np.sqrt(3)) and "gradient_norm/w" in figures
    assert figures["parameter_norm"] == figures["parameter_norm/w"]
