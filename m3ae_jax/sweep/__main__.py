r"""Trains a config at all points of a grid, with several seeds, and compares what the evaluations say.

    python -m m3ae_jax.sweep --config=tiny --grid="config.m3ae.text_mask_ratio=0.15,0.5,0.75,0.9" \
        --seeds=3 --eval=probe

The same command goes on with a sweep that was stopped, at whatever moment; what is done is not done again. Each run
has a folder of its own in ``--workdir``, which gets ``results.json``, ``results.md`` and ``results.png``.
``--print_commands`` prints the runs' commands for a cluster instead; the sweep's command then gathers what they left.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import m3ae_jax.console as console

console.quiet_environment()
console.exit_on_signals()

from absl import flags  # noqa: E402

import m3ae_jax.command_line as command_line  # noqa: E402
import m3ae_jax.config as config_lib  # noqa: E402
from m3ae_jax.errors import UserError  # noqa: E402
from m3ae_jax.paths import local  # noqa: E402

if TYPE_CHECKING:
    from m3ae_jax.sweep.sweep import Sweep

_CONFIG = flags.DEFINE_string("config", None, "As of m3ae_jax.main, with --config.NAME=VALUE.", required=True)
_GRID = flags.DEFINE_multi_string("grid", [], "FIELD=VALUE,VALUE, or FIELD:FIELD=VALUE:VALUE,...; several with ;.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each point, with seeds from the config's on.", lower_bound=1)
_EVAL = flags.DEFINE_list("eval", ["probe"], "Evaluations of each run, in place of the config's evals.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The sweep's folder; by default runs/sweep_<config name>.")
_EQUAL_FLOPS = flags.DEFINE_list("equal_flops", [], "Axes whose runs train for as many FLOPs as the first of them.")
_COMPARE = flags.DEFINE_string("compare", "", "The axis whose values are compared with its first; by default the last.")
_FIGURES = flags.DEFINE_list("figures", [], "Scalars of the evaluations to show; of A|B each run's first.")
_TITLE = flags.DEFINE_string("title", "", "Of the plot.")
_PARALLEL = flags.DEFINE_integer("parallel", 1, "Runs at the same time, sharing this machine's cores.", lower_bound=1)
_RECORD = flags.DEFINE_string("record", "", "A JSON file of results: runs in it are done, each done one is added.")
_PRINT_COMMANDS = flags.DEFINE_bool("print_commands", False, "Print the commands of the runs that are not done.")

_overrides: list[tuple[str, str]] = []


def _sweep() -> Sweep:
    from m3ae_jax.sweep.grid import split_overrides
    from m3ae_jax.sweep.sweep import Sweep

    config = config_lib.load(_CONFIG.value)
    overrides, conditional = split_overrides(_overrides, _GRID.value, config)
    config_lib.apply_overrides(config, overrides)
    config_lib.check_named_code(_CONFIG.value, config, overrides)
    if not _EVAL.value:
        raise UserError("--eval= names no evaluation, so there is nothing to compare")
    config.evals = tuple(_EVAL.value)
    folder = local(_WORKDIR.value or Path("runs") / f"sweep_{Path(_CONFIG.value).stem}", "--workdir").resolve()
    settings = (_GRID.value, _SEEDS.value, _EQUAL_FLOPS.value, _COMPARE.value, _FIGURES.value)
    record = local(_RECORD.value, "--record").resolve() if _RECORD.value else None
    return Sweep(_CONFIG.value, config, overrides, folder, *settings, record, conditional)


def _run() -> int:
    import jax

    from m3ae_jax.sweep.runner import run_all

    jax.config.update("jax_platforms", "cpu")  # this process only counts; the accelerator is the runs'
    if _PRINT_COMMANDS.value:
        console.only_errors()
    sweep = _sweep()
    jobs = sweep.jobs()
    if _PRINT_COMMANDS.value:
        print("\n".join(job.line() for job in jobs if not job.is_done()))
        return 0
    failed = run_all(jobs, _PARALLEL.value)
    results = sweep.results()
    if results.done:
        folder = jobs[0].folder.parent
        results.save(folder, sweep.about(), _TITLE.value or f"{Path(_CONFIG.value).stem}: {', '.join(_EVAL.value)}")
        print(console.readable(results.table()))
        print(f"{len(results.done)} of {len(jobs)} runs: results.json, results.md and results.png in {folder}")
    if failed:
        print(f"error: {len(failed)} of {len(jobs)} runs failed; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


def _main(argv: list[str]) -> None:
    del argv
    console.start_logging()
    try:
        console.import_tensorflow()
        sys.exit(_run())
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    command_line.run(_main, _overrides)
