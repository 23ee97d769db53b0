"""What the figures of an evaluation say, in one sentence, which ends its table.

A difference counts as shown where its 95 % interval leaves out 0. Figures of the same test examples get the interval
of two independent ones: where both find the same examples easy, it is wider than need be.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

_Z = 1.96  # standard errors of a 95 % interval


@dataclasses.dataclass(frozen=True)
class Measured:
    """A figure in [0, 1], the higher the better.

    Attributes:
        name: whose figure it is.
        value: of it.
        centre: of its interval; nearer to a half than the value, of few examples.
        error: the standard error.
    """

    name: str
    value: float
    centre: float
    error: float

    @classmethod
    def share(cls, name: str, value: float, examples: float, interval: float = 0.0) -> Measured:
        """A share of test examples, such as an accuracy.

        Two examples are added, of which one is right: Agresti and Caffo, The American Statistician 54 (2000).

        Args:
            name: whose it is.
            value: the share.
            examples: of how many.
            interval: half the 95 % interval that it has for other reasons, such as drawn training examples.
        """
        near = (value * examples + 1) / (examples + 2)
        return cls(name, value, near, math.hypot(math.sqrt(near * (1 - near) / (examples + 2)), interval / _Z))

    @classmethod
    def area(cls, name: str, value: float, inside: int, outside: int) -> Measured:
        """An area under a ROC curve, of so many examples of each kind: Hanley and McNeil, Radiology 143 (1982)."""
        few = min(inside, outside)
        near = (value * few + 1) / (few + 2)  # as of a share: an area of 1 has an error too
        one, two = near / (2 - near), 2 * near**2 / (1 + near)
        variance = near * (1 - near) + (outside - 1) * (one - near**2) + (inside - 1) * (two - near**2)
        return cls(name, value, near, math.sqrt(variance / (inside * outside)))


def compared(subject: str, trained: Iterable[Measured], others: Iterable[Measured]) -> str:
    """``subject: NAME 0.512, +0.101 [+0.05, +0.15] to NAME (0.411): better``, of the best on both sides."""
    best, rival = (max(side, key=lambda one: one.value) for side in (trained, others))
    middle, around = best.centre - rival.centre, _Z * math.hypot(best.error, rival.error)
    low, high = middle - around, middle + around
    against = f"{best.name} {best.value:.3f}, {best.value - rival.value:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"{subject}: {against} to {rival.name} ({rival.value:.3f}): {told(low, high)}"


def told(
    low: float, high: float, better: str = "better", worse: str = "worse", neither: str = "no difference shown"
) -> str:
    """What an interval of differences shows."""
    if low > 0:
        return better
    return worse if high < 0 else neither


def sentence(clauses: Iterable[str], about: str = "") -> str:
    """The one sentence of an evaluation, from clauses."""
    said = "; ".join(clause for clause in clauses if clause)
    return f"Verdict: {said}{f' ({about})' if about else ''}." if said else ""


def helped(improvements: Mapping[str, tuple[float, float]]) -> str:
    """The sentence on what the other modality of the same example helps to restore.

    Args:
        improvements: by what is restored, the 95 % interval of how much better it is than with another example's.
    """
    found: dict[str, list[str]] = {}
    for subject, (low, high) in improvements.items():
        found.setdefault(told(low, high, "helps to restore", "harms", "shows no difference for"), []).append(subject)
    clauses = [f"{what} {', '.join(subjects)}" for what, subjects in found.items()]
    return sentence([f"the true picture or caption, beside another example's, {'; it '.join(clauses)}"])
