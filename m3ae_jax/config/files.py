"""Configs in files: a Python file with ``get_config()``, or the ``config.json`` that a run saved."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import m3ae_jax.checkpoint.meta as checkpoint_meta
import m3ae_jax.config.schema as schema
import m3ae_jax.configs as configs
from m3ae_jax.config.checks import typed
from m3ae_jax.config.fields import Setting, declared
from m3ae_jax.config.overrides import Overrides, nearest
from m3ae_jax.errors import UserError
from m3ae_jax.paths import local

log = logging.getLogger("m3ae_jax")

_BUILDER = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]")  # of tfds: ``module:BuilderClass``; not ``mnist:3.0.1``, ``gs://``
_FORMER = "377e22f"  # the last commit whose fields had the former names


def load(name: str) -> ConfigDict:
    """Loads a config: a Python file with ``get_config()``, or the ``config.json`` that a run saved.

    Where a run's cannot be read, the copy in its newest checkpoint is taken, with a warning.

    Args:
        name: a path; its ``.py`` may be left out, and then a config of `m3ae_jax.configs` is looked for too. A file of
            the current folder comes first.

    Raises:
        UserError: no such file (with all that there are and the nearest), or it gives no config.
    """
    given = local(name, "--config").absolute()
    if given.suffix == ".json" and (stored := _of_run(given)) is not None:
        return _of_file(str(given), stored)
    file = _find(name)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={name!r} is neither a Python file nor a run's config.json")
    module = importlib.util.module_from_spec(spec)
    try:
        with _importing_beside(file):
            spec.loader.exec_module(module)
            if not hasattr(module, "get_config"):
                raise UserError(f"--config={name!r} has no function get_config()")
            config = module.get_config()
    except UserError:
        raise
    except Exception as error:
        lines = [line for line in traceback.extract_tb(error.__traceback__) if line.filename == str(file)]
        where = f", line {lines[-1].lineno}" if lines else ""
        text = " ".join(str(error).split())
        raise UserError(f"--config={name!r}{where}: {type(error).__name__}: {text}") from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={name!r}: get_config() returns a {type(config).__name__}, not a ConfigDict")
    _check_objective(name, config)
    return _of_file(f"--config={name!r}", config.to_dict())


def _of_file(file: str, stored: dict[str, Any]) -> ConfigDict:
    """`_merged`, with the file's name before what is wrong in it."""
    try:
        return _merged(stored)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _find(name: str) -> Path:
    """The absolute path of the file that `load` is to read."""
    given = local(name, "--config").absolute()
    shipped = configs.files()
    if os.path.isfile(given):  # unlike Path.is_file also where a folder may not be read
        return given
    own = Path(f"{given}.py")
    if not given.suffix and os.path.isfile(own):
        if name in shipped:
            log.info("--config=%s is %s, and not the config of that name in m3ae_jax.configs", name, own)
        return own
    if name in shipped:
        return shipped[name]
    if Path(name).parent == Path("configs") and Path(name).suffix in ("", ".py") and Path(name).stem in shipped:
        log.info("--config=%s is not in this folder: taking the %s of m3ae_jax.configs", name, Path(name).stem)
        return shipped[Path(name).stem]
    raise _missing(name, given)


def _missing(name: str, given: Path) -> UserError:
    if os.path.isfile(given / "config.json"):
        return UserError(f"--config={name!r} is a folder; did you mean {Path(name) / 'config.json'}?")
    beside = {file.stem: str(Path(name).with_name(file.name)) for file in given.parent.glob("*.py")}
    choices = {stem: stem for stem in configs.files()} | beside
    near = difflib.get_close_matches(given.stem.lower(), choices, n=1)
    hint = f"; did you mean {choices[near[0]]}?" if near else ""
    return UserError(f"--config={name!r}: no such file (there are {', '.join(sorted(choices.values()))}){hint}")


@contextlib.contextmanager
def _importing_beside(file: Path) -> Iterator[None]:
    """A config may import files beside it, as a script may.

    They are forgotten afterwards: those of another config may have the same names, and these may be edited.
    """
    folder, known = file.parent, set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        new = {name: name.partition(".")[0] for name in sys.modules if name not in known}
        local = {top for top in new.values() if top in new and _lies_in(folder, top)}
        for name, top in new.items():
            if top in local:
                del sys.modules[name]


def _lies_in(folder: Path, name: str) -> bool:
    """Whether an imported module or package is one of a folder's own."""
    spec = getattr(sys.modules[name], "__spec__", None)
    places = [*(spec.submodule_search_locations or [spec.origin])] if spec else []
    return str(folder / name) in places or str(folder / f"{name}.py") in places


def _of_run(file: Path) -> dict[str, Any] | None:
    """The fields that a run saved, in its file or in its newest checkpoint; None if neither exists.

    Raises:
        UserError: the file cannot be read, and there is no checkpoint.
    """
    try:
        return _fields(file.read_bytes())
    except FileNotFoundError:
        wrong = "is missing"
    except OSError as error:
        wrong = f"cannot be read ({error.strerror})"
    except _NoObject as error:
        wrong = f"is damaged: {error}"
    found = checkpoint_meta.newest(file.parent / "checkpoints")
    if found:
        checkpoint, meta = found
        log.warning("%s %s; taking the copy of the config in %s", file, wrong, checkpoint)
        stored: dict[str, Any] = checkpoint_meta.field(meta, "config", dict, f"checkpoint {checkpoint}")
        return stored
    if file.is_file():
        raise UserError(f"{file} {wrong}; and there is no checkpoint beside it with a copy of the config")
    return None


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
        return _merged(_fields(text))
    except _NoObject as error:
        raise UserError(f"the config is {error}") from None


class _NoObject(Exception):
    """A text is no JSON object."""


def _fields(text: str | bytes) -> dict[str, Any]:
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _NoObject(f"not JSON: {error}") from None
    if not isinstance(stored, dict):
        raise _NoObject("not a JSON object")
    return stored


def _merged(stored: dict[str, Any]) -> ConfigDict:
    """The defaults with what is stored."""
    model = stored.get("model")
    if "loss" in stored or (isinstance(model, dict) and "decoder_width" in model):
        raise UserError(f"the config has the fields of an earlier version: check out commit {_FORMER} to use its run")
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
    allow = " ".join(_allowing(named))
    raise UserError(f"{path} names code to import: {said}; if you trust it, name it on the command line too: {allow}")


def allowing_named_code(config: ConfigDict) -> list[str]:
    """The overrides, quoted for a shell, without which a run's config.json that names code is refused."""
    return _allowing(_named_code(config))


def _allowing(named: dict[str, str]) -> list[str]:
    return [shlex.quote(f"--config.{field}={_printable(value)}") for field, value in named.items()]


def _named_code(config: ConfigDict) -> dict[str, str]:
    """The fields that hold an import path, ``package.module:Class``, as text."""
    named = {"objective": str(config.objective), "metrics.writers": ",".join(config.metrics.writers)}
    for path, group in schema.groups(config):
        if path.startswith(("data.", "eval.")) and "source" in group:
            named[f"{path}.source"] = str(group.source)
            if group.source == "tfds" and _BUILDER.match(str(group.path)):
                named[f"{path}.path"] = group.path
    return {field: value for field, value in named.items() if ":" in value}


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)[1:-1]
