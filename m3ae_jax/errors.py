"""A user's mistake: one line, never a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user's, told in one line: what, where, the value, what is allowed."""


class Stopped(Exception):
    """A run was asked to stop before its end; its state is saved, and the same command goes on."""


STOPPED = (
    75  # exit code of such a run: "try again later" (EX_TEMPFAIL), so that a launcher tells it from a finished one
)


LOST = "lost another process of the run; start all again: the same command goes on from the last checkpoint"


def one_of(name: str, value: object, allowed: Iterable[str]) -> str:
    """Says that `value` of field `name` is not allowed, what is, and the nearest valid one.

    >>> one_of("data.train.source", "scnes", ["scenes", "webdataset"])
    "data.train.source='scnes' is not one of scenes, webdataset; did you mean 'scenes'?"
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{name}={value!r} is not one of {', '.join(names)}{hint}"
