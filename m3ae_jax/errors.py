"""A user's mistake: one line, never a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user's, told in one line: what, where, the value, what is allowed."""


class EverywhereError(UserError):
    """One that all processes of a run raise together."""


class Stopped(Exception):
    """A run was asked to stop before its end; its state is saved, and the same command goes on."""


MISTAKE = 2  # exit code after a user's mistake, which no new start mends


STOPPED = (
    75  # exit code of such a run: "try again later" (EX_TEMPFAIL), so that a launcher tells it from a finished one
)

INTERRUPTED = 130  # by SIGINT, as shells say it


LOST = "lost another process of the run; start all again: the same command goes on from the last checkpoint"


def one_of(name: str, value: object, allowed: Iterable[str]) -> str:
    """Says that `value` of field `name` is not allowed, what is, and the nearest valid one.

    >>> one_of("data.train.source", "scnes", ["scenes", "webdataset"])
    "data.train.source='scnes' is not one of scenes, webdataset; did you mean 'scenes'?"
    """
    names = sorted(allowed)
    folded = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(value).lower(), folded, n=1)
    hint = f"; did you mean {folded[near[0]]!r}?" if near else ""
    return f"{name}={value!r} is not one of {', '.join(names)}{hint}"
