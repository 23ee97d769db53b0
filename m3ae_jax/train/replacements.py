"""Examples that did not decode and were replaced: counted, reported, and too many of them refused."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from m3ae_jax.data.images import REASONS
from m3ae_jax.data.order import ATTEMPTS
from m3ae_jax.errors import UserError

_FEW_DRAWS = 1000  # before so many a share of bad examples says little


class Replacements:
    """Counts candidates that did not decode, over all processes: what is decided by it, all must decide alike."""

    def __init__(self) -> None:
        self._counts = np.zeros(len(REASONS) + 2, np.int32)  # replaced by reason, draws, draws that gave nothing
        self.by_reason = np.zeros(len(REASONS), np.int64)
        self.draws = 0
        self._nothing = False

    def add(self, batch: dict[str, Any]) -> None:
        """Takes the attempts of this process's rows of a batch, ``{part: rows}``."""
        for part in batch.values():
            attempt, reason = part["example"]["attempt"], part["example"]["reason"]
            self._counts[: len(REASONS)] += np.bincount(reason[attempt > 0], minlength=len(REASONS)).astype(np.int32)
            self._counts[-2:] += np.array([attempt.size, (attempt == ATTEMPTS).sum()], np.int32)

    def metrics(self) -> dict[str, float]:
        """Of what was added since the last call: replaced draws, in all and by reason."""
        gathered = np.asarray(multihost_utils.process_allgather(self._counts), np.int64)
        *counts, draws, nothing = gathered.reshape(-1, len(self._counts)).sum(0)
        self._counts[:] = 0
        self.by_reason += counts
        self.draws += int(draws)
        self._nothing = bool(nothing == draws)
        named = {f"replaced/{r.replace(' ', '_')}": float(n) for r, n in zip(REASONS, counts, strict=True) if r and n}
        return {"replaced_examples": float(sum(counts)), **named}

    def summary(self) -> str:
        """All replacements so far, in one line."""
        reasons = ", ".join(f"{n:,} {r}" for r, n in zip(REASONS, self.by_reason, strict=True) if n)
        share = self.by_reason.sum() / max(self.draws, 1)
        return f"{self.by_reason.sum():,} of {self.draws:,} examples were replaced ({share:.2%}): {reasons}"

    def check(self, most: float) -> None:
        """Stops a run whose data are bad.

        Raises:
            UserError: as said.
        """
        if self._nothing:
            raise UserError("not one of the last draws gave a picture that decodes: is data.train right?")
        if self.draws >= _FEW_DRAWS and self.by_reason.sum() > most * self.draws:
            raise UserError(
                f"{self.summary()}; data.max_bad_fraction={most}. --mode=inspect_data shows them; "
                "raise the limit to train nevertheless"
            )
