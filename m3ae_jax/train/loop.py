"""The training loop: the order of events, and nothing of what a model or an objective is."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import jax
from ml_collections import ConfigDict

import m3ae_jax.config as config_lib
import m3ae_jax.console as console
import m3ae_jax.data.run_tokenizer as run_tokenizer
from m3ae_jax.atomic import replacing
from m3ae_jax.checkpoint import manifest, origin
from m3ae_jax.checkpoint import meta as checkpoint_meta
from m3ae_jax.checkpoint.manager import Checkpoints
from m3ae_jax.errors import LOST, STOPPED, Stopped, UserError, one_of
from m3ae_jax.metrics.events import Events
from m3ae_jax.metrics.writers import MetricWriter
from m3ae_jax.parallel.mesh import put_batch
from m3ae_jax.parallel.processes import tells_of_a_loss
from m3ae_jax.stopping import Stop, stopped_at
from m3ae_jax.train import data_report
from m3ae_jax.train.flops import flops_per_example
from m3ae_jax.train.guard import FINE, VERDICTS
from m3ae_jax.train.hooks import Hooks
from m3ae_jax.train.identity import Identity
from m3ae_jax.train.profile import Profile
from m3ae_jax.train.progress import Progress, Start, memory
from m3ae_jax.train.replacements import Replacements
from m3ae_jax.train.setup import Setup, prepare
from m3ae_jax.train.step import TrainState
from m3ae_jax.train.watchdog import Watchdog

log = logging.getLogger("m3ae_jax")

CONFIG_FILE = "config.json"
_LOCK_WAIT = 10.0  # seconds for which a process that was just killed may still hold the folder
_EVERY_STEP = ("loss", "gradient_norm", "skipped")
_OUTSIDE = "stopped outside the steps; the same command goes on"
_OF_A_START = (
    CONFIG_FILE,
    *("metrics.jsonl", "every_step.jsonl", "events.jsonl", "tensorboard", "pictures", "evals", "curves.png"),
    *("data.json", "report", "report.html", "profile", "replay"),
    *("tokenizer.model", "tokenizer.txt", "tokenizer.json", "weights.json", "MODEL.md"),
)


def train(
    config: ConfigDict,
    workdir: Path,
    allow_config_change: tuple[str, ...] = (),
    hooks: Callable[[Setup, Path], Hooks] = lambda setup, workdir: Hooks(),
    stop: Stop | None = None,
) -> TrainState:
    """Trains, or goes on with, the run in `workdir`.

    Args:
        config: as loaded and overridden, not yet resolved.
        workdir: the run's folder; made if missing.
        allow_config_change: names of what may differ from what the run has (`identity.Identity`).
        hooks: made of the run's parts and folder; what happens beside the steps.
        stop: the program's; None, in one process alone: signals are followed between steps and are the caller's else.

    Raises:
        UserError: the config, the data or the folder does not fit, or the run cannot go on.
        Stopped: by a signal.
    """
    start, stop = Start(), stop or Stop()
    resolved = config_lib.resolve(config)
    with start.part("data"):
        setup = prepare(resolved, workdir)
    identity = Identity(resolved, setup.identity(), allow_config_change)
    identity.check_allowed()
    beside = hooks(setup, workdir)
    first = jax.process_index() == 0
    writer = MetricWriter(workdir, resolved, enabled=first)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_opened(workdir, identity))
        events = Events(workdir, enabled=first)
        log.addHandler(events)
        stack.callback(log.removeHandler, events)
        if first:
            console.log_to(workdir / "log.txt")
            stack.callback(_page, beside, workdir)
        stack.enter_context(_ending_recorded(events))
        try:
            c = resolved.checkpoint
            checkpoints = Checkpoints(workdir / "checkpoints", c.keep, best=c.best, greatest=c.best_is == "greatest")
            stack.enter_context(contextlib.closing(checkpoints))
            stack.enter_context(contextlib.closing(writer))
            stop.at_end(lambda: events.add("preempted", _OUTSIDE))
            stop.at_end(writer.close)
            return _Loop(setup, workdir, identity, checkpoints, writer, events, start, beside, stop).run()
        except Exception as error:
            if tells_of_a_loss(error):
                stop.wait_for_news()
                _leave_alone(workdir, events, error, beside)
            raise


@contextlib.contextmanager
def _opened(workdir: Path, identity: Identity) -> Iterator[None]:
    """Makes the folder and holds it against other processes; refuses one with the checkpoints of another run."""
    found = checkpoint_meta.newest(workdir / "checkpoints")
    if found:
        identity.check(f"--workdir={workdir}", found[1])
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "log.txt").open("a").close()
        lock = (workdir / ".lock").open("a")
    except OSError as error:
        raise _unwritable(workdir, error) from None
    with lock:
        if jax.process_index() == 0:
            _lock(lock.fileno(), workdir)
            _set_aside_unsaved(workdir, identity)
        yield


def _lock(file: int, workdir: Path) -> None:
    deadline = time.monotonic() + _LOCK_WAIT
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go when the process dies
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(f"--workdir={workdir}: another process trains there now") from None
            time.sleep(0.2)
        except OSError:
            return None  # a file system without locks


def _set_aside_unsaved(workdir: Path, identity: Identity) -> None:
    """Sets aside what starts with another config left in a folder without a checkpoint, which is free for this run.

    Raises:
        UserError: the folder cannot be written.
    """
    saved = workdir / CONFIG_FILE
    if not saved.exists() or manifest.steps(workdir / "checkpoints"):
        return
    try:
        identity.check("", {"config": config_lib.load(str(saved)).to_dict()})
        return
    except UserError:  # or it cannot be read
        pass
    names = (workdir / f"unsaved_{number}" for number in itertools.count(1))
    aside = next(folder for folder in names if not folder.exists())
    log.warning("%s: no step was saved of the run that %s is of: it makes room, see %s", workdir, saved, aside)
    try:
        aside.mkdir()
        for name in _OF_A_START:
            if (workdir / name).exists():
                (workdir / name).rename(aside / name)
    except OSError as error:
        raise _unwritable(workdir, error) from None


def _unwritable(workdir: Path, error: OSError) -> UserError:
    file = error.filename2 or error.filename or "a file"  # a full disk names none
    return UserError(f"--workdir={workdir}: {file} cannot be written: {error.strerror}")


@contextlib.contextmanager
def _ending_recorded(events: Events) -> Iterator[None]:
    """Records how the run ended."""
    try:
        yield
    except Stopped as stopped:
        events.add("preempted", str(stopped))
        raise
    except KeyboardInterrupt:
        events.add("stopped", "interrupted; the same command goes on from the last checkpoint")
        raise
    except SystemExit:
        events.add("preempted", _OUTSIDE)
        raise
    except BaseException as error:
        events.add("failed", str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        raise


def _leave_alone(workdir: Path, events: Events, error: Exception, hooks: Hooks) -> NoReturn:
    """Ends this process at once, to be started again, as another one is gone.

    An ordinary end would wait for the lost one, in the last save's barriers and in JAX's own, until JAX aborts with a
    page of stack traces.
    """
    log.debug("lost", exc_info=error)
    events.add("preempted", LOST)
    if jax.process_index() == 0:
        _page(hooks, workdir)
    print(f"error: {LOST}", file=sys.stderr)
    console.leave(STOPPED)


def _page(hooks: Hooks, workdir: Path) -> None:
    if workdir.is_dir():  # else it was deleted, which was told
        with may_fail(workdir / "report.html"):
            hooks.page()


@contextlib.contextmanager
def may_fail(file: Path) -> Iterator[None]:
    """A context for what people look at and a run does not need: a full disk or the like is logged and stops nothing.

    Args:
        file: what is written, for the message.
    """
    try:
        yield
    except (OSError, UserError) as error:
        log.warning("%s cannot be written (%s); the run goes on", file, getattr(error, "strerror", None) or error)


class _Loop:
    def __init__(
        self,
        setup: Setup,
        workdir: Path,
        identity: Identity,
        checkpoints: Checkpoints,
        writer: MetricWriter,
        events: Events,
        start: Start,
        hooks: Hooks,
        stop: Stop,
    ) -> None:
        self._setup, self._workdir, self._identity = setup, workdir, identity
        self._checkpoints, self._writer, self._events = checkpoints, writer, events
        self._start, self._hooks, self._stop = start, hooks, stop
        self._metrics: dict[str, float] = {}
        self._priors: dict[str, float] = {}
        self._replaced = Replacements()
        self._alarmed: set[str] = set()
        self._since_log: list[dict[str, jax.Array]] = []
        config = setup.config
        self._eval_every = setup.steps("eval.every")
        self._evals_every = setup.steps("eval.evals_every") if config.eval.evals_every else setup.total_steps
        self._watchdog = Watchdog(config.stall.report_after, config.stall.stop_after)
        flops = flops_per_example(config, setup.tokenizer.vocab_size if setup.tokenizer else 0)
        kind = jax.devices()[0].device_kind
        self._progress = Progress(config.batch_size, setup.total_steps, flops, setup.mesh.size, kind, start)

    def run(self) -> TrainState:
        """From the first state to the closing evaluations, watched."""
        with self._watchdog:
            self._watchdog.stage("starting", patient=True)
            data_report.tell(self._setup.reports(), self._events.add)
            with self._start.part("state"):
                state = self._first_state()
            self._save_data()
            self._catch_up(state)
            if int(state.step) < self._setup.total_steps:
                state = self._train(state)
            else:
                log.info("the run has all its %d steps; nothing to train", self._setup.total_steps)
            self._watchdog.stage("the closing evaluations", patient=True)
            self._finish(state)
        return state

    def _train(self, state: TrainState) -> TrainState:
        """Every step: train, log, validate, save, evaluate; in this order and nowhere else."""
        setup, watchdog, stop = self._setup, self._watchdog, self._stop
        start, total = int(state.step), setup.total_steps
        step_fn = setup.train_step()
        log_every, save_every = map(setup.steps, ("log_every", "checkpoint.every"))
        if start == 0:
            self._priors = self._hooks.prior()
            self._evaluate(state)
        log.info(self._progress.formula())
        log.info("compiling the step; then %d steps from step %d", total - start, start)
        self._progress.start(start)
        metrics: dict[str, jax.Array] = {}
        with (
            Profile(setup.config.profile, self._workdir / "profile", self._events) as profile,
            contextlib.closing(iter(setup.train_batches(start))) as batches,
            contextlib.ExitStack() as stack,
        ):
            for step in range(start + 1, total + 1):
                self._metrics = {}
                watchdog.stage("waiting for data")
                batch = self._progress.waiting(lambda: next(batches), metrics)
                self._replaced.add(batch)
                profile.before(step)
                compiling = step == start + 1
                watchdog.stage("compiling the step" if compiling else "running steps", patient=compiling)
                with self._progress.spent_on("compile") if compiling else contextlib.nullcontext():
                    state, metrics = step_fn(state, put_batch(batch, setup.mesh))
                if compiling:  # until here nothing is lost by ending at once
                    stack.callback(stop.release)
                    stop.hold()
                watchdog.started(step, metrics["loss"])
                profile.after(step, metrics)
                self._since_log.append({name: metrics[name] for name in _EVERY_STEP})
                stopping = stop.at_boundary()
                if step % log_every == 0 or step == start + 1 or step == total or stopping:
                    self._log(step, metrics, state)
                if self._validation_is_due(step) and not stopping:
                    stopping = not self._evaluate(state, stop.at_boundary)
                evaluations = self._evaluations_are_due(step)
                if step % save_every == 0 or step == total or evaluations or stopping:
                    self._save(state)
                if step == total or evaluations or stopping:
                    self._checkpoints.wait()
                if stopping:
                    break
                if evaluations:  # of a state that is saved, so that they can be cut short
                    with stop.released(step), self._progress.spent_on("evaluation"):
                        self._run_evals(state)
        if stop.requested:
            raise stopped_at(int(state.step))
        if self._replaced.by_reason.sum():
            log.warning(self._replaced.summary())
        return state

    def _validation_is_due(self, step: int) -> bool:
        return step % self._eval_every == 0 or step == self._setup.total_steps

    def _evaluations_are_due(self, step: int) -> bool:
        """Whether those at an interval are."""
        return step % self._evals_every == 0 and step < self._setup.total_steps

    def _catch_up(self, state: TrainState) -> None:
        """Does what a stop at this step has left undone."""
        step = int(state.step)
        if step == 0:
            return
        if self._setup.val_source and self._validation_is_due(step) and not self._checkpoints.is_evaluated(step):
            self._evaluate(state)
        if self._evaluations_are_due(step):
            self._run_evals(state)

    def _first_state(self) -> TrainState:
        """What the run starts from: 1. its own newest checkpoint, 2. ``init_from``, 3. fresh parameters."""
        setup = self._setup
        step = self._checkpoints.latest()
        if step is not None:
            state = self._restored(step)
            self._save_config(fresh_start=False)
            self._writer.start(step)
            self._announce("resumed", f"going on from step {step} of {self._workdir}", step)
            return state
        self._save_config(fresh_start=True)
        state = setup.fresh_state()
        self._writer.start(0)
        _log_overview(setup, state)
        self._announce("started", f"{setup.total_steps} steps of {setup.config.batch_size} examples", 0)
        return state

    def _restored(self, step: int) -> TrainState:
        # The checkpoint's own copy of the config counts: config.json may have been lost or edited.
        changed = self._identity.check(str(self._workdir), self._checkpoints.meta(step))
        for line in changed:
            self._announce("config", f"going on with another {line}", step)
        try:
            return self._checkpoints.restore(step, self._setup.abstract_state())
        except (ValueError, KeyError, TypeError) as error:
            if not changed:
                raise
            raise UserError(
                f"--allow_config_change={','.join(self._identity.allowed)}: the checkpoint's parameters do not fit the "
                f"changed config ({str(error).splitlines()[0][:300]}); start a new run from its weights with "
                f"--config.init_from={self._workdir}"
            ) from error

    def _save_config(self, *, fresh_start: bool) -> None:
        """Writes what the folder needs beside its checkpoints: config, tokenizer, the origin of its first weights."""
        if jax.process_index() > 0:
            return
        try:
            with replacing(self._workdir / CONFIG_FILE) as fresh:  # a kill while writing must not leave half a config
                fresh.write_text(config_lib.to_json(self._setup.config), encoding="utf-8")
            if self._setup.tokenizer:
                run_tokenizer.keep(self._setup.config.data.tokenizer, self._workdir)
            if fresh_start:
                origins = (origin.of_checkpoint(load.path) for load in self._setup.loads())
                origin.save(self._workdir, itertools.chain.from_iterable(origins))
        except OSError as error:
            raise _unwritable(self._workdir, error) from None

    def _save_data(self) -> None:
        """Writes down for the page what of the data is read and left out; of a run that may go on with them."""
        config, sources = self._setup.config, self._setup.sources()
        specs = {f"data.mixture.{name}": spec for name, spec in config.data.mixture.items()}
        specs |= {"data.train": config.data.train, "data.val": config.data.val}
        places = {field: {"format": specs[field].source, "path": specs[field].path} for field in sources}
        if jax.process_index() == 0:
            with may_fail(self._workdir / data_report.DATA_FILE):
                data_report.save(self._workdir, sources, places)

    def _announce(self, kind: str, text: str, step: int) -> None:
        log.info(text)
        self._events.add(kind, text, step)

    def _log(self, step: int, metrics: dict[str, jax.Array], state: TrainState) -> None:
        self._checkpoints.check_place()
        self._watchdog.stage(f"waiting for step {step}")
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._events.step = step
        values["skipped_steps"] = float(self._record_every_step(step))
        values |= self._replaced.metrics()
        values |= self._setup.train_data.progress(step)
        values["learning_rate"] = float(self._setup.learning_rate(max(int(state.guard.accepted) - 1, 0)))
        timing = self._progress.interval(step)
        del values["skipped"]
        row = {k if k.startswith("tokens/") else f"train/{k}": v for k, v in {**values, **timing}.items()}
        parts = self._progress.first_step(step)
        start = {f"start/{part}": seconds for part, seconds in parts.items()}
        self._writer.scalars(step, row | self._progress.shares() | memory() | self._priors | start)
        self._priors = {}
        log.info(self._progress.line(step, values, timing))
        if parts:
            listed = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())
            log.info("  the first step was done after %.1f s: %s", sum(parts.values()), listed)
        self._replaced.check(self._setup.config.data.max_bad_fraction, last=step == self._setup.total_steps)
        self._check_skipped(state)
        self._check_alarms(step, values)

    def _check_alarms(self, step: int, values: Mapping[str, float]) -> None:
        """Warns when a metric leaves the objective's bounds, as that of latent targets that collapse."""
        for name, (low, high) in self._setup.objective.alarms.items():
            out = name in values and not low <= values[name] <= high
            if out and name not in self._alarmed:
                text = "step %d: %s is %.4g, outside %g to %g (docs/metrics.md)"
                log.warning(text, step, name, values[name], low, high, extra={"kind": "alarm", "step": step})
            (self._alarmed.add if out else self._alarmed.discard)(name)

    def _record_every_step(self, step: int) -> int:
        """Records loss and verdict of all steps since the last time; returns how many were skipped."""
        steps = jax.device_get(self._since_log)
        first = step - len(steps) + 1
        self._since_log = []
        columns = {name: [float(one[name]) for one in steps] for name in _EVERY_STEP}
        self._writer.every_step(first, columns)
        skipped = [i for i, one in enumerate(steps) if int(one["skipped"]) != FINE]
        for i in skipped:
            slots = self._setup.slots(first + i)
            where = ", ".join(f"{name} {low}-{high}" for name, (low, high) in slots.items())
            log.warning(
                "step %d was skipped: %s (loss %g, gradient norm %g); positions %s",
                *(first + i, VERDICTS[int(steps[i]["skipped"])]),
                *(columns["loss"][i], columns["gradient_norm"][i], where),
                extra={"kind": "skipped", "step": first + i},
            )
        return len(skipped)

    def _check_skipped(self, state: TrainState) -> None:
        """Stops a run that only skips; before it saves, so that no good checkpoint makes room for its state."""
        in_a_row = int(state.guard.in_a_row)
        if in_a_row >= self._setup.config.anomaly.stop_after:
            step = int(state.step)
            raise UserError(
                f"{in_a_row} steps in a row were skipped, the last of them step {step}; the parameters are those of "
                f"step {step - in_a_row}. --mode=replay --step={step} shows what is wrong; then mend the data, or go "
                "on with another optimizer.learning_rate or anomaly.spike (--allow_config_change) or anomaly.stop_after"
            )

    def _evaluate(self, state: TrainState, stopping: Callable[[], bool] = lambda: False) -> bool:
        """Validation and pictures; False if `stopping` was true before the end."""
        self._checkpoints.check_place()
        self._watchdog.stage("evaluating", patient=True)
        with self._progress.spent_on("evaluation"):
            metrics = self._hooks.validate(state, stopping)
            if metrics is None:
                return False
            self._check_best("val", metrics)
            self._metrics = metrics
            step = int(state.step)
            self._writer.scalars(step, self._metrics | (self._priors if step == 0 else {}))
            if self._checkpoints.latest() == step:  # at once: a stop from here on must not lead to a second validation
                self._checkpoints.add_metrics(step, self._metrics)
            sheet = None
            with may_fail(self._workdir / "pictures"):
                sheet = self._hooks.draw(state)
            if sheet is not None:
                picture, texts = sheet
                self._writer.image(step, "reconstructions", picture)
                if texts:
                    self._writer.text(step, "reconstructions/captions", texts)
            if self._metrics:
                shown = " ".join(f"{k.removeprefix('val/')} {v:.4f}" for k, v in self._metrics.items())
                self._announce("evaluated", f"  validation at step {step}: {shown}", step)
            if step == 0 and self._metrics and self._priors:
                log.info("  to beat: %s", " ".join(f"{k} {v:.4f}" for k, v in self._priors.items()))
            if jax.process_index() == 0:
                _page(self._hooks, self._workdir)
        return True

    def _save(self, state: TrainState) -> None:
        self._watchdog.stage("saving")
        with self._progress.spent_on("checkpoint"):
            self._check_skipped(state)
            meta = {
                **self._identity.others,
                "config": self._setup.config.to_dict(),
                "modalities": self._setup.modalities(),
            }
            self._checkpoints.save(state, meta, self._metrics)
            self._events.add("saved", "checkpoint", int(state.step))

    def _finish(self, state: TrainState) -> None:
        where, step = self._workdir, int(state.step)
        if jax.process_index() == 0:
            with may_fail(where / "curves.png"):
                self._hooks.curves()
        self._run_evals(state)
        best = self._checkpoints.best()
        if best is not None and best != step:
            log.info("best by %s: %s", self._setup.config.checkpoint.best, where / "checkpoints" / str(best))
        self._events.add("finished", f"all {self._setup.total_steps} steps are done", step)
        log.info(_what_next(where, self._setup.total_steps, self._setup.config))

    def _run_evals(self, state: TrainState) -> None:
        self._checkpoints.check_place()
        figures = self._hooks.evaluate(state, self._writer, lambda name: self._watchdog.stage(name, patient=True))
        for name in self._setup.config.evals:
            self._check_best(name, figures)
        self._checkpoints.add_metrics(int(state.step), figures)

    def _check_best(self, kind: str, figures: Mapping[str, float]) -> None:
        """Refuses a figure for the best checkpoint that is not among those of its kind."""
        name, measured = self._setup.config.checkpoint.best, [key for key in figures if key.startswith(f"{kind}/")]
        if name.startswith(f"{kind}/") and measured and name not in measured:
            raise UserError(one_of("checkpoint.best", name, measured))


def _what_next(workdir: Path, steps: int, config: ConfigDict) -> str:
    """The last lines of a run: what can be done with it, as commands for this folder."""
    folder, program = shlex.quote(str(workdir)), f"{console.python()} -m m3ae_jax.main"
    longer = f'--config.duration="{2 * steps} steps" --allow_config_change=duration'
    code = "".join(f" {override}" for override in config_lib.allowing_named_code(config))
    objective = f", objective={config.objective!r}" if ":" in config.objective else ""
    return "\n".join(
        (
            f"done: all {steps} steps; checkpoints and pictures are in {workdir}",
            f"  its page:       {workdir / 'report.html'}",
            f"  use it:         m3ae_jax.load({str(workdir)!r}{objective})",
            f"  evaluate it:    {program} --mode=eval --workdir={folder}{code}",
            f"  train it on:    {program} --config={folder}/config.json{code} {longer}",
        )
    )


def _log_overview(setup: Setup, state: TrainState) -> None:
    from clu import parameter_overview

    logging.getLogger("parameters").info(
        "\n%s", parameter_overview.get_parameter_overview(state.params, include_stats=False)
    )
    log.info("%s", console.table(list(setup.derived().items())))
