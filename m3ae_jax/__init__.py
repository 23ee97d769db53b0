"""Multimodal masked pretraining in JAX, Flax and tf.data."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {"load": "m3ae_jax.inference", "Model": "m3ae_jax.inference"}


def __getattr__(name: str) -> Any:
    """`load` and `Model`, imported at their first use: the package alone imports no jax."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
