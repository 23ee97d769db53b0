"""The device mesh and where arrays lie on it. Models name logical axes; only this file knows the mesh."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

RULES: dict[str, tuple[tuple[str, str | None], ...]] = {
    # Which mesh axis a logical axis is split over; one not named here is kept whole.
    "dp": (),
}


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A data-parallel mesh over all devices (axes ``data``, ``fsdp``, ``tensor``; the last two are 1)."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices), 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples are split over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(boxed: Any, mesh: Mesh, preset: str = "dp") -> Any:
    """Shardings of parameters boxed with their logical axes (a pytree like the unboxed parameters)."""
    specs = nn.get_partition_spec(boxed)
    return nn.logical_to_mesh_sharding(specs, mesh, RULES[preset])


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Rows of the global batch that this process reads, `[b] int`."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows = {row for index in indices.values() if index for row in range(*index[0].indices(batch_size))}
    return np.array(sorted(rows))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Places a process's rows on its devices, as one global array a leaf."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
