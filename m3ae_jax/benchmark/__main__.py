r"""Measures a part of the program on this machine.

    python -m m3ae_jax.benchmark --what=input
    python -m m3ae_jax.benchmark --what=input --config=configs/base.py --own_data --config.data.train.path=SHARDS
    python -m m3ae_jax.benchmark --what=index
    python -m m3ae_jax.benchmark --what=guard
    python -m m3ae_jax.benchmark --what=features

`--output=FILE` saves the figures as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from m3ae_jax import console

console.quiet_environment()

from absl import flags  # noqa: E402

from m3ae_jax import command_line  # noqa: E402
from m3ae_jax import config as config_lib  # noqa: E402
from m3ae_jax.errors import UserError, one_of  # noqa: E402

WHAT = {
    "input": "configs/base.py",
    "index": "configs/base.py",
    "guard": "configs/tiny.py",
    "features": "configs/base.py",
}
"""What can be measured, and of which config unless one is named."""

_WHAT = flags.DEFINE_string("what", "input", f"One of {', '.join(WHAT)}.")
_CONFIG = flags.DEFINE_string("config", "", "As of m3ae_jax.main, with --config.NAME=VALUE.")
_OWN_DATA = flags.DEFINE_bool("own_data", False, "Read the config's data, not pictures made here.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Measurements, of which the median and the range are printed.")
_OUTPUT = flags.DEFINE_string("output", "", "A JSON file for the figures.")

_overrides: list[tuple[str, str]] = []


def _main(argv: list[str]) -> None:
    del argv
    console.start_logging()
    try:
        if _WHAT.value not in WHAT:
            raise UserError(one_of("--what", _WHAT.value, WHAT))
        path = _CONFIG.value or WHAT[_WHAT.value]
        config = config_lib.load(path)
        config_lib.apply_overrides(config, _overrides)
        config_lib.check_named_code(path, config, _overrides)
        console.import_tensorflow()
        resolved = config_lib.resolve(config)
        from m3ae_jax.benchmark import features, guard, index, input

        figures: index.IndexFigures | input.InputFigures | guard.GuardFigures | features.FeaturesFigures
        if _WHAT.value == "index":
            figures = index.measure(resolved)
        elif _WHAT.value == "guard":
            figures = guard.measure(resolved, _REPEATS.value)
        elif _WHAT.value == "features":
            figures = features.measure(_REPEATS.value)
        else:
            figures = input.measure(resolved, own_data=_OWN_DATA.value, repeats=_REPEATS.value)
        print(figures.text())
        if _OUTPUT.value:
            Path(_OUTPUT.value).write_text(json.dumps(figures.record(), indent=1) + "\n", encoding="utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    command_line.run(_main, _overrides)
