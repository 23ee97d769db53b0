"""Which run a folder holds: what may change when it goes on, and what would make it another run."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from m3ae_jax import config as config_lib
from m3ae_jax.errors import UserError

IDENTIFIES, FREE = "identifies", "free"

FIELDS: tuple[tuple[str, str], ...] = (
    # The first pattern that fits a field's name counts; each field of the config fits one (there is a test).
    ("seed", IDENTIFIES),
    ("objective", IDENTIFIES),
    ("batch_size", IDENTIFIES),
    ("duration", IDENTIFIES),  # the learning rate depends on it
    # How a step is computed: its numbers stay, up to rounding.
    *((field + ("*" if field.endswith(".") else ""), FREE) for field in config_lib.PROGRAM_FIELDS),
    ("model.*", IDENTIFIES),
    ("loss.*", IDENTIFIES),
    ("optimizer.*", IDENTIFIES),
    ("anomaly.spike", IDENTIFIES),
    ("anomaly.stop_after", FREE),
    # Where the data lie and how fast they are read; what they are is told by their fingerprint.
    ("data.train.path", FREE),
    ("data.mixture.*.path", FREE),
    ("data.val.*", FREE),
    ("data.threads", FREE),
    ("data.max_bad_fraction", FREE),
    ("data.*", IDENTIFIES),
    # What is told, saved and looked at.
    ("log_every", FREE),
    ("checkpoint.*", FREE),
    ("eval.*", FREE),
    ("evals", FREE),
    ("stall.*", FREE),
    ("profile", FREE),
    ("init_from", FREE),  # read once, before the first step
)
"""Patterns of config fields, and whether they identify a run or are free to change when it goes on."""

STATE = "state_version"


def kind(field: str) -> str:
    """`IDENTIFIES` or `FREE`.

    Raises:
        LookupError: the table does not know the field.
    """
    for pattern, found in FIELDS:
        if fnmatch.fnmatchcase(field, pattern):
            return found
    raise LookupError(f"train.identity.FIELDS does not say whether {field} identifies a run")


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a run is.

    Attributes:
        config: resolved.
        others: what else makes its numbers what they are (`Setup.identity`), by name.
        allowed: names, of fields or of `others`, that may differ from what is stored.
    """

    config: ConfigDict
    others: Mapping[str, Any]
    allowed: tuple[str, ...] = ()

    def check_allowed(self) -> None:
        """Refuses names that are none.

        Raises:
            UserError: with the nearest one.
        """
        names = [name for name in config_lib.names(self.config) if kind(name) == IDENTIFIES]
        names += [name for name in self.others if name != STATE]
        for name in self.allowed:
            if name not in names and not self._is_free(name):
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
                raise UserError(f"--allow_config_change={name}: no such field; did you mean {near}?")

    def _is_free(self, name: str) -> bool:
        return name in config_lib.names(self.config)

    def check(self, where: str, meta: Mapping[str, Any]) -> list[str]:
        """Refuses what is stored of another run.

        Args:
            where: the run, for the message.
            meta: ``config`` and, as far as stored, `others`.

        Returns:
            What differs and was allowed to, a line each.

        Raises:
            UserError: something that identifies a run has changed; it is named, with both values.
        """
        stored = config_lib.from_json(json.dumps(meta["config"]))
        changed = [c for c in config_lib.difference(stored, self.config) if kind(c[0]) == IDENTIFIES]
        changed += [(n, meta.get(n), now) for n, now in self.others.items() if len(meta) > 1 and meta.get(n) != now]
        told = {name: f"{name}={new!r} (the run has {old!r})" for name, old, new in changed}
        refused = [name for name in told if name == STATE or name not in self.allowed]
        if refused:
            ways = "choose another --workdir, or start a new run from its weights with --config.init_from"
            if STATE not in refused:
                ways += f", or go on nevertheless with --allow_config_change={','.join(refused)}"
            raise UserError(f"{where} holds another run: {'; '.join(told[name] for name in refused)}; {ways}")
        return list(told.values())
