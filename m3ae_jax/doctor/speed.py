"""How fast this machine makes batches, how fast an accelerator would take them, and what a batch looks like."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3ae_jax.data.images import unpatchify
from m3ae_jax.data.mixture import Mixture, apportion
from m3ae_jax.data.order import ATTEMPTS
from m3ae_jax.data.pipeline import Batches, together
from m3ae_jax.data.text import Tokenizer, read_pieces
from m3ae_jax.data.tokens import Group, patch_grid, restricted
from m3ae_jax.plan.chips import parse
from m3ae_jax.report.pictures import Word, hatched
from m3ae_jax.train.flops import work

_MAX_BATCH = 512
_BATCHES = 4  # timed at least, after the first, and for at least these seconds
_SECONDS = 3.0
_MOST_SECONDS = 20.0  # no further batch is timed after these
_VEIL = 0.65  # of stripes over a hidden patch
_OUTLINE = 96
_CELL = 224  # pixels, at least, of a picture on the sheet


@dataclasses.dataclass(frozen=True)
class Shown:
    """An example as training gets it.

    Attributes:
        picture: `[H, W, 3] uint8`, hidden patches hatched and outlined; None without one.
        words: of the caption, as far as it is not cut.
        source: name.
        attempt: candidates that did not decode; `ATTEMPTS`: none did, and nothing is shown.
    """

    picture: np.ndarray | None
    words: tuple[Word, ...]
    source: str
    index: int
    attempt: int


@dataclasses.dataclass(frozen=True)
class Speed:
    """What the pipeline does here.

    Attributes:
        examples_per_second: 0 if it could not be measured.
        batch_size: of the batches timed.
        batches: that were timed.
        cores: of this machine, as far as this process may use them.
        processor: name.
        trouble: why the pipeline stopped; empty if it did not.
        shown: the first examples of the run.
    """

    examples_per_second: float
    batch_size: int
    batches: int
    cores: int
    processor: str
    trouble: str
    shown: tuple[Shown, ...]


@dataclasses.dataclass(frozen=True)
class Need:
    """What a topology takes at most: its chips at their peak, nothing but matrix products.

    Attributes:
        topology: as it is named.
        chips: in all.
        examples_per_second: of all chips.
    """

    topology: str
    chips: int
    examples_per_second: float


def need(config: ConfigDict, vocab_size: int, topologies: str) -> list[Need]:
    """What each of `topologies` (with commas, as `plan.chips.parse` reads them) takes; in closed form.

    Raises:
        UserError: no such topology.
    """
    wanted = [parse(text) for text in topologies.split(",") if text.strip()]
    if not wanted:
        return []
    counted = config.copy_and_resolve_references()
    counted.compute.attention = "xla"  # a fused kernel's products are not counted
    flops = work(counted, vocab_size).executed_flops / config.batch_size
    return [Need(str(t), t.chips, t.chips * t.chip.flops / flops) for t in wanted]


def measure(config: ConfigDict, mixture: Mixture, groups: tuple[Group, ...], tokenizer: Tokenizer, shown: int) -> Speed:
    """Runs the pipeline from the run's first step.

    Args:
        config: resolved.
        mixture: the training data.
        groups: of the objective.
        tokenizer: needed with text.
        shown: how many examples to show to a person.
    """
    scale = min(1.0, _MAX_BATCH / mixture.batch_size)
    sizes = [max(1, round(part.size * scale)) for part in mixture.parts]
    examples: tuple[Shown, ...] = ()
    times: list[float] = []
    trouble = ""
    try:
        parts = {
            part.name: Batches(
                config,
                restricted(groups, part.modalities),
                mixture.feed(part, config),
                tokenizer,
                batch_size=size,
            )
            for part, size in zip(mixture.parts, sizes, strict=True)
        }
        with contextlib.closing(together(parts)) as batches:
            for batch in batches:
                times.append(time.perf_counter())
                if len(times) == 1:
                    examples = _shown(config, mixture, batch, tokenizer, shown)
                elapsed = times[-1] - times[0]
                if (len(times) > _BATCHES and elapsed > _SECONDS) or elapsed > _MOST_SECONDS:
                    break
    except Exception as error:  # whatever a source, a codec or tf.data says of bad data
        trouble = " ".join(str(error).split()) or type(error).__name__
    timed = len(times) - 1
    rate = timed * sum(sizes) / (times[-1] - times[0]) if timed > 0 else 0.0
    cores = len(os.sched_getaffinity(0))
    return Speed(rate, sum(sizes), max(timed, 0), cores, _processor(), trouble, examples)


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# --- what a batch looks like -------------------------------------------------------------------------------


def _shown(
    config: ConfigDict, mixture: Mixture, batch: dict[str, Any], tokenizer: Tokenizer, count: int
) -> tuple[Shown, ...]:
    """The first examples of each part, as many as its share."""
    rows = apportion([part.size for part in mixture.parts], max(count, len(mixture.parts)))
    examples = []
    for part, wanted in zip(batch.values(), rows.tolist(), strict=True):
        example = part["example"]
        for row in range(min(wanted, len(example["index"]))):
            groups = {
                name: {side: {key: x[row] for key, x in tokens.items()} for side, tokens in group.items()}
                for name, group in part["groups"].items()
            }
            attempt = int(example["attempt"][row])
            picture = _veiled(groups["image"], config) if "image" in groups and attempt < ATTEMPTS else None
            words = _words(groups["text"], tokenizer) if "text" in groups else ()
            name = mixture.members[int(example["source"][row])].name
            examples.append(Shown(picture, words, name, int(example["index"][row]), attempt))
    return tuple(examples)


def _veiled(group: dict[str, Any], config: ConfigDict) -> np.ndarray:
    """The picture, its hidden patches hatched and outlined, at least `_CELL` pixels wide."""
    rows, columns = patch_grid(config)
    patch = config.data.patch_size
    patches = np.zeros((rows * columns, 3 * patch * patch), np.uint8)
    for side in group.values():
        patches[side["position"][side["valid"]]] = side["value"][side["valid"]]
    factor = -(-_CELL // config.data.image_size)
    picture = unpatchify(patches[None], patch, (rows, columns))[0]
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    target, side_length = group["target"], patch * factor
    stripes = hatched(len(picture), picture.shape[1], side_length)
    for position in target["position"][target["valid"]].tolist():
        top, left = position // columns * side_length, position % columns * side_length
        within = slice(top, top + side_length), slice(left, left + side_length)
        cell = picture[within]
        cell[:] = (cell * (1 - _VEIL) + stripes[within] * _VEIL).astype(np.uint8)
        cell[0], cell[-1], cell[:, 0], cell[:, -1] = (_OUTLINE,) * 4
    return picture


def _words(group: dict[str, Any], tokenizer: Tokenizer) -> tuple[Word, ...]:
    words: dict[int, Word] = {}
    for name, side in group.items():
        valid = side["valid"]
        pieces = read_pieces(tokenizer, side["value"][valid].tolist())
        for position, piece in zip(side["position"][valid].tolist(), pieces, strict=True):
            words[position] = Word(piece, hidden=name == "target", predicted=None)
    return tuple(words[position] for position in sorted(words))
