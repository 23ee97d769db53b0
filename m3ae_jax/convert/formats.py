"""What a format is, and what those of several projects share."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.config import SIZES
from m3ae_jax.convert.keymap import KeyMap, Report
from m3ae_jax.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ERF, TANH = "gelu", "gelu_tanh"


@dataclasses.dataclass
class Foreign:
    """Another project's weights, as read.

    Attributes:
        arrays: by their names.
        facts: what the file says of the model besides.
    """

    arrays: dict[str, np.ndarray]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Format:
    """One format, both ways.

    Attributes:
        about: for people.
        read: of a file or folder.
        describe: sets the fields of a config that the weights tell, notes what differs from ours. Heads that it
            cannot tell are left 0.
        key_map: of a config and our parameters.
        write: arrays to a file or folder; the report gets notes of what the format cannot say.
        tables: names of their position embeddings, by stack.
        beside: (pattern, why) of parameters that no output here depends on.
        image_only: whether it holds no text.
    """

    about: str
    read: Callable[[Path], Foreign]
    describe: Callable[[Foreign, ConfigDict, Report], None]
    key_map: Callable[[ConfigDict, Mapping[str, np.ndarray]], KeyMap]
    write: Callable[[Path, dict[str, np.ndarray], ConfigDict, Report], None]
    tables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    beside: tuple[tuple[str, str], ...] = ()
    image_only: bool = False

    def why_beside(self, name: str) -> str:
        """Why a parameter of theirs does not matter; "" if it may."""
        return next((why for pattern, why in self.beside if re.fullmatch(pattern, name)), "")


def blocks(arrays: Mapping[str, np.ndarray], pattern: str) -> int:
    """How many blocks there are: names that begin with `pattern`, in which ``{n}`` is the number."""
    expression = re.compile(re.escape(pattern).replace(r"\{n\}", r"(\d+)"))
    return 1 + max((int(m[1]) for m in map(expression.match, arrays) if m), default=-1)


def need(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """An array without which the file is not of its format.

    Raises:
        UserError: it has none.
    """
    if name not in arrays:
        raise UserError(f"the file has no parameter {name}; it has {', '.join(sorted(arrays)[:5])}, ...")
    return arrays[name]


def set_encoder(config: ConfigDict, width: int, depth: int, hidden: int) -> None:
    """Sets the encoder's shape; its heads only if the width is one of the known sizes'."""
    known = {size: (w, h) for size, (w, _, h) in SIZES.items()}
    size = next((size for size, (w, _) in known.items() if w == width), "")
    ratio = hidden / width
    while int(width * ratio) < hidden:  # as the model counts it
        ratio = float(np.nextafter(ratio, np.inf))
    config.model.update(width=width, depth=depth, heads=known[size][1] if size else 0, mlp_ratio=ratio)
    config.model.size = size or config.model.size


def set_decoder(config: ConfigDict, width: int, depth: int) -> None:
    """Sets the decoder's shape; its heads only if it is MAE's and M3AE's, 512 wide with 16."""
    config.model.update(decoder_width=width, decoder_depth=depth, decoder_heads=16 if width == 512 else 0)


def set_pictures(config: ConfigDict, kernel: np.ndarray, side: int, report: Report) -> None:
    """What all image models of PyTorch share: a convolution `[D, 3, p, p]` over `side` * `side` patches."""
    if kernel.ndim != 4 or kernel.shape[1] != 3 or kernel.shape[2] != kernel.shape[3]:
        raise UserError(f"its patch embedding is {list(kernel.shape)}; [width, 3, side, side] is needed")
    patch = kernel.shape[2]
    config.data.modalities = ("image",)
    config.data.update(patch_size=patch, image_size=patch * side, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    report.notes.append("patch order: row, column, channel here; their convolution is turned into that product")
    report.notes.append("pixels: normalised by ImageNet's mean and deviation")


def note_expressed(config: ConfigDict, report: Report, name: str, *, activation: str, epsilon: float) -> None:
    """Notes where `name`'s code computes something else than this model."""
    m = config.model
    if m.activation != activation:
        report.notes.append(f"DIFFERS: {name} computes GELU as {activation}, this model as {m.activation}")
    if not np.isclose(m.layer_norm_epsilon, epsilon, rtol=1e-3):
        report.notes.append(f"DIFFERS: {name} has a LayerNorm epsilon of {epsilon}, this model {m.layer_norm_epsilon}")
