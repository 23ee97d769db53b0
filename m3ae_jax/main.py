"""The command line: ``python -m m3ae_jax.main --config=configs/tiny.py [--workdir=DIR] [--mode=train]``."""

from __future__ import annotations

import sys
from pathlib import Path

from m3ae_jax import console

console.quiet_environment()

from absl import app, flags  # noqa: E402

from m3ae_jax import config as config_lib  # noqa: E402
from m3ae_jax.errors import UserError, one_of  # noqa: E402

MODES = ("train", "eval", "print_config")

_CONFIG = flags.DEFINE_string(
    "config",
    None,
    "A file of configs/, or a run's config.json. --config.a.b=VALUE overrides a field.",
    required=True,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; by default runs/<config name>.")
_MODE = flags.DEFINE_string("mode", "train", f"One of {', '.join(MODES)}.")

_overrides: list[tuple[str, str]] = []


def _parse(argv: list[str]) -> list[str]:
    overrides, rest = config_lib.split_overrides(argv)
    _overrides[:] = overrides
    try:
        rest = flags.FLAGS(rest)
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    if rest[1:]:
        raise UserError(f"unknown argument {rest[1]!r}; a field of the config is set as --config.NAME=VALUE")
    return rest


def _run() -> None:
    if _MODE.value not in MODES:
        raise UserError(one_of("--mode", _MODE.value, MODES))
    config = config_lib.load(_CONFIG.value)
    config_lib.apply_overrides(config, _overrides)
    config_file = Path(_CONFIG.value)
    default = config_file.parent if config_file.suffix == ".json" else Path("runs") / config_file.stem
    workdir = Path(_WORKDIR.value or default).expanduser().resolve()
    console.import_tensorflow()
    if _MODE.value == "print_config":
        from m3ae_jax.train.setup import describe

        print(describe(config))
    elif _MODE.value == "eval":
        from m3ae_jax.evals import evaluate

        evaluate(config, workdir)
    else:
        from m3ae_jax.train.loop import train

        train(config, workdir)


def main(argv: list[str]) -> None:
    """Dispatches; a user's mistake becomes one line and exit code 2."""
    del argv
    console.start_logging()
    try:
        _run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def cli() -> None:
    """Entry point."""
    console.use_huge_pages()
    try:
        app.run(main, flags_parser=_parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli()
