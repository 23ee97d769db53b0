r"""Measures a part of the program on this machine.

    python -m m3ae_jax.benchmark --what=step
    python -m m3ae_jax.benchmark --what=step --config=configs/mae_base.py --against=vit_mae --config.batch_size=8
    python -m m3ae_jax.benchmark --what=step --config=configs/base.py --against=m3ae --config.batch_size=8
    python -m m3ae_jax.benchmark --what=end_to_end
    python -m m3ae_jax.benchmark --what=init --config=configs/base.py
    python -m m3ae_jax.benchmark --what=checkpoint --config=configs/base.py
    python -m m3ae_jax.benchmark --what=encode --config=configs/base.py
    python -m m3ae_jax.benchmark --what=input
    python -m m3ae_jax.benchmark --what=input --config=configs/base.py --own_data --config.data.train.path=SHARDS
    python -m m3ae_jax.benchmark --what=index
    python -m m3ae_jax.benchmark --what=guard
    python -m m3ae_jax.benchmark --what=features

`--output=FILE` saves the figures as JSON; `--compare=FILE` sets them beside those of an earlier run.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Protocol

from m3ae_jax import console

console.quiet_environment()

from absl import flags  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from m3ae_jax import command_line  # noqa: E402
from m3ae_jax import config as config_lib  # noqa: E402
from m3ae_jax.errors import UserError, one_of  # noqa: E402

WHAT = {
    "step": "configs/tiny.py",
    "end_to_end": "configs/tiny.py",
    "init": "configs/tiny.py",
    "checkpoint": "configs/tiny.py",
    "encode": "configs/tiny.py",
    "input": "configs/base.py",
    "index": "configs/base.py",
    "guard": "configs/tiny.py",
    "features": "configs/base.py",
}
"""What can be measured, and of which config unless one is named."""

_WHAT = flags.DEFINE_string("what", "input", f"One of {', '.join(WHAT)}.")
_CONFIG = flags.DEFINE_string("config", "", "As of m3ae_jax.main, with --config.NAME=VALUE.")
_OWN_DATA = flags.DEFINE_bool("own_data", False, "For input: read the config's data, not pictures made here.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Measurements, of which the median and the range are printed.")
_CAPTION_TOKENS = flags.DEFINE_float("caption_tokens", 25.0, "For step: mean length of the captions.")
_AGAINST = flags.DEFINE_string("against", "", "For step: another program to time in turns; vit_mae, m3ae, m3ae_256.")
_OUTPUT = flags.DEFINE_string("output", "", "A JSON file for the figures.")
_COMPARE = flags.DEFINE_string("compare", "", "A JSON file of --output, of which to print ratios.")

_overrides: list[tuple[str, str]] = []


class Figures(Protocol):
    """What a benchmark says."""

    def text(self) -> str:
        """For people."""

    def record(self) -> dict[str, Any]:
        """For programs."""


def _main(argv: list[str]) -> None:
    del argv
    console.start_logging()
    try:
        if _WHAT.value not in WHAT:
            raise UserError(one_of("--what", _WHAT.value, WHAT))
        if _REPEATS.value < 1:
            raise UserError(f"--repeats={_REPEATS.value}: must be at least 1")
        if not 0 < _CAPTION_TOKENS.value <= 1e6:
            raise UserError(f"--caption_tokens={_CAPTION_TOKENS.value:g}: must be above 0 and at most 1e6")
        path = _CONFIG.value or WHAT[_WHAT.value]
        config = config_lib.load(path)
        config_lib.apply_overrides(config, _overrides)
        config_lib.check_named_code(path, config, _overrides)
        from m3ae_jax.benchmark import compare

        before = compare.load(Path(_COMPARE.value), _WHAT.value) if _COMPARE.value else None
        figures = _measured(config_lib.resolve(config), path)
        print(figures.text())
        record = {"what": _WHAT.value, "config": path, "overrides": dict(_overrides), **figures.record()}
        if _OUTPUT.value:
            try:
                Path(_OUTPUT.value).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                raise UserError(f"--output={_OUTPUT.value}: {error}") from None
        if before is not None:
            print(f"\nbeside {_COMPARE.value}:\n{compare.table(before, record)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _measured(config: ConfigDict, path: str) -> Figures:
    repeats = _REPEATS.value
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what is told of compiling is of compiling
    if _WHAT.value == "step":
        if _AGAINST.value:  # it needs room on the GPU too
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        from m3ae_jax.benchmark import step

        return step.measure(config, repeats, _CAPTION_TOKENS.value, _AGAINST.value)
    if _WHAT.value == "init":
        from m3ae_jax.benchmark import init

        return init.measure(config, repeats)
    if _WHAT.value == "checkpoint":
        from m3ae_jax.benchmark import checkpoint

        return checkpoint.measure(config, repeats)
    if _WHAT.value == "encode":
        from m3ae_jax.benchmark import encode

        return encode.measure(config, repeats)
    if _WHAT.value == "guard":
        from m3ae_jax.benchmark import guard

        return guard.measure(config, repeats)
    if _WHAT.value == "features":
        from m3ae_jax.benchmark import features

        return features.measure(repeats)
    console.import_tensorflow()
    if _WHAT.value == "end_to_end":
        from m3ae_jax.benchmark import end_to_end

        return end_to_end.measure(config, repeats, (path, _overrides))
    from m3ae_jax.benchmark import index, input

    if _WHAT.value == "index":
        return index.measure(config)
    return input.measure(config, own_data=_OWN_DATA.value, repeats=repeats)


if __name__ == "__main__":
    console.use_huge_pages()  # as m3ae_jax.main
    command_line.run(_main, _overrides)
