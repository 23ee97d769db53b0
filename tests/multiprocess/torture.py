"""Torture: a run that is killed again and again ends with the parameters of one that never was, bit for bit.

    python tests/multiprocess/torture.py --rounds=100 --processes=1 --seed=0

A round starts the run, by the same command each time, and kills it at a random moment: during its start (imports,
compiling, restoring), after some steps, inside a save or after its last step. A run that reaches its end is compared
with the undisturbed one, and the next round begins another run; after the last round the run goes on to its end. Exit
code 1 if anything was not as follows.

Compared at the end of a run: the names and every bit of parameters, optimizer state and step of the last checkpoint,
and every figure but the timings in every row of metrics.jsonl, which has each step and each validation once.

How a start may end:

- SIGTERM: 75, and the step that it names is the newest checkpoint. 0 only if all is done, closing evaluations too. -15
  only if the process had no handler yet, as /proc says when the signal is sent;
- kill -9: -9; a part of them comes some time after a SIGTERM, as when a cloud takes its machine back;
- the other of two processes: 75 after SIGTERM. After a kill -9 of its fellow 75 too, at once or when JAX notices.
  It is ended as launch/local.sh does (SIGTERM, 10 s, SIGKILL) if the run was still starting, where it rightly waits
  for its fellow, or if it has not ended after `PATIENCE`.

After each kill the newest finished checkpoint must be whole and no older than before, the next start must go on from
it, and nothing but the program's own lines may be on the console.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from m3ae_jax.parallel.supervisor import is_of_gloo

ROOT = Path(__file__).resolve().parents[2]

PATIENCE = 120.0  # seconds for the fellow of a killed process to end by itself
HANGS = 900.0  # seconds after which a start without the awaited sign of life counts as hanging
GRACE = 10.0  # between SIGTERM and SIGKILL, as in launch/local.sh
POLL = 0.005

ALL = 10**9  # rows
STOPPED, KILLED, TERMINATED = 75, -signal.SIGKILL, -signal.SIGTERM
TIMINGS = ("second", "train/data_wait_share", "train/mfu", "time/", "start/", "memory/")  # parts of their names
FIELDS = {
    "batch_size": 8,
    "log_every": "1 steps",
    "checkpoint.every": "2 steps",
    "checkpoint.keep": 2,
    "eval.pictures": 0,
    "evals": "",
    "eval.every": "6 steps",
    "eval.examples": 8,
    "optimizer.warmup": "4 steps",
    "model.width": 32,
    "model.depth": 1,
    "m3ae.decoder_width": 16,
    "m3ae.decoder_depth": 1,
    "model.dropout": 0.1,  # so that random numbers have to go on too
}


@dataclasses.dataclass(frozen=True)
class Kill:
    """When and how a start is killed.

    Attributes:
        phase: ``start``, ``step``, ``save`` or ``end``.
        rows: of metrics that this start writes before; for ``start`` none, for ``end`` all.
        delay: 0 to 1, then this share of the usual start, of a step's, a save's or the end's time.
        warning: seconds from a SIGTERM before to the kill -9; 0 without.
        number: the signal.
        victims: indices of processes.
    """

    phase: str
    rows: int
    delay: float
    warning: float
    number: signal.Signals
    victims: tuple[int, ...]

    def __str__(self) -> str:
        how = "SIGTERM" if self.number == signal.SIGTERM else "kill -9"
        warned = f" {self.warning:.2f} s after SIGTERM" if self.warning else ""
        steps = "a step" if self.rows == 1 else f"{self.rows} steps"
        where = {"start": "before the first step", "step": f"after {steps}", "save": f"at a save after {steps}"}
        where["end"] = "after the last step"
        return f"{how}{warned} to {' and '.join(map(str, self.victims))} {where[self.phase]}"


def draw(dice: random.Random, processes: int, most_rows: int) -> Kill:
    """A random kill."""
    phase = dice.choices(("start", "step", "save", "end"), (2, 3, 5, 1))[0]
    number = dice.choice((signal.SIGKILL, signal.SIGTERM))
    one = (dice.randrange(processes),)
    both = tuple(range(processes))
    warned = number == signal.SIGKILL and dice.random() < 0.2
    return Kill(
        phase=phase,
        rows={"start": 0, "end": ALL}.get(phase, dice.randint(1, most_rows)),
        delay=dice.random(),
        warning=dice.random() if warned else 0.0,
        number=number,
        victims=dice.choice((one, both)) if number == signal.SIGKILL else one,
    )


class Start:
    """The processes of one start of a run, and what they print."""

    def __init__(self, command: list[str], environment: dict[str, str], processes: int, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True)
        cluster = [f"--coordinator=localhost:{free_port()}", f"--process_count={processes}"]
        self.processes = []
        for index in range(processes):
            rest = [*cluster, f"--process_index={index}"] if processes > 1 else []
            with (folder / f"{index}.out").open("w") as out, (folder / f"{index}.err").open("w") as err:
                popen = subprocess.Popen([*command, *rest], cwd=ROOT, env=environment, stdout=out, stderr=err)
            self.processes.append(popen)

    def ended(self) -> bool:
        """Whether one of them has."""
        return any(process.poll() is not None for process in self.processes)

    def codes(self, patience: float) -> list[int | None]:
        """Exit codes of all, waited for so many seconds; None for one that still runs."""
        wait(lambda: all(process.poll() is not None for process in self.processes), patience)
        return [process.poll() for process in self.processes]

    def end(self) -> None:
        """Ends those that still run, as launch/local.sh does."""
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, HANGS)):
            for process in self.processes:
                process.send_signal(number)
            if None not in self.codes(patience):
                return

    def printed(self, index: int = 0) -> str:
        """The standard output of a process."""
        return (self._folder / f"{index}.out").read_text()

    def unexpected(self) -> Iterator[str]:
        """Lines on the consoles that are not the program's own, or tell of damage."""
        for index in range(len(self.processes)):
            errors = (self._folder / f"{index}.err").read_text().splitlines()
            # Gloo, the CPU's stand-in for an interconnect, talks and cannot be asked not to.
            lines = (line for line in errors if line.strip() and not is_of_gloo(line.encode()))
            bad = [line for line in lines if not line.startswith("error: ")]
            bad += [line for line in self.printed(index).splitlines() if re.search("Traceback|damaged|not saved", line)]
            if bad:
                yield f"process {index} printed {len(bad)} lines such as {bad[-1][:200]!r}; {self._folder}"


