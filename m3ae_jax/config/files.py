"""Configs in files: a Python file with ``get_config()``, or the ``config.json`` that a run saved."""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
import shlex
import traceback
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import m3ae_jax.config.schema as schema
from m3ae_jax.config.checks import typed
from m3ae_jax.config.fields import Setting, declared
from m3ae_jax.config.overrides import Overrides, nearest
from m3ae_jax.errors import UserError

_BUILDER = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]")  # of tfds: ``module:BuilderClass``; not ``mnist:3.0.1``, ``gs://``
_FORMER = "377e22f"  # the last commit whose fields had the former names


def load(path: str) -> ConfigDict:
    """Loads a config: a Python file with ``get_config()``, or the ``config.json`` that a run saved.

    Raises:
        UserError: no such file (with the nearest one beside it), or it gives no config.
    """
    file = Path(path)
    if not file.is_file():
        beside = sorted(p.name for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        near = difflib.get_close_matches(file.name, beside, n=1)
        hint = f"; did you mean {file.parent / near[0]}?" if near else ""
        listed = f" (there are {', '.join(beside)})" if beside else ""
        raise UserError(f"--config={path!r}: no such file{listed}{hint}")
    if file.suffix == ".json":
        return from_json(file.read_bytes())
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path!r} is neither a Python file nor a run's config.json")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config={path!r} has no function get_config()")
        config = module.get_config()
    except UserError:
        raise
    except Exception as error:
        lines = [line for line in traceback.extract_tb(error.__traceback__) if line.filename == str(file)]
        where = f", line {lines[-1].lineno}" if lines else ""
        text = " ".join(str(error).split())
        raise UserError(f"--config={path!r}{where}: {type(error).__name__}: {text}") from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={path!r}: get_config() returns a {type(config).__name__}, not a ConfigDict")
    _check_objective(path, config)
    return _merged(config.to_dict())


def _check_objective(path: str, config: ConfigDict) -> None:
    """Refuses a config whose objective was changed without its group of fields."""
    objective = str(config.get("objective", "m3ae"))
    schema.objective_class(objective)
    groups, wanted = schema.objective_groups(config), schema.objective_fields(objective)
    if "model" in config and set(wanted) - set(groups):
        raise UserError(
            f"--config={path!r} sets objective={objective!r} but has no group {', '.join(wanted)}: "
            f"start from default({objective!r})"
        )


def to_json(config: ConfigDict) -> str:
    """The config as JSON (tuples become lists; `from_json` turns them back)."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str | bytes) -> ConfigDict:
    """Reads what `to_json` wrote. Nothing is imported for it but the project's own modules.

    Raises:
        UserError: a field is unknown to this version, or the text is no JSON object.
    """
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the config is not JSON: {error}") from None
    if not isinstance(stored, dict):
        raise UserError("the config is not a JSON object")
    model = stored.get("model")
    if "loss" in stored or (isinstance(model, dict) and "decoder_width" in model):
        raise UserError(f"the config has the fields of an earlier version: check out commit {_FORMER} to use its run")
    return _merged(stored)


def _merged(stored: dict[str, Any]) -> ConfigDict:
    """The defaults with what is stored."""
    objective = typed("objective", Setting(""), stored.get("objective", "m3ae"))
    if ":" not in objective or schema.objective_fields(objective):
        config = schema.default(objective)
    else:
        config = schema.default()
        _take_unknown_group(config, objective, stored)
    _merge(config, config, stored, "")
    return config


def _take_unknown_group(config: ConfigDict, objective: str, stored: dict[str, Any]) -> None:
    """Takes the group of an objective whose class must not be imported for it, with the types of its values."""
    for name in schema.objective_groups(config):
        del config[name]
    config.objective = objective
    for name, group in stored.items():
        if name not in config and isinstance(group, dict) and not schema.objective_groups(config):
            values = {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}
            if not all(key.isidentifier() and not key.startswith("_") for key in (name, *values)):
                raise UserError(f"the config's group {name!r} has names that no field has")
            config[name] = ConfigDict(values, type_safe=False)


def _merge(config: ConfigDict, group: ConfigDict, stored: dict[str, Any], path: str) -> None:
    for key, value in stored.items():
        name = schema.join(path, key)
        if path == "data.mixture":
            if "." in key:
                raise UserError(f"the config's {name}: the name of a source has no dot")
            group[key] = schema.source_fields()
        if key not in group:
            near = nearest(name, schema.fields(config))
            raise UserError(f"the config's field {name} is unknown here; did you mean {near}?")
        if not isinstance(group[key], ConfigDict):
            setting = declared(schema.class_of(path, config.objective)).get(key) or Setting(group[key])
            group[key] = typed(name, setting, value)
        elif isinstance(value, dict):
            _merge(config, group[key], value, name)
        else:
            raise UserError(f"the config's {name}={value!r} should be a group of fields")


def check_named_code(path: str, config: ConfigDict, overrides: Overrides) -> None:
    """Refuses code that a run's config.json names by an import path, unless the command line names it too.

    Such a file comes with other people's checkpoints, and what it names would be imported and so run. A Python file
    is code itself: who gives one has decided.

    Args:
        path: the file that the config was loaded from.
        config: with the overrides applied.
        overrides: those of the command line, as (path, text).

    Raises:
        UserError: it names code; with the overrides that allow it.
    """
    if Path(path).suffix != ".json":
        return
    given = {field for field, _ in overrides}
    named = {field: value for field, value in _named_code(config).items() if field not in given}
    if not named:
        return
    said = ", ".join(f"{field}={value!r}" for field, value in named.items())
    # Quoted, as the line may be copied into a shell.
    allow = " ".join(shlex.quote(f"--config.{field}={_printable(value)}") for field, value in named.items())
    raise UserError(f"{path} names code to import: {said}; if you trust it, name it on the command line too: {allow}")


def _named_code(config: ConfigDict) -> dict[str, str]:
    """The fields that hold an import path, ``package.module:Class``."""
    named = {"objective": str(config.objective)}
    for path, group in schema.groups(config):
        if path.startswith(("data.", "eval.")) and "source" in group:
            named[f"{path}.source"] = str(group.source)
            if group.source == "tfds" and _BUILDER.match(str(group.path)):
                named[f"{path}.path"] = group.path
    return {field: value for field, value in named.items() if ":" in value}


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)[1:-1]
