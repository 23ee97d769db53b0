"""What the project's programs share of their command lines: flags, overrides of a config, mistakes in one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

from absl import app, flags

from m3ae_jax.config import split_overrides
from m3ae_jax.errors import UserError

_MISSING = re.compile(r"Flag (--\w+) must have a value other than None")


def run(main: Callable[[list[str]], None], overrides: list[tuple[str, str]] | None = None) -> None:
    """Runs a program as `absl.app.run` does; a user's mistake is one line and exit code 2.

    Args:
        main: the program.
        overrides: gets those of the config, as (path, text), before `main` is called; None: there is no config.
    """

    def parse(argv: list[str]) -> list[str]:
        rest = argv
        if overrides is not None:
            overrides[:], rest = split_overrides(argv)
        try:
            rest = flags.FLAGS(rest)
        except flags.Error as error:
            if missing := _MISSING.findall(str(error)):
                raise UserError(f"{' and '.join(missing)} must be given; see --help") from None
            raise UserError(" ".join(str(error).split())) from None
        except SystemExit:
            sys.exit(0)  # after --help, which absl ends as a failure
        if rest[1:]:
            how = "see --help" if overrides is None else "a field of the config is set as --config.NAME=VALUE"
            raise UserError(f"unknown argument {rest[1]!r}; {how}")
        return rest

    try:
        app.run(main, flags_parser=parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
