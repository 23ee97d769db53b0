"""How a field of the configuration is declared: once, in a class beside the code that reads it.

    class StallFields(FieldGroup):
        report_after: float = setting(600.0, low=0.0)
        \"\"\"What it means: ``docs/config.md`` is made of these.\"\"\"

`schema.GROUPS` says where a group stands in the config.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is declared of a field.

    Attributes:
        default: its value without a config; the field's type is that of its default, of tuples' items that of the
            first, or text.
        low: least value, of a tuple's items too; of a duration 0 if it may be 0.
        high: greatest value.
        choices: the texts that are allowed, of a tuple's items too.
        duration: "N steps", "N examples" or "N epochs"; where the default is empty, it may be empty.
        identifies: a run whose value differs is another run.
        program: it changes how a step is computed, and neither its numbers (up to rounding, and to which numbers
            dropout draws) nor the parameters.
        loss: it changes the loss alone, not what the parameters mean.
        weights: it names weights that a run starts from.
        aliases: names by which it may be looked for.
        hint: what else may have been meant by a value that is none of the choices.
    """

    default: Any
    low: float | None = None
    high: float = 10**12
    choices: tuple[str, ...] = ()
    duration: bool = False
    identifies: bool = True
    program: bool = False
    loss: bool = False
    weights: bool = False
    aliases: tuple[str, ...] = ()
    hint: str = ""

    @property
    def item(self) -> type:
        """The type of a tuple's items."""
        return type(self.default[0]) if self.default else str


def setting(default: Any, **options: Any) -> Any:
    """A field of the config, in a `FieldGroup`; the options are those of `Setting`."""
    return dataclasses.field(default=default, metadata={"setting": Setting(default, **options)})


class FieldGroup:
    """A group of fields. Where a group's values are wanted as an object it is a frozen dataclass besides."""

    @staticmethod
    def check(config: ConfigDict, path: str) -> None:
        """Refuses values that do not fit together, and fills in what follows from others.

        `resolve` calls it once each field is right by itself.

        Args:
            config: the whole.
            path: where in it the group stands.

        Raises:
            UserError: as said.
        """


def declared(group: type) -> dict[str, Setting]:
    """The fields of a group, in order."""
    members: dict[str, Any] = {}
    for kind in reversed(group.__mro__):
        members |= vars(kind).get("__dataclass_fields__", vars(kind))
    fields = {name: member for name, member in members.items() if isinstance(member, dataclasses.Field)}
    return {name: field.metadata["setting"] for name, field in fields.items() if "setting" in field.metadata}
