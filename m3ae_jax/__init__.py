"""Multimodal masked pretraining in JAX, Flax and tf.data."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load` and `Model`, imported when they are asked for: the package alone imports no jax."""
    if name in ("load", "Model"):
        from m3ae_jax import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
