"""The device mesh and where arrays lie on it. Models name logical axes; only this file knows the mesh.

Mesh axes: ``data`` (examples; it alone spans slices), ``fsdp`` (examples, and the parameters' shards), ``tensor``
(heads and MLP channels of one example).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from m3ae_jax.config.fields import FieldGroup, setting
from m3ae_jax.errors import UserError, one_of
from m3ae_jax.models.placement import placed_by

AXES = ("data", "fsdp", "tensor")

PRESETS: dict[str, tuple[int, int]] = {
    # Most devices along `fsdp`, and devices along `tensor`; `data` takes the rest.
    "dp": (1, 1),
    "fsdp": (16, 1),
    "fsdp_tp": (16, 2),
}
"""Shards over 16 chips are small enough for a model of 4 billion parameters, and traffic and memory of a chip then
stay the same however many chips there are."""

Rules = Mapping[str, tuple[str, ...]]
"""Which mesh axes a logical axis is split over; one without a rule stays whole."""

RULES: Rules = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
}
LOGICAL_AXES = ("batch", "embed", "heads", "head_dim", "mlp", "vocab", "patch", "layers")


class MeshFields(FieldGroup):
    """How devices share a step."""

    preset: str = setting("dp", choices=tuple(PRESETS), program=True)
    """dp: parameters whole on each device; fsdp: over 16; fsdp_tp: heads and MLPs over 2 besides."""
    data: int = setting(0, low=0, program=True, aliases=("data_parallel", "dp"))
    """Devices along the axis of examples; 0: what remains."""
    fsdp: int = setting(0, low=0, program=True)
    """Devices that share the parameters; 0: as the preset says."""
    tensor: int = setting(0, low=0, program=True, aliases=("tp", "model_axis"))
    """Devices that share heads and MLPs; 0: as the preset says."""
    rules: tuple[str, ...] = setting((), program=True)
    """Changes to the rules of parallel/mesh.py: LOGICAL:MESH, or LOGICAL: (kept whole)."""


def mesh_rules(config: ConfigDict) -> Rules:
    """`RULES` as changed by ``mesh.rules``, items ``LOGICAL:MESH`` or ``LOGICAL:`` (stays whole).

    Raises:
        UserError: no such logical or mesh axis.
    """
    rules = dict(RULES)
    for item in config.mesh.rules:
        logical, separator, axis = str(item).partition(":")
        if not separator:
            raise UserError(f"mesh.rules: {item!r} is not LOGICAL:MESH, as vocab:tensor")
        if logical not in LOGICAL_AXES or logical == "batch":
            raise UserError(one_of(f"mesh.rules {item!r}: logical axis", logical, LOGICAL_AXES[1:]))
        if axis and axis not in AXES:
            raise UserError(one_of(f"mesh.rules {item!r}: mesh axis", axis, AXES))
        rules[logical] = (axis,) if axis else ()
    return rules


def mesh_shape(config: ConfigDict, devices: int, slices: int = 1) -> tuple[int, int, int]:
    """Sizes of (data, fsdp, tensor): those of the config, 0 filled in as its preset says.

    Args:
        config: resolved.
        devices: in all.
        slices: groups of devices with a fast network of their own; `data` spans them.

    Raises:
        UserError: the sizes do not make up the devices.
    """
    sizes = config.mesh
    most, tensor = PRESETS[sizes.preset]
    tensor = sizes.tensor or tensor
    if sizes.data and most > 1:
        fsdp = sizes.fsdp or max(1, devices // (sizes.data * tensor))
    else:
        fsdp = sizes.fsdp or math.gcd(max(1, devices // (tensor * slices)), most)
    data = sizes.data or max(1, devices // (fsdp * tensor))
    if data * fsdp * tensor != devices:
        raise UserError(
            f"mesh: data={data} x fsdp={fsdp} x tensor={tensor} = {data * fsdp * tensor} devices, but there are "
            f"{devices}; mesh.data, mesh.fsdp and mesh.tensor must multiply to that (0: what remains)"
        )
    if data % slices:
        raise UserError(f"mesh: data={data} is not divisible by the {slices} slices, which only this axis may span")
    return data, fsdp, tensor


def make_mesh(config: ConfigDict | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a resolved config over `devices` (all there are); without a config, data parallel."""
    devices = jax.devices() if devices is None else list(devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    shape = mesh_shape(config, len(devices), slices) if config is not None else (len(devices), 1, 1)
    # Axes of 16 or 2 chips need not be whole axes of a slice's torus: they may be split.
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        inside, across = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def activations_on(mesh: Mesh, rules: Rules = RULES) -> contextlib.AbstractContextManager[None]:
    """A context for tracing: the models' activations then lie on this mesh."""

    def place(names: tuple[str | None, ...]) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(rules.get(name, ()) if name else () for name in names)))

    return placed_by(place)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: examples are split over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def batch_parts(mesh: Mesh) -> int:
    """The number of parts into which a batch's examples are split."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def check_batch_size(config: ConfigDict, mesh: Mesh) -> None:
    """Refuses a batch that cannot be cut into equal parts for each device and micro-batch.

    Raises:
        UserError: the batch size is not divisible.
    """
    parts = batch_parts(mesh)
    if config.batch_size % (parts * config.micro_batches):
        raise UserError(
            f"batch_size={config.batch_size} is not divisible by {parts} (mesh: data x fsdp) x "
            f"micro_batches={config.micro_batches}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(boxed: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Shardings of parameters boxed with their logical axes (a pytree like the unboxed parameters).

    Raises:
        UserError: a dimension is not divisible by the mesh axes it is split over.
    """

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, names: PartitionSpec) -> NamedSharding:
        parameter = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = [rules.get(name, ()) if name else () for name in names]
        if sum(name != "layers" for name in names) == 1:
            # A bias or a scale is too small to be worth gathering.
            axes = [tuple(axis for axis in split if axis != "fsdp") for split in axes]
        used: dict[str, str] = {}
        for size, name, split in zip(leaf.shape, names, axes, strict=False):
            for axis in split:
                if axis in used:
                    both = f"both {used[axis]!r} and {name!r}"
                    raise UserError(f"mesh.rules: {parameter} would be split over {axis!r} along {both}")
                used[axis] = str(name)
            if size % math.prod(mesh.shape[axis] for axis in split):
                sizes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in split)
                raise UserError(f"mesh: {parameter} has {size} {name!r} entries, not divisible by {sizes}")
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(place, nn.unbox(boxed), nn.get_partition_spec(boxed))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Rows of the global batch that this process reads, `[b] int`."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows = {row for index in indices.values() if index for row in range(*index[0].indices(batch_size))}
    return np.array(sorted(rows))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Places a process's rows on its devices, as one global array a leaf."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def put_whole_batch(batch: Any, mesh: Mesh) -> Any:
    """Places a batch that every process has whole, as `put_batch` does."""
    rows = local_rows(mesh, jax.tree.leaves(batch)[0].shape[0])
    return put_batch(jax.tree.map(lambda x: x[rows], batch), mesh)


def fetch(arrays: Any) -> Any:
    """The whole arrays in every process's host memory; all processes must call it."""

    def get(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(get, arrays)
