"""The safetensors format: a length, a JSON header, then the numbers. Needs no package."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from m3ae_jax.convert.formats import reading

_DTYPES: dict[str, Any] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": ml_dtypes.bfloat16,
    "I64": "<i8",
    "I32": "<i4",
    "U8": "u1",
}
_MOST_HEADER = 100_000_000  # bytes, as the format's own reader


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata of a file.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    with reading(path, "safetensors file"):
        data = np.memmap(path, np.uint8, "r")
        length = int.from_bytes(data[:8].tobytes(), "little")
        if len(data) < 8 or length > min(_MOST_HEADER, len(data) - 8):
            raise ValueError("its header is longer than the file")
        header = json.loads(data[8 : 8 + length].tobytes(), object_pairs_hook=_once)
        body = data[8 + length :]
        metadata = header.pop("__metadata__", {})
        arrays = {}
        for name, entry in header.items():
            dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(int(n) for n in entry["shape"])
            start, end = (int(n) for n in entry["data_offsets"])
            fits = end - start == math.prod(shape) * dtype.itemsize and min(shape, default=0) >= 0
            if not (fits and 0 <= start <= end <= len(body)):
                raise ValueError(f"the place of {name!r} does not fit its shape")
            arrays[name] = np.frombuffer(body[start:end].tobytes(), dtype).reshape(shape)
        return arrays, {str(key): str(value) for key, value in metadata.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []:
        raise ValueError(f"{twice[0]!r} is there twice")
    return dict(pairs)


def save(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes float32 arrays."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, value in arrays.items():
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [offset, offset + 4 * value.size]}
        offset += 4 * value.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in arrays.values():
            file.write(np.ascontiguousarray(value, "<f4").tobytes())