def listens(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM, or holds it up until it has."""
    with contextlib.suppress(OSError):
        masks = re.findall(r"^Sig(?:Cgt|Blk):\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return any(int(mask, 16) >> (signal.SIGTERM - 1) & 1 for mask in masks)
    return True


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true within the time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True


class Run:
    """The folder of a run as its killer sees it."""

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self.checkpoints = workdir / "checkpoints"

    def rows(self, but: frozenset[str] = frozenset(), figure: str = "train/loss") -> list[dict[str, Any]]:
        """The rows of steps in metrics.jsonl but for these lines; the next start cuts those of steps that were lost."""
        found = []
        for line in self.lines(figure):
            if line in but:
                continue
            with contextlib.suppress(json.JSONDecodeError):  # a kill may cut a line
                found.append(json.loads(line))
        return found

    def count(self, but: frozenset[str]) -> int:
        """How many of them."""
        return len(set(self.lines()) - but)

    def lines(self, figure: str = "train/loss") -> list[str]:
        """The text of the rows with a figure; no two of steps are equal, as there are timings in them."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if f'"{figure}"' in line]

    def finished(self) -> bool:
        """Whether a start has come to the end of everything."""
        path = self.workdir / "events.jsonl"
        return path.exists() and '"kind": "finished"' in path.read_text()

    def unfinished(self) -> bool:
        """Whether a save has begun and is not finished."""
        with contextlib.suppress(FileNotFoundError):  # renamed or deleted while we look
            for path in self.checkpoints.iterdir():
                if ".orbax-checkpoint-tmp" in path.name:
                    return True
                if path.name.isdigit() and not (path / "checksums.json").exists():
                    return True
        return False

    def newest(self) -> int:
        """The newest finished checkpoint; -1 if there is none."""
        from m3ae_jax.checkpoint import manifest

        return next(iter(manifest.finished(self.checkpoints)), -1)

    def damage(self) -> list[str]:
        """What is wrong with the newest finished checkpoint."""
        from m3ae_jax.checkpoint import manifest

        newest = self.newest()
        return manifest.problems(self.checkpoints / str(newest)) if newest >= 0 else []

    def state(self) -> dict[str, Any]:
        """Name to array of the newest finished checkpoint."""
        import jax
        import numpy as np
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)
        with ocp.PyTreeCheckpointer() as checkpointer:
            place = self.checkpoints / str(self.newest()) / "state"
            tree = checkpointer.metadata(place).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            restored = checkpointer.restore(place, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        return {
            jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(restored)
        }


def different(run: Run, undisturbed: Run, steps: int) -> list[str]:
    """What of a finished run is not as in the undisturbed one."""
    problems = []
    if run.newest() != steps:
        return [f"the last checkpoint is step {run.newest()}, not {steps}"]
    state, expected = run.state(), undisturbed.state()
    if state.keys() != expected.keys():
        problems.append(f"other arrays: {sorted(state.keys() ^ expected.keys())[:3]}")
    for name in state.keys() & expected.keys():
        a, b = state[name], expected[name]
        if (a.dtype, a.shape, a.tobytes()) != (b.dtype, b.shape, b.tobytes()):
            problems.append(f"{name} is not bit-equal")
    for figure in ("train/loss", "val/loss"):
        wanted = [(row["step"], _figures(row)) for row in undisturbed.rows(figure=figure)]
        got = [(row["step"], _figures(row)) for row in run.rows(figure=figure)]
        if [step for step, _ in got] != [step for step, _ in wanted]:
            problems.append(f"the rows with {figure} are of the steps {[step for step, _ in got]}")
        expected_row = dict(wanted)
        problems += [f"the row of step {step} differs" for step, row in got if row != expected_row.get(step)]
    return problems


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not any(part in name for part in TIMINGS)}


