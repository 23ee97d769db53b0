"""The checks of a config's values, and the values that follow from others."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from m3ae_jax.config.durations import parse_duration
from m3ae_jax.config.fields import Setting
from m3ae_jax.config.schema import class_of, fields, groups, join, objective_groups
from m3ae_jax.errors import UserError, one_of


def resolve(config: ConfigDict) -> ConfigDict:
    """A checked copy with what follows from other fields filled in, as the encoder's size.

    Raises:
        UserError: a value that cannot work; it names the field, the value and what is allowed.
    """
    config = config.copy_and_resolve_references()
    settings, paths = fields(config), dict(groups(config))
    for path, group in paths.items():
        for name in group:
            if setting := settings.get(join(path, name)):
                group[name] = typed(join(path, name), setting, group[name])
                _check(join(path, name), setting, group[name])
    own = objective_groups(config)
    for path in [*(path for path in paths if path not in own), *own]:  # the objective's builds on what the others say
        class_of(path, config.objective).check(config, path)
    return config


def typed(name: str, setting: Setting, value: Any) -> Any:
    """A value as its field's type: a list becomes a tuple, a whole number a float where one is declared.

    Raises:
        UserError: it is of another type.
    """
    kind = type(setting.default)
    if setting.duration and type(value) in (int, float):
        return str(value)  # refused by `resolve`, which says what is meant
    if kind is float and type(value) is int:
        return float(value)
    if kind is tuple and isinstance(value, (tuple, list)):
        return tuple(typed(name, Setting(setting.item()), item) for item in value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"the config's field {name}={value!r} is not of type {kind.__name__}")
    return value


def _check(name: str, setting: Setting, value: Any) -> None:
    """Refuses a value that the field's declaration does not allow."""
    items = value if isinstance(value, tuple) else (value,)
    for item in items:
        if setting.choices and item not in setting.choices:
            raise UserError(one_of(name, item, setting.choices) + (f"; {setting.hint}" if setting.hint else ""))
    if setting.duration:
        if (value or setting.default) and parse_duration(name, value)[0] == 0 and setting.low is None:
            raise UserError(f"{name}={value!r}: must be more than 0")
    elif setting.low is not None and not all(setting.low <= item <= setting.high for item in items):
        numbers = ": numbers" if items is value else " is not"
        bounds = (
            f"from {setting.low} on" if setting.high == Setting.high else f"between {setting.low} and {setting.high}"
        )
        raise UserError(f"{name}={value!r}{numbers} {bounds}")
