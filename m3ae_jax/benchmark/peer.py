"""Training steps of other programs to time beside ours: the modules of ``peers/``, listed from that folder.

Each has a class ``Step``, a `Peer`; the module's name is what ``--against`` takes.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from pathlib import Path
from typing import ClassVar, Protocol

from ml_collections import ConfigDict

from m3ae_jax.errors import UserError, one_of


@dataclasses.dataclass(frozen=True)
class Needs:
    """Of which configs a peer computes the same as this project.

    Attributes:
        objective: its name in a config.
        modalities: of the data, in order.
        hint: what the peer knows and which config to take, for an error.
    """

    objective: str
    modalities: tuple[str, ...]
    hint: str


class Peer(Protocol):
    """A training step of another program, ready to run, with a batch of a config's sizes in place.

    It is made of a resolved config and the mean length of a caption.

    Attributes:
        needs: of which configs it computes the same as this project.
        name: what it is, for people.
    """

    needs: ClassVar[Needs]
    name: str

    def __init__(self, config: ConfigDict, caption_tokens: float) -> None: ...

    def run(self, steps: int) -> None:
        """Runs steps to their end."""

    def peak_bytes(self) -> int | None:
        """The most that the device held; None where that is not known."""


def names() -> list[str]:
    """What ``--against`` takes."""
    return sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "peers")]))


def build(name: str, config: ConfigDict, caption_tokens: float, devices: int) -> Peer:
    """The step of a peer for a resolved config.

    Args:
        name: one of `names`.
        config: resolved.
        caption_tokens: mean length of a caption.
        devices: on which this project's own step runs.

    Raises:
        UserError: there is no such peer, it is not installed, or it does not compute this config's step.
    """
    if name not in names():
        raise UserError(one_of("--against", name, names()))
    step: type[Peer] = importlib.import_module(f"m3ae_jax.benchmark.peers.{name}").Step
    needs, modalities = step.needs, tuple(config.data.modalities)
    if modalities != needs.modalities:
        raise UserError(f"--against={name} with data.modalities={modalities!r}: it knows {needs.hint}")
    if devices > 1:
        raise UserError(f"--against={name} on {devices} devices: the other program runs on one")
    if config.objective != needs.objective:
        raise UserError(
            f"--against={name} with objective={config.objective!r}: it computes what {needs.objective} does"
        )
    if config.data.mixture:
        raise UserError(f"--against={name} with data.mixture: the other program has one source")
    return step(config, caption_tokens)
