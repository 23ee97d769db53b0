"""What a format is, and what those of several projects share."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.convert.keymap import FLAX, Names, Report
from m3ae_jax.convert.positions import read as read_table
from m3ae_jax.errors import UserError
from m3ae_jax.models.fields import SIZES

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ERF, TANH = "gelu", "gelu_tanh"
ACTIVATIONS = {"gelu": ERF, "gelu_new": TANH, "gelu_pytorch_tanh": TANH}
"""What transformers calls the activations that both know."""


@dataclasses.dataclass
class Foreign:
    """Another project's weights, as read.

    Attributes:
        arrays: by their names.
        facts: what else the file holds about the model.
        notes: what was done to read it.
    """

    arrays: dict[str, np.ndarray]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def of_torch(cls, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any] | None = None) -> Foreign:
        """What PyTorch saved; a prefix that a wrapper gave all names is taken off, and noted."""
        bare, prefix = unwrapped(arrays)
        notes = prefix_notes(prefix)
        return cls(bare, facts or {}, notes)


class Arithmetic(NamedTuple):
    """What a project's code computes between its matrix products: which GELU, and the epsilon of LayerNorm."""

    activation: str = ERF
    epsilon: float = 1e-6


@dataclasses.dataclass(frozen=True)
class Format:
    """One format, both ways.

    Attributes:
        about: for people.
        read: of a file or folder.
        describe: sets the fields of a config that follow from the weights and the facts, beside the sizes; notes what
            differs from ours. Heads that are unknown are left 0.
        write: arrays to a file or folder; the report gets notes of what the format cannot express.
        names: what the project calls its layers.
        arithmetic: what the project's code computes, by the file's facts.
        beside: (pattern, why) of parameters that no output here depends on.
        endings: of the file that `write` makes, the usual one first; none: it makes a folder.
        folders: `read` takes them.
        objective: whose models it holds.
        adapt: brings arrays to a config that the user may have changed.
        fresh: (pattern, why) of parameters of ours that a file may lack, besides the decoder's.
        beside_params: takes from the arrays what belongs into `Objective.init_extra`'s branches, by branch: a teacher's
            arrays under the project's names, others by our paths.
    """

    about: str
    read: Callable[[Path], Foreign]
    describe: Callable[[Foreign, ConfigDict, Report], None]
    write: Callable[[Path, dict[str, np.ndarray], ConfigDict, Report], None]
    names: Names
    arithmetic: Callable[[Mapping[str, Any]], Arithmetic] = lambda facts: Arithmetic()
    beside: tuple[tuple[str, str], ...] = ()
    endings: tuple[str, ...] = (".safetensors",)
    folders: bool = False
    objective: str = "m3ae"
    adapt: Callable[[Foreign, dict[str, np.ndarray], ConfigDict, Report], None] = lambda *_: None
    fresh: tuple[tuple[str, str], ...] = ()
    beside_params: Callable[[Foreign, dict[str, np.ndarray], ConfigDict, Report], dict[str, dict[str, np.ndarray]]] = (
        lambda *_: {}
    )

    def why_beside(self, name: str) -> str:
        """Why a parameter of theirs does not matter; "" if it may."""
        return _why(self.beside, name)

    def why_fresh(self, path: str) -> str:
        """Why a file may lack a parameter of ours; "" if it must not."""
        return _why(self.fresh, path)


def _why(table: tuple[tuple[str, str], ...], name: str) -> str:
    return next((why for pattern, why in table if re.fullmatch(pattern, name)), "")


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Within it whatever a file's damage raises becomes one line.

    Raises:
        UserError: the file cannot be read, or is not a whole one of its kind.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # every kind: what parses a file trusts its numbers
        raise UserError(f"{path} is not a whole {kind}: {type(error).__name__}: {str(error)[:200]}") from None


def unwrapped(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], str]:
    """Arrays without the prefix that wrappers of PyTorch modules, one in another, gave all names; and the prefix.

    Each is a module's name and a point: ``module.`` of DistributedDataParallel, ``_orig_mod.`` of torch.compile,
    ``model.``, ``backbone.`` and others of training programs. No model here has one name before all its parameters.
    """
    bare, prefix = dict(arrays), ""
    while len({name.partition(".")[0] for name in bare}) == 1 and all("." in name for name in bare):
        found = next(iter(bare)).partition(".")[0] + "."
        bare, prefix = {name.removeprefix(found): value for name, value in bare.items()}, prefix + found
    return bare, prefix


def prefix_notes(prefix: str) -> list[str]:
    """For the report: that a prefix was taken off."""
    return [f"the prefix {prefix!r} of all names, a wrapper's, is taken off"] if prefix else []