@dataclasses.dataclass
class Report:
    """What came of the rounds.

    Attributes:
        rounds: asked for.
        processes: of the run.
        survived: kills after which everything was as it should be.
        kills: by name.
        inside: a save, those of all kills.
        runs: finished and compared.
        fellows: how those ended that were not killed themselves when their fellow was killed by kill -9.
        longest: seconds until such a one had ended by itself.
        problems: one line each.
        seconds: of all.
    """

    rounds: int
    processes: int
    survived: int = 0
    kills: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    inside: int = 0
    runs: int = 0
    fellows: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    longest: float = 0.0
    problems: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def line(self) -> str:
        """The result."""
        kinds = f"{self.kills['kill -9']} kill -9, {self.kills['SIGTERM']} SIGTERM; {self.inside} inside a save"
        who = "one process" if self.processes == 1 else f"{self.processes} processes"
        runs = "one run" if self.runs == 1 else f"{self.runs} runs"
        text = f"survived {self.survived} of {self.rounds} kills ({kinds}), {who}, {runs}"
        if self.fellows:
            ends = ", ".join(f"{count} {end}" for end, count in sorted(self.fellows.items()))
            text += f", left behind: {ends} (at most {self.longest:.1f} s)"
        equal = "NOT AS UNDISTURBED" if self.problems else "final parameters and optimizer state equal bit for bit"
        return f"{text}: {equal} ({self.seconds / 60:.1f} minutes)"


