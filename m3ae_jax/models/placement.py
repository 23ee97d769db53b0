"""Where activations lie: models name the logical axes of an array; who traces them maps these to mesh axes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

Place = Callable[[tuple[str | None, ...]], NamedSharding]

_place: ContextVar[Place | None] = ContextVar("_place", default=None)


@contextlib.contextmanager
def placed_by(place: Place) -> Iterator[None]:
    """A context for tracing, in which `place` gives the sharding of an array with such logical axes.

    Flax's own logical constraints need a global mesh, under which a `nn.DenseGeneral` with logical axes fails.
    """
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, whose dimensions have these logical axes, laid out accordingly; as it is outside `placed_by`."""
    place = _place.get()
    return x if place is None else jax.lax.with_sharding_constraint(x, place(axes))


def splits(axis: str) -> bool:
    """Whether several devices share an axis of this logical name; False outside `placed_by`."""
    place = _place.get()
    if place is None:
        return False
    sharding = place((axis,))
    return any(sharding.mesh.shape[name] > 1 for name in _mesh_axes(sharding.spec[0]))


def _mesh_axes(entry: Any) -> tuple[str, ...]:
    """The axes that an entry of a `PartitionSpec` names: none, one or several."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def gather(weight: jax.Array, *axes: str | None) -> jax.Array:
    """`weight`, whose dimensions have these logical axes, whole along the mesh axes that split the batch.

    Its gradient goes back to the parts that the devices hold. Left to itself the compiler multiplies part by part as
    the parts come in, and writes the whole product to memory each time.
    """
    place = _place.get()
    if place is None:
        return weight
    parts, batch = place(axes), _mesh_axes(place(("batch",)).spec[0])
    whole = [tuple(name for name in _mesh_axes(entry) if name not in batch) or None for entry in parts.spec]
    return _gather(weight, parts, NamedSharding(parts.mesh, PartitionSpec(*whole)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight: jax.Array, parts: NamedSharding, whole: NamedSharding) -> jax.Array:
    # First the parts: else a cast before could be done after, and twice the bytes would travel.
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(weight, parts), whole)


def _gather_forward(weight: jax.Array, parts: NamedSharding, whole: NamedSharding) -> tuple[jax.Array, None]:
    return _gather(weight, parts, whole), None


def _gather_backward(parts: NamedSharding, whole: NamedSharding, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # Summed whole first: a product scattered as it is made would be computed part by part, too.
    return (jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(gradient, whole), parts),)


_gather.defvjp(_gather_forward, _gather_backward)


def on_each_device(
    function: Callable[..., jax.Array], inputs: Sequence[tuple[str | None, ...]], output: tuple[str | None, ...]
) -> Callable[..., jax.Array]:
    """`function` on each device's part, for kernels that XLA cannot partition; itself outside `placed_by`.

    Args:
        function: works on parts as on the whole.
        inputs: logical axes of each argument.
        output: logical axes of the result.
    """
    place = _place.get()
    if place is None:
        return function
    specs = tuple(place(axes).spec for axes in inputs)
    mesh, out = place(output).mesh, place(output).spec
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
