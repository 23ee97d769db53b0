"""The training loop: the order of events, and nothing of what a model or an objective is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from m3ae_jax import config as config_lib
from m3ae_jax import console, evals
from m3ae_jax.atomic import replacing
from m3ae_jax.checkpoint.init_from import take_weights
from m3ae_jax.checkpoint.manager import Checkpoints
from m3ae_jax.data.images import REASONS
from m3ae_jax.data.order import ATTEMPTS
from m3ae_jax.errors import Stopped, UserError
from m3ae_jax.evals.reconstructions import Reconstructions
from m3ae_jax.evals.validation import Validation, priors
from m3ae_jax.metrics.writers import MetricWriter, read_rows
from m3ae_jax.parallel.mesh import put_batch
from m3ae_jax.report.pictures import curves
from m3ae_jax.train.setup import Setup, prepare
from m3ae_jax.train.step import TrainState

log = logging.getLogger("m3ae_jax")

FREE_FIELDS = (
    *config_lib.PROGRAM_FIELDS,
    "log_every",
    "checkpoint.",
    "eval.",
    "evals",
    "data.train.path",
    "data.val.",
    "data.threads",
    "data.max_bad_fraction",
    "init_from",
)
"""Fields that may change when a run goes on; any other makes it another run."""

_CONFIG_FILE = "config.json"
_FEW_DRAWS = 1000  # before so many a share of bad examples says little


def train(config: ConfigDict, workdir: Path) -> TrainState:
    """Trains, or goes on with, the run in `workdir`.

    Args:
        config: as loaded and overridden, not yet resolved.
        workdir: the run's folder; made if missing.

    Raises:
        UserError: the config, the data or the folder does not fit.
        Stopped: a signal asked for it.
    """
    resolved = config_lib.resolve(config)
    setup = prepare(resolved)
    _open_workdir(workdir, resolved)
    if jax.process_index() == 0:
        console.log_to(workdir / "log.txt")
    checkpoints = Checkpoints(workdir / "checkpoints", resolved.checkpoint.keep)
    writer = MetricWriter(workdir, enabled=jax.process_index() == 0)
    try:
        return _Loop(setup, workdir, checkpoints, writer).run()
    finally:
        checkpoints.close()
        writer.close()


def _open_workdir(workdir: Path, config: ConfigDict) -> None:
    """Makes the folder; refuses one whose run has another config."""
    saved = workdir / _CONFIG_FILE
    if saved.exists():
        _check_same_run(workdir, saved.read_text(encoding="utf-8"), config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "log.txt").touch()
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}") from None


def _check_same_run(workdir: Path, stored: str, config: ConfigDict) -> None:
    changed = [
        f"{name}={new!r} (the run has {old!r})"
        for name, old, new in config_lib.difference(config_lib.from_json(stored), config)
        if not config_lib.is_among(name, FREE_FIELDS) and not re.fullmatch(r"data\.mixture\..*\.path", name)
    ]
    if changed:
        raise UserError(
            f"--workdir={workdir} holds a run with another config: {'; '.join(changed)}. "
            "Choose another --workdir, or start from its weights with --config.init_from"
        )


class _Loop:
    def __init__(self, setup: Setup, workdir: Path, checkpoints: Checkpoints, writer: MetricWriter) -> None:
        self._setup, self._workdir = setup, workdir
        self._checkpoints, self._writer = checkpoints, writer
        self._validate = Validation(setup)
        self._draw = Reconstructions(setup, workdir / "pictures")
        self._metrics: dict[str, float] = {}
        self._priors: dict[str, float] = {}
        self._progress = _Progress(setup)

    def run(self) -> TrainState:
        """Every step: train, log, evaluate, save; in this order and nowhere else."""
        setup, state = self._setup, self._first_state()
        start, total = int(state.step), setup.total_steps
        if start >= total:
            log.info("the run has all its %d steps; nothing to train", total)
            self._finish(state)
            return state
        step_fn = setup.train_step()
        log_every, eval_every, save_every = map(setup.steps, ("log_every", "eval.every", "checkpoint.every"))
        if start == 0:
            self._priors = priors(setup)
            self._evaluate(state)
        log.info("compiling the step; then %d steps from step %d", total - start, start)
        self._progress.start(start)
        figures: dict[str, jax.Array] = {}
        tried = _Tried()
        with _StopFlag() as stop, contextlib.closing(iter(setup.train_batches(start))) as batches:
            for step in range(start + 1, total + 1):
                self._metrics = {}
                batch = self._progress.waiting(lambda: next(batches), figures)
                tried.add(batch)
                state, figures = step_fn(state, put_batch(batch, setup.mesh))
                last = step == total or stop.at(step)
                if step % log_every == 0 or step == start + 1 or last:
                    self._log(step, figures, tried)
                if step % eval_every == 0 or step == total:
                    self._evaluate(state)
                if step % save_every == 0 or last:
                    self._save(state)
                if last:
                    self._checkpoints.wait()  # inside, so that a second signal does not cut the save short
                    break
        if int(state.step) < total:
            raise Stopped(f"stopped at step {int(state.step)}, saved; the same command goes on")
        if tried.by_reason.sum():
            log.warning(tried.summary())
        self._finish(state)
        return state

    def _first_state(self) -> TrainState:
        """What the run starts from: 1. its own newest checkpoint, 2. ``init_from``, 3. fresh parameters."""
        setup = self._setup
        step = self._checkpoints.latest()
        if step is not None:
            self._check_identity(self._checkpoints.meta(step))
            self._save_config()
            state = self._checkpoints.restore(step, setup.abstract_state())
            log.info("going on from step %d of %s", step, self._workdir)
            return state
        self._save_config()
        state = setup.init_state()
        _log_overview(setup, state)
        if setup.config.init_from:
            params, matched = take_weights(state.params, setup.config.init_from)
            for line in matched.lines():
                log.info(line)
            state = dataclasses.replace(state, params=params, extra=setup.objective.init_extra(params))
        return state

    def _save_config(self) -> None:
        if jax.process_index() > 0:
            return
        with replacing(self._workdir / _CONFIG_FILE) as fresh:  # a kill while writing must not leave half a config
            fresh.write_text(config_lib.to_json(self._setup.config), encoding="utf-8")

    def _check_identity(self, meta: dict[str, Any]) -> None:
        # The checkpoint's own copy: config.json may have been lost or edited.
        _check_same_run(self._workdir, json.dumps(meta["config"]), self._setup.config)
        for name, now in self._setup.identity().items():
            if meta[name] != now:
                raise UserError(
                    f"{self._workdir}: {name} was {meta[name]!r} and is now {now!r}; the run cannot go on with it. "
                    "Choose another --workdir, or start from its weights with --config.init_from"
                )

    def _log(self, step: int, figures: dict[str, jax.Array], tried: _Tried) -> None:
        values = {name: float(value) for name, value in jax.device_get(figures).items()}
        values |= tried.figures()
        values |= self._setup.train_data.progress(step)
        values["learning_rate"] = float(self._setup.learning_rate(step - 1))
        timing = self._progress.interval(step)
        self._writer.scalars(step, {f"train/{k}": v for k, v in {**values, **timing}.items()} | self._priors)
        self._priors = {}
        log.info(self._progress.line(step, values, timing))
        tried.check(self._setup.config.data.max_bad_fraction)

    def _evaluate(self, state: TrainState) -> None:
        with self._progress.paused():
            self._metrics = self._validate(state)
            step = int(state.step)
            self._writer.scalars(step, self._metrics | (self._priors if step == 0 else {}))
            picture = self._draw(state)
            if picture is not None:
                self._writer.image(step, "reconstructions", picture)
            if not self._metrics:
                return
            shown = " ".join(
                f"{k.removeprefix('val/')} {v:.4f}" for k, v in self._metrics.items() if "targets" not in k
            )
            log.info("  validation at step %d: %s", step, shown)
            if step == 0 and self._priors:
                log.info("  to beat: %s", " ".join(f"{k} {v:.4f}" for k, v in self._priors.items()))

    def _save(self, state: TrainState) -> None:
        with self._progress.paused():
            meta = {**self._setup.identity(), "config": self._setup.config.to_dict()}
            self._checkpoints.save(state, meta, self._metrics)

    def _finish(self, state: TrainState) -> None:
        if jax.process_index() == 0:
            rows = read_rows(self._workdir, until=int(state.step))
            curves(rows, self._workdir / "curves.png", self._workdir.name)
        where = self._workdir
        for name in self._setup.config.evals:
            if evals.place(where / "evals", name, int(state.step)).exists():
                continue
            result = evals.run(name, self._setup, state)
            self._writer.scalars(int(state.step), result.scalars)
            log.info(result.text)
            if jax.process_index() == 0:
                result.save(where / "evals", int(state.step))
        log.info("done: checkpoints in %s, curves in %s, pictures in %s", *(where / p for p in _OUTPUTS))


_OUTPUTS = ("checkpoints", "curves.png", "pictures")


def _log_overview(setup: Setup, state: TrainState) -> None:
    from clu import parameter_overview

    logging.getLogger("parameters").info(
        "\n%s", parameter_overview.get_parameter_overview(state.params, include_stats=False)
    )
    log.info("%s", console.table(list(setup.derived().items())))


class _Tried:
    """Counts candidates that did not decode, over all processes: what is decided by it, all must decide alike."""

    def __init__(self) -> None:
        self._counts = np.zeros(len(REASONS) + 2, np.int32)  # replaced by reason, draws, draws that gave nothing
        self.by_reason = np.zeros(len(REASONS), np.int64)
        self.draws = 0
        self._nothing = False

    def add(self, batch: dict[str, Any]) -> None:
        """Takes the attempts of this process's rows of a batch."""
        for part in batch.get("parts", {"": batch}).values():
            attempt, reason = part["example"]["attempt"], part["example"]["reason"]
            self._counts[: len(REASONS)] += np.bincount(reason[attempt > 0], minlength=len(REASONS)).astype(np.int32)
            self._counts[-2:] += np.array([attempt.size, (attempt == ATTEMPTS).sum()], np.int32)

    def figures(self) -> dict[str, float]:
        """Of what was added since the last call: replaced draws, in all and by reason."""
        gathered = np.asarray(multihost_utils.process_allgather(self._counts), np.int64)
        *found, draws, nothing = gathered.reshape(-1, len(self._counts)).sum(0).tolist()
        self._counts[:] = 0
        counts = np.array(found)
        self.by_reason += counts
        self.draws += draws
        self._nothing = nothing == draws
        named = {f"replaced/{r.replace(' ', '_')}": float(n) for r, n in zip(REASONS, counts, strict=True) if r and n}
        return {"replaced_examples": float(counts.sum()), **named}

    def summary(self) -> str:
        """All replacements so far, in one line."""
        reasons = ", ".join(f"{n:,} {r}" for r, n in zip(REASONS, self.by_reason, strict=True) if n)
        share = self.by_reason.sum() / max(self.draws, 1)
        return f"{self.by_reason.sum():,} of {self.draws:,} examples were replaced ({share:.2%}): {reasons}"

    def check(self, most: float) -> None:
        """Stops a run whose data are bad.

        Raises:
            UserError: as said.
        """
        if self._nothing:
            raise UserError("not one of the last draws gave a picture that decodes: is data.train right?")
        if self.draws >= _FEW_DRAWS and self.by_reason.sum() > most * self.draws:
            raise UserError(
                f"{self.summary()}; data.max_bad_fraction={most}. --mode=inspect_data shows them; "
                "raise the limit to train nevertheless"
            )


