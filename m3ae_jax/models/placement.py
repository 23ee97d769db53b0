"""Where activations lie: models name the logical axes of an array, whoever traces them says what these mean."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

import jax

Place = Callable[[tuple[str | None, ...]], jax.sharding.NamedSharding]

_place: ContextVar[Place | None] = ContextVar("_place", default=None)


@contextlib.contextmanager
def placed_by(place: Place) -> Iterator[None]:
    """A context for tracing: `constrain` then asks `place` for the sharding of an array with such axes.

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
