"""The tokenizer that a run's folder holds: with it the folder can be moved to another machine, as the weights can."""

from __future__ import annotations

import logging
from pathlib import Path

from m3ae_jax.atomic import replacing, set_aside
from m3ae_jax.data.text import KINDS, Tokenizer, load_tokenizer, tokenizer_file
from m3ae_jax.errors import UserError

log = logging.getLogger("m3ae_jax")

HOW = "give its file: --config.data.tokenizer=FILE"


def held(run: Path) -> Path | None:
    """The tokenizer's file in a run's folder, ``tokenizer.model``, ``.txt`` or ``.json``; None if it holds none."""
    return next((file for file in _places(run) if file.is_file()), None)


def _places(run: Path) -> list[Path]:
    return [run / f"tokenizer{ending}" for ending in KINDS]


def keep(path: str, run: Path) -> None:
    """Copies a tokenizer's file into a run's folder; nothing where the file is gone, as then the run has its copy.

    Another one there, which may be somebody's own, is set aside.

    Args:
        path: as `load_tokenizer` takes it.
        run: the folder, made if missing.

    Raises:
        OSError: it cannot be written.
    """
    file = tokenizer_file(path)
    if not file.is_file():
        return
    content, copy = file.read_bytes(), run / f"tokenizer{file.suffix}"
    if file.resolve() in [place.resolve() for place in _places(run)]:
        return
    for place in _places(run):
        if place.exists() and (place != copy or place.read_bytes() != content):
            log.warning("%s is not the tokenizer of this run: renamed to %s", place, set_aside(place, ".former").name)
    with replacing(copy) as fresh:
        fresh.write_bytes(content)


def of_run(path: str, run: Path | None, how: str, fingerprint: str = "", words: int = 0) -> Tokenizer:
    """A run's tokenizer: the file that its config names, or the copy in the run's folder.

    Args:
        path: ``data.tokenizer``.
        run: the folder; None: there is none.
        how: to name another file, for the message.
        fingerprint: of the one that is wanted; empty: any.
        words: its number of ids; 0: any.

    Raises:
        UserError: neither is there, or both are others.
    """
    copies, troubles = [str(file) for file in _places(run) if file.is_file()] if run else [], []
    for place in filter(None, (path, *copies)):
        try:
            tokenizer = load_tokenizer(place, "")
        except UserError as error:
            troubles.append(str(error))
            continue
        if words not in (0, tokenizer.vocab_size):
            troubles.append(f"tokenizer={place!r} has {tokenizer.vocab_size} words, the model {words}")
        elif fingerprint not in ("", tokenizer.fingerprint):
            troubles.append(f"tokenizer={place!r} is another one than the model was trained with")
        else:
            if troubles:
                log.info("%s: using %s", "; ".join(troubles), place)
            return tokenizer
    if run and not copies:
        troubles.append(f"{run} holds no {', '.join(place.name for place in _places(run))}")
    raise UserError(f"{'; '.join(troubles) or 'no tokenizer is named'}; {how}")


def open_tokenizer(path: str, run: Path) -> Tokenizer:
    """The tokenizer of a run that has one, else the one that is named.

    Raises:
        UserError: it is not there.
    """
    return of_run(path, run, HOW) if held(run) else load_tokenizer(path)
