"""The tensors of a PyTorch ``.pth`` file, read without PyTorch and without running anything that is in it.

Such a file is a zip of one pickle and the numbers of each storage. The pickle goes through the unpickler that calls
nothing; of what it names, only PyTorch's ways to make a tensor are known here.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from m3ae_jax.convert import safetensors, unpickle
from m3ae_jax.convert.formats import reading
from m3ae_jax.convert.unpickle import Global, Made
from m3ae_jax.errors import UserError

_STORAGES: dict[str, Any] = {
    "torch.DoubleStorage": "f8",
    "torch.FloatStorage": "f4",
    "torch.HalfStorage": "f2",
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.LongStorage": "i8",
    "torch.IntStorage": "i4",
    "torch.BoolStorage": "?",
    "torch.ShortStorage": "i2",
    "torch.CharStorage": "i1",
    "torch.ByteStorage": "u1",
}
_USUAL = ("model", "state_dict", "module")  # of a training program's file


def load_either(path: Path) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    """As `load`; a file that ends in ``.safetensors`` is read as such.

    Raises:
        UserError: as there.
    """
    return (safetensors.load(path)[0], {}) if path.suffix == ".safetensors" else load(path)


def load(path: Path) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    """The tensors of a state dict, and what the training program's ``args`` were, if it saved them.

    The state dict is the whole content, or stands under ``model``, ``state_dict`` or ``module``; or, under any other
    name, it is the only one.

    Raises:
        UserError: it cannot be read, is damaged, or holds no tensors.
    """
    with reading(path, "PyTorch file"):
        try:
            with zipfile.ZipFile(path) as archive:
                return _parse(path, archive)
        except zipfile.BadZipFile as error:
            with open(path, "rb") as file:
                if file.read(2) == b"PK":  # a zip, as today's are
                    raise UserError(f"{path} is damaged or cut off: {error}") from None
            raise UserError(
                f"{path} is no PyTorch file of version 1.6 or later; load and save it anew with today's PyTorch"
            ) from None


def _parse(path: Path, archive: zipfile.ZipFile) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
        raise UserError(f"{path}: it is compressed, which PyTorch does not do")
    (name,) = (n for n in archive.namelist() if n == "data.pkl" or n.endswith("/data.pkl"))
    folder = name.removesuffix("data.pkl")
    order = ">" if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") == b"big" else "<"
    content = archive.read(name)
    root = unpickle.fields(unpickle.read(io.BytesIO(content), len(content))) or {}
    nodes = _state_dict(path, root)
    tensors = {unpickle.name(key): _tensor(node, archive, folder, order) for key, node in nodes.items()}
    arrays = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return arrays, unpickle.plain(root.get("args"))


def _state_dict(path: Path, root: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """What holds the tensors: the whole, what stands under a usual name, or the only part that has any."""
    parts = {unpickle.name(key): unpickle.fields(node) or {} for key, node in root.items()}
    holding = {name: nodes for name, nodes in parts.items() if _holds_tensors(nodes)}
    usual = next((holding[name] for name in _USUAL if name in holding), None)
    if usual is not None or _holds_tensors(root):
        return root if usual is None else usual
    if len(holding) == 1:
        return next(iter(holding.values()))
    which = f"{' and '.join(holding)}: save the one that is meant alone" if holding else ""
    there = ", ".join(sorted(parts)[:5]) or "nothing by name"
    raise UserError(f"{path}: it holds {f'several state dicts, {which}' if holding else f'no state dict, but {there}'}")


def _holds_tensors(nodes: Mapping[Any, Any]) -> bool:
    return any(isinstance(node, Made) and node.name.startswith("torch._utils._rebuild_") for node in nodes.values())


def _tensor(node: Any, archive: zipfile.ZipFile, folder: str, order: str) -> np.ndarray | None:
    if not isinstance(node, Made):
        return None
    if node.name == "torch._utils._rebuild_parameter":
        return _tensor(node.arguments[0], archive, folder, order)
    if node.name != "torch._utils._rebuild_tensor_v2":
        return None
    storage, offset, shape, strides = node.arguments[:4]
    _, kind, key, _, _ = storage.arguments[0]
    if not isinstance(kind, Global) or kind.name not in _STORAGES or not isinstance(key, str):
        raise ValueError(f"a storage of unknown type {kind.name if isinstance(kind, Global) else type(kind).__name__}")
    if not all(isinstance(number, int) for number in (offset, *shape, *strides)):
        raise ValueError("a tensor's shape is not of numbers")
    dtype = np.dtype(_STORAGES[kind.name])
    numbers = np.frombuffer(archive.read(f"{folder}data/{key}"), dtype.newbyteorder(order))
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else 0
    inside = min((offset, *shape, *strides)) >= 0 and last < max(len(numbers), 1)
    if not inside or math.prod(shape) > len(numbers):
        raise ValueError("a tensor reaches beyond its storage")
    return np.lib.stride_tricks.as_strided(numbers[offset:], shape, [s * dtype.itemsize for s in strides]).copy()


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes ``{"model": state dict}``, as facebookresearch/mae does.

    Raises:
        UserError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise UserError("to write a .pth file PyTorch is needed: pip install torch; or name a .safetensors") from None
    torch.save({"model": {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}}, path)
