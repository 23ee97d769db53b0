"""Examples that could not be used and were replaced, and captions that are empty: counted, and too many refused."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from m3ae_jax.data.images import EMPTY_CAPTION, REASONS
from m3ae_jax.data.order import ATTEMPTS
from m3ae_jax.errors import UserError

_FEW_DRAWS = 1000  # before so many a share of bad examples says little
_FEW_CAPTIONS = 32
_NEARLY_ALL = 0.99
_EMPTY = REASONS.index(EMPTY_CAPTION)
_DRAWS, _NOTHING, _WORDED = len(REASONS), len(REASONS) + 1, len(REASONS) + 2  # the columns after the reasons


class Replacements:
    """Counts candidates that could not be used, over all processes: what is decided by it, all must decide alike.

    Args:
        field: the data's field of the config, for messages.
    """

    def __init__(self, field: str = "data.train") -> None:
        self._field = field
        self._begin(())

    def _begin(self, parts: tuple[str, ...]) -> None:
        """Counts anew, of each part by reason and by the columns above."""
        self._parts, shape = parts, (len(parts), len(REASONS) + 3)
        self._counts = np.zeros(shape, np.int32)  # of this process, since the last time
        self._all = self._newest = np.zeros(shape, np.int64)

    @property
    def by_reason(self) -> np.ndarray:
        """Replaced so far, `[len(REASONS)] int64`; of empty captions, which are not replaced, 0."""
        counts: np.ndarray = self._all.sum(0)[: len(REASONS)]
        counts[_EMPTY] = 0
        return counts

    @property
    def draws(self) -> int:
        """So far."""
        return int(self._all[:, _DRAWS].sum())

    def add(self, batch: dict[str, Any], end: int = 2**31) -> None:
        """Takes the attempts of this process's rows of a batch, ``{part: rows}``.

        Args:
            batch: of the same parts each time.
            end: positions from here on are padding.
        """
        if not self._parts:
            self._begin(tuple(batch))
        for number, part in enumerate(batch.values()):
            example = {name: column[part["example"]["position"] < end] for name, column in part["example"].items()}
            attempt, reason = example["attempt"], example["reason"]
            counted = reason[(attempt > 0) | (reason == _EMPTY)]
            self._counts[number, : len(REASONS)] += np.bincount(counted, minlength=len(REASONS)).astype(np.int32)
            worded = (example["caption_id"] > 0) & (attempt == 0)
            self._counts[number, _DRAWS:] += np.array(
                [attempt.size, (attempt == ATTEMPTS).sum(), worded.sum()], np.int32
            )

    def metrics(self) -> dict[str, float]:
        """Of what was added since the last call: replaced draws, in all and by reason; captions that are empty."""
        gathered = np.asarray(multihost_utils.process_allgather(self._counts), np.int64)
        self._newest = gathered.reshape(-1, *self._counts.shape).sum(0)
        self._counts[:] = 0
        self._all = self._all + self._newest
        counts = self._newest.sum(0)[: len(REASONS)]
        empty, counts[_EMPTY] = int(counts[_EMPTY]), 0
        named = {f"replaced/{r.replace(' ', '_')}": float(n) for r, n in zip(REASONS, counts, strict=True) if r and n}
        return {
            "replaced_examples": float(counts.sum()),
            **named,
            **({"empty_captions": float(empty)} if empty else {}),
        }

    def summary(self) -> str:
        """All replacements so far, and the empty captions, in one line; empty where there was neither."""
        replaced, empty, examples = self.by_reason, int(self._all[:, _EMPTY].sum()), f"{self.draws:,} examples"
        reasons = ", ".join(f"{n:,} {r}" for r, n in zip(REASONS, replaced, strict=True) if n)
        share = replaced.sum() / max(self.draws, 1)
        told = {
            f"{replaced.sum():,} of {examples} of {self._field} were replaced ({share:.2%}): {reasons}": reasons,
            f"{empty:,} of {examples} of {self._field} have an empty caption": empty,
        }
        return "; ".join(text for text, count in told.items() if count)

    def check(self, most: float = 1.0, *, last: bool = True) -> None:
        """Stops a run whose data are bad: by what was added until the last `metrics`.

        Args:
            most: share of examples that may be replaced.
            last: no more are to come, so that few examples must do.

        Raises:
            UserError: no example of a part can be used, or too many are replaced, or nearly all captions of a part are
                empty.
        """
        for name, newest, counts in zip(self._parts, self._newest, self._all, strict=True):
            which = self._field if len(self._parts) == 1 else f"{self._field} ({name})"
            if newest[_DRAWS] and newest[_NOTHING] == newest[_DRAWS]:
                reason = REASONS[int(newest[: len(REASONS)].argmax())]
                raise UserError(
                    f"{which}: not one of the last {newest[_DRAWS]:,} draws gave an example that can be used (most "
                    f"often: {reason}); --mode=inspect_data shows them"
                )
            captions = counts[_EMPTY] + counts[_WORDED]
            if captions and counts[_EMPTY] > _NEARLY_ALL * captions and (last or captions >= _FEW_CAPTIONS):
                raise UserError(
                    f"{which}: {counts[_EMPTY]:,} of {captions:,} captions are empty, or hold no word that the "
                    "tokenizer knows: is caption_key right? "
                    "--mode=inspect_data shows them; --config.data.modalities=image trains on pictures alone"
                )
        if self.draws >= _FEW_DRAWS and self.by_reason.sum() > most * self.draws:
            raise UserError(
                f"{self.summary()}; data.max_bad_fraction={most}. --mode=inspect_data shows them; "
                "raise the limit to train nevertheless"
            )
