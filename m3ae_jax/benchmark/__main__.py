r"""Measures a part of the program on this machine.

    python -m m3ae_jax.benchmark --what=step
    python -m m3ae_jax.benchmark --what=step --config=mae --against=vit_mae --config.batch_size=8
    python -m m3ae_jax.benchmark --what=step --config=base --against=m3ae --config.batch_size=8
    python -m m3ae_jax.benchmark --what=step --config=mamo --against=config=base --config.batch_size=8
    python -m m3ae_jax.benchmark --what=end_to_end
    python -m m3ae_jax.benchmark --what=init --config=base
    python -m m3ae_jax.benchmark --what=checkpoint --config=base
    python -m m3ae_jax.benchmark --what=encode --config=base
    python -m m3ae_jax.benchmark --what=input
    python -m m3ae_jax.benchmark --what=input --config=base --own_data --config.data.train.path=SHARDS
    python -m m3ae_jax.benchmark --what=index
    python -m m3ae_jax.benchmark --what=guard
    python -m m3ae_jax.benchmark --what=features

`--output=FILE` saves the figures as JSON; `--compare=FILE` sets them beside those of an earlier run.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
from pathlib import Path
from typing import Any

import m3ae_jax.console as console

console.quiet_environment()

from absl import flags  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

import m3ae_jax.command_line as command_line  # noqa: E402
import m3ae_jax.config as config_lib  # noqa: E402
from m3ae_jax.benchmark import compare, peer  # noqa: E402
from m3ae_jax.errors import UserError, one_of  # noqa: E402

_SMALL = ("step", "end_to_end", "init", "checkpoint", "encode", "guard")
_LARGE = ("input", "index", "features")
WHAT = dict.fromkeys(_SMALL, "tiny") | dict.fromkeys(_LARGE, "base")
"""What can be measured, a module of this folder each, and of which config unless one is named."""

_WITH_TENSORFLOW = ("end_to_end", "input", "index")

_WHAT = flags.DEFINE_string("what", "input", f"One of {', '.join(WHAT)}.")
_CONFIG = flags.DEFINE_string("config", "", "As of m3ae_jax.main, with --config.NAME=VALUE.")
_OWN_DATA = flags.DEFINE_bool("own_data", False, "For input: read the config's data, not pictures made here.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Measurements, of which the median and the range are printed.")
_CAPTION_TOKENS = flags.DEFINE_float("caption_tokens", 25.0, "For step: mean length of the captions.")
_AGAINST = flags.DEFINE_string(
    "against", "", f"For step: what to time in turns: {', '.join(peer.names())}, or config=NAME, another of ours."
)
_OUTPUT = flags.DEFINE_string("output", "", "A JSON file for the figures.")
_COMPARE = flags.DEFINE_string("compare", "", "A JSON file of --output, of which to print ratios.")

_overrides: list[tuple[str, str]] = []


def _main(argv: list[str]) -> None:
    del argv
    console.start_logging()
    # Before JAX is imported, as making a config does: what is reported of compiling is of compiling.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    what = _WHAT.value
    if what not in WHAT:
        raise UserError(one_of("--what", what, WHAT))
    if _REPEATS.value < 1:
        raise UserError(f"--repeats={_REPEATS.value}: must be at least 1")
    if not 0 < _CAPTION_TOKENS.value <= 1e6:
        raise UserError(f"--caption_tokens={_CAPTION_TOKENS.value:g}: must be above 0 and at most 1e6")
    path = _CONFIG.value or WHAT[what]
    config = config_lib.load(path)
    config_lib.apply_overrides(config, _overrides)
    config_lib.check_named_code(path, config, _overrides)
    before = compare.load(Path(_COMPARE.value), what) if _COMPARE.value else None
    figures = _measured(what, config_lib.resolve(config), path)
    print(figures.text())
    record = {"what": what, "config": path, "overrides": dict(_overrides), **figures.record()}
    if _OUTPUT.value:
        try:
            Path(_OUTPUT.value).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output={_OUTPUT.value}: {error}") from None
    if before is not None:
        print(f"\nbeside {_COMPARE.value}:\n{compare.table(before, record)}")


def _measured(what: str, config: ConfigDict, path: str) -> Any:
    """The `timing.Figures` of a benchmark, whose `measure` takes of these options those that it names."""
    options = {
        "config": config,
        "start": (path, _overrides),
        "repeats": _REPEATS.value,
        "own_data": _OWN_DATA.value,
        "caption_tokens": _CAPTION_TOKENS.value,
        "against": _AGAINST.value,
    }
    if _AGAINST.value:  # the other program needs room on the GPU too
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if what in _WITH_TENSORFLOW:
        console.import_tensorflow()
    measure = importlib.import_module(f"m3ae_jax.benchmark.{what}").measure
    return measure(**{name: options[name] for name in inspect.signature(measure).parameters if name in options})


if __name__ == "__main__":
    console.use_huge_pages()  # as m3ae_jax.main
    command_line.run(_main, _overrides)
