"""The command line: ``python -m m3ae_jax.main --config=configs/tiny.py [--workdir=DIR] [--mode=train]``.

With ``--mode=eval``, ``replay`` or ``report`` and a ``--workdir`` alone the config is the one that the run saved there.
"""

from __future__ import annotations

import contextlib
import errno
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import m3ae_jax.compilation_cache as compilation_cache
import m3ae_jax.console as console

console.quiet_environment()
console.exit_on_signals()

from absl import flags  # noqa: E402

import m3ae_jax.command_line as command_line  # noqa: E402
import m3ae_jax.config as config_lib  # noqa: E402
import m3ae_jax.configs as configs  # noqa: E402
from m3ae_jax.errors import LOST, MISTAKE, STOPPED, EverywhereError, Stopped, UserError, one_of  # noqa: E402
from m3ae_jax.parallel.supervisor import supervise  # noqa: E402
from m3ae_jax.paths import local  # noqa: E402
from m3ae_jax.stopping import Stop  # noqa: E402

MODES = ("train", "eval", "plan", "inspect_data", "replay", "report", "print_config")
OF_A_RUN = ("eval", "replay", "report")
"""Those that need no --config."""

_CONFIG = flags.DEFINE_string(
    "config",
    None,
    f"One of {', '.join(configs.files())}, a Python file of yours, or a run's config.json; by default, for a run's "
    "modes, that of --workdir. "
    "--config.a.b=VALUE overrides a field.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; by default runs/<config name>.")
_MODE = flags.DEFINE_string("mode", "train", f"One of {', '.join(MODES)}.")

_ALLOW_CONFIG_CHANGE = flags.DEFINE_list(
    "allow_config_change", [], "Fields, with commas, in which a run that goes on may differ from what it was."
)
_STEP = flags.DEFINE_integer("step", 0, "For --mode=replay: which step, from 1.")

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes; TPU pods, Slurm, Kubernetes and MPI say which."
)
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where no cluster says it.")
_PROCESS_COUNT = flags.DEFINE_integer("process_count", 0, "Processes of the run, where no cluster says it.")
_PROCESS_INDEX = flags.DEFINE_integer("process_index", -1, "This process, from 0, where no cluster says it.")
_START_TIMEOUT = flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for the other processes, an attempt.")

_TOPOLOGY = flags.DEFINE_string(
    "topology",
    "v5e:2x4,v5e:4x4,v5e:16x16,v4:4x4x4,v5p:4x4x4,v6e:8x8",
    "For --mode=plan: TPU slices, GENERATION:AxB[xC], with *N for N slices. --mode=inspect_data takes some too.",
)
_PRICE = flags.DEFINE_float("price", 0.0, "For --mode=plan: of a chip-hour.")
_SEARCH = flags.DEFINE_bool("search", False, "For --mode=plan: look for the best batch per chip, remat and mesh.")
_INSPECT_EXAMPLES = flags.DEFINE_integer("inspect_examples", 2000, "For --mode=inspect_data: examples to look at.")

_overrides: list[tuple[str, str]] = []