class Torture:
    """Rounds of kills on runs in one folder.

    Args:
        folder: for everything; must not have been used.
        processes: 1 or more, over Gloo.
        steps: of a run.
        seed: of the kills; their moments depend on the machine's speed besides.
    """

    def __init__(self, folder: Path, processes: int, steps: int, seed: int) -> None:
        self._folder, self._count, self._steps = folder, processes, steps
        self._dice = random.Random(seed)
        self._most_rows = max(2, steps // 8)
        self._starts = 0
        self._usual_start = 10.0
        self._deaf: set[int] = set()  # processes that had no handler when they got a signal

    def rounds(self, count: int) -> Report:
        """Kills so often, then lets the run go on to its end."""
        report, begin = Report(count, self._count), time.monotonic()
        undisturbed = Run(self._folder / "undisturbed")
        run = Run(self._folder / "run_1")
        try:
            self._finish(undisturbed, warm=True)
            for number in range(1, count + 1):
                kill = draw(self._dice, self._count, self._most_rows)
                while not self._round(run, kill, report, number):
                    self._compare(run, undisturbed, report)
                    run = Run(self._folder / f"run_{report.runs + 1}")
                    # Its moment came after the program's end; the next run would miss it by as much.
                    kill = dataclasses.replace(kill, delay=0.5 * kill.delay)
            self._finish(run)
            self._compare(run, undisturbed, report)
        except _CannotGoOn as problem:
            report.problems.append(f"start {self._starts}: {problem}")
        report.seconds = time.monotonic() - begin
        return report

    def _compare(self, run: Run, undisturbed: Run, report: Report) -> None:
        report.runs += 1
        problems = different(run, undisturbed, self._steps)
        report.problems += [f"{run.workdir}: {problem}" for problem in problems]
        say(f"{run.workdir.name} has all its steps: {'; '.join(problems) or 'as undisturbed, bit for bit'}")

    def _start(self, run: Run, *, warm: bool = False) -> Start:
        self._starts += 1
        fields = FIELDS | {"duration": f"{self._steps} steps", "mesh.preset": "fsdp"}
        command = [sys.executable, "-m", "m3ae_jax.main", "--config=configs/tiny.py", f"--workdir={run.workdir}"]
        command += [f"--config.{name}={value}" for name, value in fields.items()]
        settings = {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_COMPILATION_CACHE_DIR": str(self._folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            # Only the undisturbed run writes the cache: JAX writes in place, so a kill could cut an entry.
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0" if warm else "1e9",
        }
        if self._count > 1:  # only process 0 writes a cache, and the others cannot read it
            settings["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "--xla_backend_optimization_level=0")
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        environment = os.environ | settings | {"PYTHONPATH": path}
        return Start(command, environment, self._count, self._folder / "consoles" / str(self._starts))

    def _finish(self, run: Run, *, warm: bool = False) -> None:
        """Lets a run go on to its end."""
        start = self._start(run, warm=warm)
        with contextlib.ExitStack() as stack:
            stack.callback(start.end)
            codes = start.codes(HANGS)
        problems = list(start.unexpected())
        if any(codes) or problems:
            raise _CannotGoOn(f"exit codes {codes} instead of 0; {'; '.join(problems)}")

    def _round(self, run: Run, kill: Kill, report: Report, number: int) -> bool:
        """Starts and kills; False if the run came to its end before, so that nothing was killed."""
        before, newest, begin = frozenset(run.lines()), run.newest(), time.monotonic()
        start = self._start(run)
        with contextlib.ExitStack() as stack:
            stack.callback(start.end)
            if not self._await(run, start, kill, before):
                codes = start.codes(HANGS)
                if any(codes):
                    raise _CannotGoOn(f"exit codes {codes} though nothing was killed; {[*start.unexpected()]}")
                return False
            inside = run.unfinished()
            self._send(start, kill)
            left_behind = self._settle(run, start, before)
        problems = [*self._judge(run, start, kill, before, left_behind), *self._look(run, start, newest)]
        name = "kill -9" if any(start.processes[i].returncode == KILLED for i in kill.victims) else "SIGTERM"
        report.kills[name] += 1
        report.inside += inside
        report.survived += not problems
        report.problems += [f"round {number}, {kill}: {problem}" for problem in problems]
        if left_behind is not None and name == "kill -9" and len(kill.victims) < self._count:
            report.fellows[left_behind.end] += 1
            report.longest = max(report.longest, left_behind.seconds)
        codes = [process.returncode for process in start.processes]
        say(
            f"round {number}: {kill}{', inside a save' if inside else ''}: codes {codes}, checkpoint {run.newest()}, "
            f"{time.monotonic() - begin:.1f} s{''.join('; ' + p for p in problems)}"
        )
        return True

    def _await(self, run: Run, start: Start, kill: Kill, before: frozenset[str]) -> bool:
        """Waits for the moment of a kill; False if a process ended before."""
        if kill.phase == "start":
            wait(start.ended, kill.delay * self._usual_start)
            return not start.ended()
        begin = time.monotonic()
        if not wait(lambda: self._has_come(run, kill, before) or start.ended(), HANGS):
            raise _CannotGoOn(f"hangs: {start.printed()[-300:]!r}")
        if kill.phase != "end":
            self._usual_start = 0.5 * self._usual_start + 0.5 * (time.monotonic() - begin)
        if kill.phase == "save":
            wait(lambda: run.unfinished() or start.ended(), HANGS)
        wait(start.ended, kill.delay * (4.0 if kill.phase == "end" else 0.4))
        return not start.ended()

    def _has_come(self, run: Run, kill: Kill, before: frozenset[str]) -> bool:
        """Whether this start has made the steps that a kill waits for."""
        rows = run.rows(but=before)
        return len(rows) >= kill.rows or any(row["step"] == self._steps for row in rows)

    def _send(self, start: Start, kill: Kill) -> None:
        victims = [start.processes[index] for index in kill.victims]
        self._deaf = {victim.pid for victim in victims if not listens(victim.pid)}
        if kill.warning:
            for victim in victims:
                victim.send_signal(signal.SIGTERM)
            wait(lambda: all(victim.poll() is not None for victim in victims), kill.warning)
        for victim in victims:
            victim.send_signal(kill.number)
        if not wait(lambda: all(victim.poll() is not None for victim in victims), HANGS):
            raise _CannotGoOn(f"does not end after {kill}: {start.printed()[-300:]!r}")

    def _settle(self, run: Run, start: Start, before: frozenset[str]) -> _LeftBehind | None:
        """Waits for the others, and ends those that wait for the killed one."""
        running = [process for process in start.processes if process.poll() is None]
        if not running:
            return None
        begin = time.monotonic()
        if None in start.codes(PATIENCE if run.count(before) else 0.0):
            start.end()
            return _LeftBehind("ended by this script", 0.0, on_its_own=False)
        end = ", ".join(f"by itself with code {process.returncode}" for process in running)
        return _LeftBehind(end, time.monotonic() - begin, on_its_own=True)

    def _judge(
        self, run: Run, start: Start, kill: Kill, before: frozenset[str], left_behind: _LeftBehind | None
    ) -> Iterator[str]:
        """Exit codes that are not as the head of this file says."""
        for index, process in enumerate(start.processes):
            allowed = {STOPPED}
            if process.pid in self._deaf:
                allowed |= {TERMINATED}
            if run.finished():
                allowed |= {0}
            if index in kill.victims and kill.number == signal.SIGKILL:
                allowed = allowed | {KILLED} if kill.warning else {KILLED}
            elif left_behind is not None and not left_behind.on_its_own:
                allowed |= {KILLED, TERMINATED}
            if process.returncode not in allowed:
                yield f"process {index} ended with {process.returncode}, allowed: {sorted(allowed)}"

    def _look(self, run: Run, start: Start, before: int) -> Iterator[str]:
        """What is wrong with what a kill left, and with what the start said."""
        yield from start.unexpected()
        yield from (f"the newest checkpoint is damaged: {problem}" for problem in run.damage())
        if run.newest() < before:
            yield f"checkpoint {before} is lost, the newest is {run.newest()}"
        went_on = re.search(r"going on from step (\d+)", start.printed())
        if went_on and int(went_on[1]) != before:
            yield f"it went on from step {went_on[1]} instead of {before}"
        stopped = re.search(r"stopped at step (\d+), saved", start.printed())
        if stopped and int(stopped[1]) != run.newest():
            yield f"it says that step {stopped[1]} is saved, the newest is {run.newest()}"


@dataclasses.dataclass(frozen=True)
class _LeftBehind:
    end: str
    seconds: float
    on_its_own: bool


class _CannotGoOn(Exception):
    """Nothing more can be learnt."""


def say(text: str) -> None:
    """One line, at once."""
    print(text, flush=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64, help="of a run; a run that has them is compared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept, to look at; by default a temporary one, kept after problems")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))
    folder = options.folder or Path(tempfile.mkdtemp(prefix="torture_"))
    report = Torture(folder.resolve(), options.processes, options.steps, options.seed).rounds(options.rounds)
    for problem in report.problems:
        say(f"problem: {problem}")
    say(report.line())
    if report.problems:
        say(f"everything is in {folder}")
    elif not options.folder:
        shutil.rmtree(folder)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