def renamed(arrays: Mapping[str, np.ndarray], rename: Callable[[str], str]) -> dict[str, np.ndarray]:
    """Arrays by other names.

    Raises:
        UserError: two of them would have the same one.
    """
    of: dict[str, str] = {}
    for name in arrays:
        ours = rename(name)
        if ours in of:
            raise UserError(f"the file has both {of[ours]} and {name}, names of one parameter: which one is right?")
        of[ours] = name
    return {ours: arrays[name] for ours, name in of.items()}


def single(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of half precision in float32, so that what is added here is added as exactly as there."""
    return {name: np.asarray(x, np.float32) if x.dtype.itemsize == 2 else x for name, x in arrays.items()}


def json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file beside the weights.

    Raises:
        UserError: it cannot be read, or is no object.
    """
    with reading(path, "JSON file"):
        content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def image_processor(kind: str, config: ConfigDict) -> dict[str, Any]:
    """What transformers' image processor of a kind takes to give pictures as this model is given them."""
    d = config.data
    return {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"height": d.image_size, "width": d.image_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(d.image_mean),
        "image_std": list(d.image_std),
    }


def mlp_ratio(width: int, hidden: int) -> float:
    """Of a layer `hidden` wide, as the model counts it."""
    ratio = hidden / width
    while int(width * ratio) < hidden:
        ratio = float(np.nextafter(ratio, np.inf))
    return ratio


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


def add_biases(arrays: dict[str, np.ndarray], *layers: str) -> bool:
    """Gives layers of PyTorch whose names end so a bias of zeros where they have none; whether any had none."""
    ends = tuple(f"{layer}.weight" for layer in layers)
    zeros = {
        n.removesuffix("weight") + "bias": np.zeros(len(x), np.float32) for n, x in arrays.items() if n.endswith(ends)
    }
    lacking = zeros.keys() - arrays.keys()
    arrays.update({name: zeros[name] for name in lacking})
    return bool(lacking)


def set_sizes(config: ConfigDict, arrays: Mapping[str, np.ndarray], names: Names) -> None:
    """Sets the shapes of both stacks by those of their layers; heads only of the known widths.

    The encoder's are those of `models.fields.SIZES`, the decoder's that of MAE and M3AE, 512 wide with 16 heads.

    Raises:
        UserError: the file has no encoder.
    """
    fc1 = need(arrays, names.kernel("fc1"))
    width, hidden = fc1.shape if names.kinds is FLAX else fc1.shape[::-1]
    size, heads = next(((size, h) for size, (w, _, h) in SIZES.items() if w == width), (config.model.size, 0))
    depth = blocks(arrays, names.blocks["encoder"])
    config.model.update(size=size, width=width, depth=depth, heads=heads, mlp_ratio=mlp_ratio(width, hidden))
    projection = arrays.get(names.kernel("projection"))
    if projection is not None:
        width = projection.shape[1 if names.kinds is FLAX else 0]
        depth = blocks(arrays, names.blocks["decoder"])
        config.m3ae.update(decoder_width=width, decoder_depth=depth, decoder_heads=16 if width == 512 else 0)


def set_pictures(config: ConfigDict, arrays: Mapping[str, np.ndarray], names: Names, report: Report) -> None:
    """What all image models of PyTorch share: a convolution `[D, 3, p, p]` over a square of patches.

    Raises:
        UserError: the file's are of another shape.
    """
    table = names.tables["encoder"]
    side = read_table(table, need(arrays, table)).side
    kernel = need(arrays, names.kernel("image"))
    if kernel.ndim != 4 or kernel.shape[1] != 3 or kernel.shape[2] != kernel.shape[3]:
        raise UserError(f"its patch embedding is {list(kernel.shape)}; [width, 3, side, side] is needed")
    patch = kernel.shape[2]
    config.data.modalities = ("image",)
    config.data.update(patch_size=patch, image_size=patch * side, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    report.notes.append("patch order: row, column, channel here; their convolution is turned into that product")
    report.notes.append("pixels: normalised by ImageNet's mean and deviation")


def note_expressed(config: ConfigDict, report: Report, name: str, arithmetic: Arithmetic) -> None:
    """Notes where `name`'s code computes something else than this model."""
    m, (activation, epsilon) = config.model, arithmetic
    if m.activation != activation:
        report.notes.append(f"DIFFERS: {name} computes GELU as {activation}, this model as {m.activation}")
    if not np.isclose(m.layer_norm_epsilon, epsilon, rtol=1e-3):
        report.notes.append(f"DIFFERS: {name} has a LayerNorm epsilon of {epsilon}, this model {m.layer_norm_epsilon}")