def _run(stop: Stop) -> None:
    if _MODE.value not in MODES:
        raise UserError(one_of("--mode", _MODE.value, MODES))
    # Both come before all that imports JAX, as making a config does: the one forks, the other sets JAX's environment.
    if _several():
        supervise()
    elif _MODE.value not in ("plan", "report"):  # a plan says how long compiling takes
        compilation_cache.use()
    stop.listen()
    if _several():
        _meet(stop)  # first of all, so that what is wrong here is known to all
    config_file = _config_file()
    default = config_file.parent if config_file.suffix == ".json" else Path("runs") / config_file.stem
    workdir = local(_WORKDIR.value or default, "--workdir").resolve()
    if _MODE.value == "report":
        from m3ae_jax.report.run import build_run

        print(build_run(workdir))
        return
    config = config_lib.load(str(config_file))
    config_lib.apply_overrides(config, _overrides)
    config_lib.check_named_code(str(config_file), config, _overrides)
    console.import_tensorflow()
    if _MODE.value == "print_config":
        from m3ae_jax.train.setup import describe

        print(describe(config))
    elif _MODE.value == "plan":
        from m3ae_jax.plan.plan import plan

        plan(config, config_file.stem, workdir, _TOPOLOGY.value, _PRICE.value, search=_SEARCH.value)
    elif _MODE.value == "inspect_data":
        from m3ae_jax.doctor.inspection import inspect

        topology = _TOPOLOGY.value if flags.FLAGS["topology"].present else ""
        inspect(config, workdir, _INSPECT_EXAMPLES.value, topology)
    elif _MODE.value == "eval":
        from m3ae_jax.evals.run import evaluate

        evaluate(config, workdir)
    elif _MODE.value == "replay":
        from m3ae_jax.evals.run import RunHooks
        from m3ae_jax.train.replay import replay

        replay(config, workdir, _STEP.value, RunHooks)
    else:
        from m3ae_jax.evals.run import train_and_evaluate

        train_and_evaluate(config, workdir, tuple(_ALLOW_CONFIG_CHANGE.value), stop)


def _config_file() -> Path:
    if _CONFIG.value:
        return Path(_CONFIG.value)
    if _MODE.value in OF_A_RUN and _WORKDIR.value:
        file = local(_WORKDIR.value, "--workdir") / "config.json"
        if not file.is_file() and not (file.parent / "checkpoints").is_dir():
            raise UserError(f"--workdir={_WORKDIR.value!r} holds no run: there is no config.json in it")
        return file
    names = ", ".join(configs.files())
    raise UserError(
        f"--config is missing: one of {names}, a Python file or a run's config.json (eval, replay, report: --workdir)"
    )


def _several() -> bool:
    return bool(_DISTRIBUTED.value or _COORDINATOR.value or _PROCESS_COUNT.value or _PROCESS_INDEX.value >= 0)


def _meet(stop: Stop) -> None:
    from m3ae_jax.parallel.processes import Cluster, Notices, start

    start(Cluster(_COORDINATOR.value, _PROCESS_COUNT.value, _PROCESS_INDEX.value, _START_TIMEOUT.value))
    stop.meet(Notices())


@contextlib.contextmanager
def _refusals_told() -> Iterator[None]:
    """A context that makes one line of what the storage refuses: a folder that cannot be written, a full disk.

    Not of a training's, which says for each of its files what that means.

    Raises:
        UserError: as said.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)  # which names no file
        if _MODE.value == "train" or not (error.filename or full):
            raise
        raise UserError(f"{error.filename2 or error.filename or _WORKDIR.value}: {error.strerror}") from error


def main(argv: list[str]) -> None:
    """Dispatches; a user's mistake becomes one line and exit code 2."""
    del argv
    console.start_logging()
    stop = Stop()
    try:
        with _refusals_told():
            _run(stop)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, EverywhereError):
            sys.exit(MISTAKE)  # through JAX, which lets all of them come so far
        stop.fail(MISTAKE, str(error))
    except Stopped as stopped:
        console.log.info("%s", stopped)
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not _several():
            raise
        from m3ae_jax.parallel.processes import tells_of_a_loss

        if tells_of_a_loss(error):
            stop.wait_for_news()
            print(f"error: {LOST}", file=sys.stderr)
            console.leave(STOPPED)
        traceback.print_exc()
        stop.fail(1, f"{type(error).__name__}: {error}")
    finally:
        stop.close()


def cli() -> None:
    """Entry point."""
    console.use_huge_pages()
    try:
        command_line.run(main, _overrides)
    except SystemExit as ended:
        _leave(ended.code)


def _leave(code: object) -> NoReturn:
    """Ends at once: while Python takes itself down, which takes seconds, it has no handler for signals any more."""
    if flags.FLAGS.is_parsed() and _several() and "jax" in sys.modules:
        import jax

        jax.distributed.shutdown()  # when all have come so far
    if isinstance(code, str):
        print(code, file=sys.stderr)
    console.leave(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    cli()