class _StopFlag:
    """Inside the context, set by SIGTERM or SIGINT and read at step boundaries; a second SIGINT stops at once.

    Of several processes all stop after the same step: JAX then watches for SIGTERM, and SIGINT stops at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopFlag:
        if jax.process_count() == 1:
            self._before = {n: signal.signal(n, self._set) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def at(self, step: int) -> bool:
        """Whether to stop after this step."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self.asked

    def _set(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


class _Progress:
    """Rates between two log lines, evaluation and saving left out."""

    def __init__(self, setup: Setup) -> None:
        self._batch_size, self._total = setup.config.batch_size, setup.total_steps
        self._waited = self._pause = 0.0
        self._first_step = 0
        self._last = (time.perf_counter(), 0)

    def start(self, step: int) -> None:
        """Begins counting at a step."""
        self._first_step = step
        self._last = (time.perf_counter(), step)
        self._waited = self._pause = 0.0

    def waiting(self, get: Callable[[], Any], figures: dict[str, Any]) -> Any:
        """Calls `get`; counts its time as waiting for data if the device had run out of work by its end."""
        begin = time.perf_counter()
        batch = get()
        if all(value.is_ready() for value in figures.values()):
            self._waited += time.perf_counter() - begin
        return batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count."""
        begin = time.perf_counter()
        yield
        self._pause += time.perf_counter() - begin

    def interval(self, step: int) -> dict[str, float]:
        """Figures since the last call, then begins anew."""
        now = time.perf_counter()
        seconds = max(now - self._last[0] - self._pause, 1e-9)
        count = step - self._last[1]
        rate = {
            "examples_per_second": count * self._batch_size / seconds,
            "data_wait_share": min(self._waited / seconds, 1.0),
            "seconds_per_step": seconds / max(count, 1),
        }
        self._last, self._waited, self._pause = (now, step), 0.0, 0.0
        return rate

    def line(self, step: int, values: dict[str, float], timing: dict[str, float]) -> str:
        """The one line on the console."""
        left = "ETA " + console.duration(timing["seconds_per_step"] * (self._total - step))
        if step == self._first_step + 1:  # its time is the compiler's
            left = f"compiled in {console.duration(timing['seconds_per_step'])}"
        terms = " ".join(f"{k} {v:.4f}" for k, v in values.items() if k.endswith("loss") or k.endswith("accuracy"))
        replaced = f" | replaced {values['replaced_examples']:.0f}" if values["replaced_examples"] else ""
        return (
            f"step {step}/{self._total} {step / self._total:4.0%} | {left} | "
            f"{timing['examples_per_second']:.1f} ex/s | {terms} | data wait {timing['data_wait_share']:.0%}{replaced}"
        )
