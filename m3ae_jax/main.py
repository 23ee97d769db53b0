"""The command line: ``python -m m3ae_jax.main --config=configs/tiny.py [--workdir=DIR] [--mode=train]``.

With ``--mode=eval``, ``replay`` or ``report`` and a ``--workdir`` alone the config is the one that the run saved there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import m3ae_jax.compilation_cache as compilation_cache
import m3ae_jax.console as console

console.quiet_environment()
console.exit_on_sigterm()

from absl import flags  # noqa: E402

import m3ae_jax.command_line as command_line  # noqa: E402
import m3ae_jax.config as config_lib  # noqa: E402
from m3ae_jax.errors import STOPPED, Stopped, UserError, one_of  # noqa: E402
from m3ae_jax.parallel.supervisor import supervise  # noqa: E402

MODES = ("train", "eval", "plan", "inspect_data", "replay", "report", "print_config")
OF_A_RUN = ("eval", "replay", "report")
"""Those that need no --config."""

_CONFIG = flags.DEFINE_string(
    "config",
    None,
    "A file of configs/, or a run's config.json; by default, for a run's modes, that of --workdir. "
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


def _run() -> None:
    if _MODE.value not in MODES:
        raise UserError(one_of("--mode", _MODE.value, MODES))
    # Both come before all that imports JAX, as making a config does: the one forks, the other sets JAX's environment.
    if _several():
        supervise()
    elif _MODE.value not in ("plan", "report"):  # a plan says how long compiling takes
        compilation_cache.use()
    config_file = _config_file()
    config = config_lib.load(str(config_file))
    config_lib.apply_overrides(config, _overrides)
    if _MODE.value != "report":  # which imports nothing that the config names
        config_lib.check_named_code(str(config_file), config, _overrides)
    default = config_file.parent if config_file.suffix == ".json" else Path("runs") / config_file.stem
    workdir = Path(_WORKDIR.value or default).expanduser().resolve()
    if _MODE.value == "report":
        from m3ae_jax.report.run import build_run

        print(build_run(workdir))
        return
    console.import_tensorflow()
    _meet()
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

        train_and_evaluate(config, workdir, tuple(_ALLOW_CONFIG_CHANGE.value))


def _config_file() -> Path:
    if _CONFIG.value:
        return Path(_CONFIG.value)
    if _MODE.value in OF_A_RUN and _WORKDIR.value:
        file = Path(_WORKDIR.value).expanduser() / "config.json"
        if not file.is_file():
            raise UserError(f"--workdir={_WORKDIR.value!r} holds no run: there is no config.json in it")
        return file
    raise UserError("--config is missing: a file of configs/ or a run's config.json (eval, replay, report: --workdir)")


def _several() -> bool:
    return bool(_DISTRIBUTED.value or _COORDINATOR.value or _PROCESS_COUNT.value or _PROCESS_INDEX.value >= 0)


def _meet() -> None:
    if not _several():
        return
    from m3ae_jax.parallel.processes import Cluster, start

    start(Cluster(_COORDINATOR.value, _PROCESS_COUNT.value, _PROCESS_INDEX.value, _START_TIMEOUT.value))


def main(argv: list[str]) -> None:
    """Dispatches; a user's mistake becomes one line and exit code 2."""
    del argv
    console.start_logging()
    try:
        _run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        if _several():
            sys.exit(2)  # through JAX, which tells the others
        console.leave(2)
    except Stopped as stopped:
        console.log.info("%s", stopped)
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def cli() -> None:
    """Entry point."""
    console.use_huge_pages()
    command_line.run(main, _overrides)


if __name__ == "__main__":
    cli()
