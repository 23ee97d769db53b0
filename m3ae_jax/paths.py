"""Paths of this machine, as people write them."""

from __future__ import annotations

import os
from pathlib import Path

from m3ae_jax.errors import UserError


def local(path: str | os.PathLike[str], name: str) -> Path:
    """A file or folder of this machine, ``~`` and ``~user`` taken for the folder they stand for.

    Args:
        path: as it was given.
        name: of the flag or field that gave it, for the message.

    Raises:
        UserError: it is an address of a store: as a path it would be a folder ``gs:`` here.
    """
    if "://" in str(path):
        raise UserError(f"{name}={str(path)!r} is an address, and a path of this machine is needed: mount the store")
    return Path(os.path.expanduser(path))
