"""What the project's programs share of their command lines: flags, overrides of a config, mistakes in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable

from absl import app, flags

from m3ae_jax.config import split_overrides
from m3ae_jax.errors import UserError


def run(main: Callable[[list[str]], None], overrides: list[tuple[str, str]]) -> None:
    """Runs a program as `absl.app.run` does; a wrong argument is one line and exit code 2.

    Args:
        main: the program.
        overrides: gets those of the config, as (path, text), before `main` is called.
    """

    def parse(argv: list[str]) -> list[str]:
        overrides[:], rest = split_overrides(argv)
        try:
            rest = flags.FLAGS(rest)
        except flags.Error as error:
            raise UserError(" ".join(str(error).split())) from None
        if rest[1:]:
            raise UserError(f"unknown argument {rest[1]!r}; a field of the config is set as --config.NAME=VALUE")
        return rest

    try:
        app.run(main, flags_parser=parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
