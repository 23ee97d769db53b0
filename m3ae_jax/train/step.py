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

from m3ae_jax.objectives.base import Batch, LossOutput, Objective, Terms, batch_loss, mean, token_counts, total_loss
from m3ae_jax.parallel.mesh import RULES, Rules, param_shardings, replicated
from m3ae_jax.train import guard as guards
from m3ae_jax.train.guard import Guard

STATE_VERSION = 2
"""Of what `TrainState` holds: 2 has the guard."""


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
        step: steps done, a scalar int32.
        params: parameters, float32.
        opt_state: the optimizer's.
        extra: the objective's own (``{}`` for most).
        guard: what decides on skipping a step.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    extra: Any
    guard: Guard = flax.struct.field(default_factory=guards.fresh)


def abstract_state(
    objective: Objective, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, rules: Rules = RULES
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without making it (`jax.ShapeDtypeStruct` leaves).

    Raises:
        UserError: a parameter cannot be split as the rules say.
    """
    boxed = jax.eval_shape(objective.init, jax.random.key(seed))
    shardings = param_shardings(boxed, mesh, rules)
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


def init_state(
    objective: Objective, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, rules: Rules = RULES
) -> TrainState:
    """A fresh state, born on the mesh with its shardings."""
    return jit_init(objective, optimizer, mesh, seed, rules)()


def jit_init(
    objective: Objective, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, rules: Rules = RULES
) -> Any:
    """What `init_state` calls, jitted."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(objective, optimizer, mesh, seed, rules))
    return jax.jit(lambda: _fresh(objective, optimizer, seed), out_shardings=shardings)


def _fresh(objective: Objective, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    params = nn.unbox(objective.init(jax.random.key(seed)))
    return TrainState(jnp.int32(0), params, optimizer.init(params), objective.init_extra(params))


def train_step(
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    seed: int,
    micro_batches: int = 1,
    sources: tuple[str, ...] = (),
    spike: float | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The step: (state, batch) to (state, figures). Pure; jit it with the state donated.

    Args:
        objective: its loss.
        optimizer: its update, which takes ``fine`` as that of `train.optimizer.optimizer`.
        seed: of dropout.
        micro_batches: parts that a batch is cut into, computed one after the other; loss and gradient are the
            whole batch's.
        sources: names of a mixture's; the figures then have each loss term of each of them, ``TERM/NAME``.
        spike: as of `guard.judge`; a step that it finds fault with changes `step` and `guard` alone, and the figure
            ``skipped`` is the verdict. None: no step is judged.
    """
    gradient = step_gradient(objective, seed, micro_batches, len(sources))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, output = gradient(state, batch)
        terms = {**output.terms, **output.metrics, **token_counts(batch)}
        figures = {_named(name, sources): mean(*term) for name, term in terms.items()}
        figures["loss"] = total_loss(output.terms, objective.term_weights)
        figures |= norms("gradient_norm", grads)
        guard, fine = state.guard, None
        if spike is not None:
            verdict = guards.judge(guard, figures["loss"], figures["gradient_norm"], spike)
            guard = guards.after(guard, figures["loss"], verdict)
            figures["skipped"], fine = verdict, verdict == guards.FINE
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, fine=fine)
        params = optax.apply_updates(state.params, updates)
        changed = params, objective.update_extra(state.extra, params, output.aux, state.step)
        if fine is not None:
            changed = jax.tree.map(lambda new, old: jnp.where(fine, new, old), changed, (state.params, state.extra))
        params, extra = changed
        figures |= norms("parameter_norm", params)
        return TrainState(state.step + 1, params, opt_state, extra, guard), figures

    return step


def step_gradient(
    objective: Objective, seed: int, micro_batches: int, sources: int
) -> Callable[[TrainState, Batch], tuple[Any, LossOutput]]:
    """Gradient and loss of a step; the arguments are `train_step`'s, but for the number of sources."""

    def loss_of(params: Any, extra: Any, batch: Batch, rng: jax.Array | None, step: jax.Array) -> LossOutput:
        return batch_loss(objective, params, extra, batch, rng, step, sources)

    gradient = _gradient if micro_batches == 1 else _accumulated(micro_batches)

    def of_step(state: TrainState, batch: Batch) -> tuple[Any, LossOutput]:
        # One key a step: a resumed run draws what an unbroken one would have drawn.
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        return gradient(loss_of, objective.term_weights, state, batch, rng)

    return of_step


def norms(name: str, tree: Any) -> dict[str, jax.Array]:
    """Euclidean norms of a pytree like the parameters: `name` of all, ``NAME/GROUP`` of each entry at its top."""
    squares = {group: optax.tree.norm(part, squared=True) for group, part in tree.items()}
    groups = {f"{name}/{group}": jnp.sqrt(square) for group, square in squares.items()}
    return {name: jnp.sqrt(sum(squares.values(), jnp.float32(0.0))), **groups}


def jit_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    seed: int,
    micro_batches: int,
    abstract: TrainState,
    mesh: Mesh,
    sources: tuple[str, ...] = (),
    spike: float | None = None,
) -> Any:
    """`train_step`, jitted: the old state is given up, and the new one lies where `abstract_state` says."""
    step = train_step(objective, optimizer, seed, micro_batches, sources, spike)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


_LossOf = Callable[..., LossOutput]


def _named(metric: str, sources: tuple[str, ...]) -> str:
    """``TERM/NUMBER`` with the source's name."""
    term, slash, number = metric.partition("/")
    return f"{term}/{sources[int(number)]}" if slash and sources and number.isdigit() else metric


def _gradient(
    loss_of: _LossOf, term_weights: dict[str, float], state: TrainState, batch: Batch, rng: jax.Array
) -> tuple[Any, LossOutput]:
    def loss(params: Any) -> tuple[jax.Array, LossOutput]:
        output = loss_of(params, state.extra, batch, rng, state.step)
        return total_loss(output.terms, term_weights), output

    return jax.grad(loss, has_aux=True)(state.params)


def _accumulated(parts: int) -> Callable[..., tuple[Any, LossOutput]]:
    """`_gradient` over parts of the batch."""

    def cut(x: jax.Array) -> jax.Array:
        # Every parts-th row: so each device cuts its own rows, and none travel.
        return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])

    def gradient(
        loss_of: _LossOf, term_weights: dict[str, float], state: TrainState, batch: Batch, rng: jax.Array
    ) -> tuple[Any, LossOutput]:
        micro = jax.tree.map(cut, batch)

        def weights_of(part: Batch) -> dict[str, jax.Array]:
            terms = loss_of(state.params, state.extra, part, None, state.step).terms
            return {name: weight for name, (_, weight) in terms.items()}

        # Weights depend on the batch alone, so the compiler drops the rest of the loss here.
        weights = jax.tree.map(lambda x: x.sum(0), jax.lax.map(weights_of, micro))

        def loss(params: Any, part: Batch, key: jax.Array) -> tuple[jax.Array, LossOutput]:
            output = loss_of(params, state.extra, part, key, state.step)
            share = {name: (total, weights[name]) for name, (total, _) in output.terms.items()}
            return total_loss(share, term_weights), output

        def add(total: Any, item: tuple[jax.Array, Batch]) -> tuple[Any, LossOutput]:
            index, part = item
            grads, output = jax.grad(loss, has_aux=True)(state.params, part, jax.random.fold_in(rng, index))
            return jax.tree.map(jnp.add, total, grads), output

        start = jax.tree.map(jnp.zeros_like, state.params)
        grads, output = jax.lax.scan(add, start, (jnp.arange(parts), micro))
        terms, metrics = jax.tree.map(lambda x: x.sum(0), (output.terms, output.metrics))
        return grads, LossOutput(terms, metrics, *jax.tree.map(join, (output.aux, output.per_example)))

    return gradient


def eval_step(objective: Objective) -> Callable[[TrainState, Batch], Terms]:
    """The deterministic loss terms and metrics of a batch, as sums and weights."""

    def step(state: TrainState, batch: Batch) -> Terms:
        output = batch_loss(objective, state.params, state.extra, batch, None, state.step)
        return {**output.terms, **output.metrics}

    return step
