"""Fields that are set on the command line: ``--config.optimizer.learning_rate=1e-3``."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from m3ae_jax.config.fields import Setting
from m3ae_jax.config.schema import OBJECTIVES, fields, set_objective
from m3ae_jax.errors import UserError

Overrides = list[tuple[str, str]]
"""Fields and the texts that are given for them."""


def split_overrides(arguments: list[str]) -> tuple[Overrides, list[str]]:
    """Separates ``--config.a.b=value`` (or ``--config.a.b value``) from a program's other arguments.

    Returns:
        The overrides as (path, text), and the remaining arguments.

    Raises:
        UserError: an override without a value.
    """
    overrides, rest, queue = [], [], iter(arguments)
    for argument in queue:
        match = re.fullmatch(r"--?config\.([^=]*)(?:=(.*))?", argument, flags=re.DOTALL)
        if not match:
            rest.append(argument)
            continue
        path, text = match[1], next(queue, "--") if match[2] is None else match[2]
        if match[2] is None and text.startswith("--"):
            raise UserError(f"--config.{path} needs a value, as --config.{path}=VALUE")
        overrides.append((path, text))
    return overrides, rest


def apply_overrides(config: ConfigDict, overrides: Overrides) -> None:
    """Sets fields from the command line's text, by the type that each field is declared with; the objective first.

    Raises:
        UserError: no such field (with the nearest one), a group instead of a field, or a value of another type.
    """
    for path, text in overrides:
        if path == "objective":
            set_objective(config, text)
    settings = fields(config)
    for path, text in overrides:
        if path not in settings:
            raise UserError(_no_such_field(path, settings))
        *parents, name = path.split(".")
        group = config
        for parent in parents:
            group = group[parent]
        group[name] = _parse(path, settings[path], group[name], text)


def nearest(path: str, settings: Mapping[str, Setting]) -> str:
    """The field most like `path`: of those with its last part as name or alias that in the nearest group, or any."""
    group, _, last = path.rpartition(".")
    same = [name for name, setting in settings.items() if last in (name.rpartition(".")[2], *setting.aliases)]
    if same:
        alike = {name: difflib.SequenceMatcher(None, group, name.rpartition(".")[0]).ratio() for name in same}
        return max(same, key=lambda name: (alike[name], -name.count(".")))
    return difflib.get_close_matches(path, settings, n=1, cutoff=0.0)[0]


def _no_such_field(path: str, settings: Mapping[str, Setting]) -> str:
    inside = [name for name in settings if name.startswith(path + ".")]
    if inside:
        return f"--config.{path} is a group of fields: set one of {', '.join(inside)}"
    group = path.rpartition(".")[0]
    siblings = [name for name in settings if name.rpartition(".")[0] == group]
    beside = ", ".join(siblings or sorted({name.split(".")[0] for name in settings}))
    near = nearest(path, settings)
    if (first := path.partition(".")[0]) in OBJECTIVES and first not in {name.partition(".")[0] for name in settings}:
        return f"--config.{path}: there are such fields with --config.objective={first} alone"
    return f"--config.{path}: no such field; did you mean --config.{near}? Beside it are: {beside}"


def _parse(path: str, setting: Setting, current: Any, text: str) -> Any:
    kind = type(setting.default)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return _parse_tuple(text, setting.item) if kind is tuple else kind(text)
    except (ValueError, SyntaxError, KeyError):
        said = {bool: "true or false", int: "an integer", float: "a number"}.get(kind, "a tuple such as")
        example = f" {current!r}" if kind is tuple else f" (now {current!r})"
        raise UserError(f"--config.{path}={text!r} is not {said}{example}") from None


def _parse_tuple(text: str, kind: type) -> tuple[Any, ...]:
    """A Python tuple or list, or bare items with commas, in brackets or not: ``(0.2, 1.0)``, ``image,text``."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        inside = text.strip()[1:-1] if text.strip()[:1] + text.strip()[-1:] in ("()", "[]") else text
        value = tuple(part.strip() for part in inside.split(",") if part.strip())
    value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not all(type(item) in ((str,) if kind is str else (int, float)) for item in value):
        raise ValueError(text)
    return tuple(map(kind, value))
