"""The training state and the pure step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from m3ae_jax.objectives.base import Batch, Objective, Terms, mean, total_loss
from m3ae_jax.parallel.mesh import param_shardings, replicated


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
        step: steps done, a scalar int32.
        params: parameters, float32.
        opt_state: the optimizer's.
        extra: the objective's own (``{}`` for most).
    """

    step: jax.Array
    params: Any
    opt_state: Any
    extra: Any


def abstract_state(objective: Objective, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """Shapes, dtypes and shardings of the state, without making it (`jax.ShapeDtypeStruct` leaves)."""
    boxed = jax.eval_shape(objective.init, jax.random.key(seed))
    shardings = param_shardings(boxed, mesh)
    state = jax.eval_shape(lambda: _fresh(objective, optimizer, seed))

    # Moments (and a teacher) have the parameters' shapes and lie where they do: matched by the path's end.
    by_path = {
        jax.tree_util.keystr(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)
    }

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        ends = (jax.tree_util.keystr(path[start:]) for start in range(len(path)))
        sharding = next((by_path[end] for end in ends if end in by_path), replicated(mesh))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)


def init_state(objective: Objective, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """A fresh state, born on the mesh with its shardings."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(objective, optimizer, mesh, seed))
    return jax.jit(lambda: _fresh(objective, optimizer, seed), out_shardings=shardings)()


def _fresh(objective: Objective, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    params = nn.unbox(objective.init(jax.random.key(seed)))
    return TrainState(jnp.int32(0), params, optimizer.init(params), objective.init_extra(params))


def train_step(
    objective: Objective, optimizer: optax.GradientTransformation, seed: int
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The step: (state, batch) to (state, figures). Pure; jit it with the state donated."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        # One key a step: a resumed run draws what an unbroken one would have drawn.
        rng = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            output = objective.loss(params, state.extra, batch, rng, state.step)
            return total_loss(output.terms, objective.term_weights), output

        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, output), grads = gradient(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        extra = objective.update_extra(state.extra, params, output.aux, state.step)
        figures = {name: mean(*term) for name, term in {**output.terms, **output.metrics}.items()}
        figures |= {"loss": value, "gradient_norm": optax.global_norm(grads)}
        return TrainState(state.step + 1, params, opt_state, extra), figures

    return step


def eval_step(objective: Objective) -> Callable[[TrainState, Batch], Terms]:
    """The deterministic loss terms and metrics of a batch, as sums and weights."""

    def step(state: TrainState, batch: Batch) -> Terms:
        output = objective.loss(state.params, state.extra, batch, None, state.step)
        return {**output.terms, **output.metrics}

    return step
