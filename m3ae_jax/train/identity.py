"""Which run a folder holds: what may change when it goes on, and what would make it another run."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from m3ae_jax.checkpoint import meta as meta_lib
from m3ae_jax.config.files import from_json
from m3ae_jax.config.schema import identifies, leaves, same_objective
from m3ae_jax.data.order import order_version
from m3ae_jax.errors import UserError

STATE, ORDER = "state_version", "order_version"


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
        """Refuses names in `allowed` that do not exist.

        Raises:
            UserError: with the nearest one.
        """
        fields = list(leaves(self.config))
        names = [name for name in fields if self._identifies(name)]
        names += [name for name in self.others if name != STATE]
        for name in self.allowed:
            if name not in names and name not in fields:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
                raise UserError(f"--allow_config_change={name}: no such field; did you mean {near}?")

    def _identifies(self, name: str) -> bool:
        return identifies(name, self.config.objective)

    def check(self, where: str, meta: Mapping[str, Any]) -> list[str]:
        """Refuses the stored state of another run.

        Args:
            where: the run, for the message.
            meta: ``config`` and, as far as stored, `others`.

        Returns:
            What differs and was allowed to, a line each.

        Raises:
            UserError: something that identifies a run has changed; it is named, with both values. Or a newer program
                made the state.
        """
        meta_lib.refuse_newer(meta, where)
        stored = from_json(meta_lib.config_of(meta, where))
        changes = [change for change in same_objective(stored, self.config) if self._identifies(change[0])]
        changes += [(n, meta.get(n), now) for n, now in self.others.items() if len(meta) > 1 and meta.get(n) != now]
        lines = {name: f"{name}={new!r} (the run has {old!r})" for name, old, new in changes}
        refused = [name for name in lines if name == STATE or name not in self.allowed]
        if refused:
            ways = "choose another --workdir, or start a new run from its weights with --config.init_from"
            if STATE not in refused:
                ways += f", or go on nevertheless with --allow_config_change={','.join(refused)}"
            if ORDER in refused and meta.get(ORDER) == order_version(crop_rule=1):
                ways = f"to go on with the crops that it began with add --config.data.crop_rule=1; or {ways}"
            raise UserError(f"{where} holds another run: {'; '.join(lines[name] for name in refused)}; {ways}")
        return list(lines.values())
