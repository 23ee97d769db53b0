"""Checkpoints of a run: asynchronous, verified, the newest few and the best one retained, restored onto any mesh.

A checkpoint holds the whole training state and a small JSON of what identifies the run: its config, the version
of the data order and the fingerprints of the data and the tokenizer. The order in which a save becomes a checkpoint:

1. every process writes its files into a temporary folder, which process 0 then renames;
2. process 0 writes the manifest over all of them (`m3ae_jax.checkpoint.manifest`): from now on it counts;
3. older ones that are no longer to be retained are deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint.path import atomicity

from m3ae_jax.atomic import replacing, set_aside
from m3ae_jax.checkpoint import manifest
from m3ae_jax.checkpoint import meta as meta_lib
from m3ae_jax.config.fields import FieldGroup, setting
from m3ae_jax.errors import EverywhereError, UserError, one_of
from m3ae_jax.parallel.processes import all_say
from m3ae_jax.paths import local

log = logging.getLogger("m3ae_jax")

VALIDATED = "val/loss"
"""The figure that every validated checkpoint has, and by which one is the best unless the config names another."""
RETRY_AFTER = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds to wait before each new attempt at a save that the storage refused."""

_DAMAGED = ".damaged"
_NONE, _REFUSED = -1, -2  # what process 0 sends to the others instead of a step


class CheckpointFields(FieldGroup):
    """When checkpoints are written, and how many stay."""

    every: str = setting("1 epochs", duration=True, aliases=("save_every",))
    """Time between checkpoints; there is one before the evaluations of `eval.evals_every` too, and at the end."""
    keep: int = setting(2, low=1)
    """Newest checkpoints that stay, besides the best and the last."""
    best: str = setting(VALIDATED)
    """The figure of the best checkpoint, which stays: of the validation (``val/...``), or of an evaluation that runs
    each `eval.evals_every` (``retrieval/...``, as metrics.jsonl names it)."""
    best_is: str = setting("least", choices=("least", "greatest"))
    """Which value of that figure is the best."""

    @staticmethod
    def check(config: ConfigDict, path: str) -> None:
        """Refuses a figure that nothing measures during the run."""
        name = config.checkpoint.best
        kind = name.partition("/")[0]
        if "/" not in name or kind not in ("val", *config.evals):
            raise UserError(one_of("checkpoint.best", name, (VALIDATED, *(f"{of}/..." for of in config.evals))))
        if kind != "val" and not config.eval.evals_every:
            raise UserError(
                f"checkpoint.best={name!r} needs eval.evals_every: without it {kind} runs once, at the end of the run"
            )


@dataclasses.dataclass(frozen=True)
class _Save:
    step: int
    state: Any
    meta: dict[str, Any]
    figures: dict[str, float]

    def alive(self) -> bool:
        """Whether no array of the state was donated to a later step."""
        return not any(x.is_deleted() for x in jax.tree.leaves(self.state) if isinstance(x, jax.Array))


class Checkpoints:
    """The checkpoints in one folder.

    Opened for training it first tidies up: damaged checkpoints, and those of other runs or steps than their place
    says, are set aside as ``STEP.damaged``; what interrupted saves left is deleted; each with a line in the log. Of
    older ones than the newest whole one no large file is read, but all that orbax parses. In a folder none of
    whose checkpoints has a manifest, as written before manifests existed, they are taken as they are, with one
    warning, and get manifests now.

    With several processes, all of them make it and call its methods together; process 0 reads and checks.

    Args:
        folder: made if missing.
        keep: how many of the newest to retain; the best one is retained too.
        best: the figure by which one is the best.
        greatest: whether its greatest value is the best, not its least.
        read_only: touches nothing, not even what a running save has not finished.
        sleep: waits so many seconds.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int,
        *,
        best: str = VALIDATED,
        greatest: bool = False,
        read_only: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._folder = Path(folder).resolve()  # a relative path would fail late, in orbax's background thread
        self._keep, self._read_only, self._sleep = keep, read_only, sleep
        self._best, self._sign = best, -1.0 if greatest else 1.0
        self._checked: set[int] = set()
        self._pending: _Save | None = None
        if not read_only:  # to read, orbax's manager is not needed: it would parse a file of every checkpoint
            newest = _on_first_process(lambda: _tidy(self._folder))
            self._checked |= set() if newest is None else {newest}
            self._manager = self._open()
            self._run = manifest.run_of(self._folder)

    def _open(self) -> ocp.CheckpointManager:
        best = policies.BestN(get_metric_fn=self._score, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        return ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(self._keep), best]),
                # Without best_fn orbax writes no metrics, and forgets after a restart which one is best.
                best_fn=self._score,
                best_mode="min",
                temporary_path_class=_ListedPath,
            ),
        )

    def save(self, state: Any, meta: dict[str, Any], metrics: dict[str, float]) -> None:
        """Starts to save; does nothing if this step is saved already.

        What the storage refuses is tried again for about 30 seconds. A save that failed in the background and whose
        state was donated meanwhile is given up with a warning; this one is then waited for.

        Args:
            state: pytree of `jax.Array` with a scalar `step`; referenced until the next save or wait.
            meta: JSON-able.
            metrics: validation figures at this step, ``{}`` if it was not evaluated.

        Raises:
            UserError: the storage refuses for good; the checkpoints before are intact. Or the folder is gone.
        """
        self.check_place()
        at_once = False
        try:
            self._settle()
        except _Lost as lost:
            log.warning("%s; saving step %d instead", lost, int(state.step))
            self._reopen(lost.step)
            at_once = True
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        save = _Save(step, state, meta, self._figures(metrics))
        try:
            self._start(save)
            self._pending = save
        except Exception as error:
            self._again(save, error)
        if at_once:
            self._settle()

    def latest(self) -> int | None:
        """The newest whole step, None if there is none.

        Raises:
            UserError: there are checkpoints, and none is whole.
        """
        if not self._read_only:
            return self._manager.latest_step()
        newest = _on_first_process(lambda: _newest_told(self._folder))
        self._checked |= set() if newest is None else {newest}
        return newest

    def best(self) -> int | None:
        """The best step among those retained; None if none has the figure."""
        step = self._manager.best_step()
        return step if step is not None and self._best in self._saved_figures(step) else None

    def is_evaluated(self, step: int) -> bool:
        """Whether validation figures were saved with a step."""
        return VALIDATED in self._saved_figures(step)

    def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Adds to a saved step figures that `save` would have taken.

        Raises:
            UserError: the storage refuses.
        """
        figures = self._figures(metrics)
        if not figures:  # in no process: what the file holds must not decide, as process 0 may have written it already
            return
        before = self._saved_figures(step)
        if jax.process_index() == 0 and not figures.items() <= before.items():
            try:
                _write_metrics(self._folder / str(step), before | figures)
            except OSError as error:
                raise UserError(f"{self._folder / str(step)} cannot be written: {error.strerror}") from None
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"metrics of step {step}")
        self._reopen(step)

    def restore(self, step: int, abstract: Any) -> Any:
        """The state of a step, on the shardings of `abstract` (`jax.ShapeDtypeStruct` leaves).

        Raises:
            UserError: the checkpoint is damaged, or holds other arrays.
        """
        self._check(step)
        checkpoint = self._folder / str(step)
        with _reading(checkpoint):
            stored = _stored(checkpoint)
            if differences := differences_of(stored, abstract):
                raise UserError(
                    f"checkpoint {checkpoint} holds another state than this config and code make: "
                    f"{manifest.summary(differences)}; go on with what made it, or start a new run from its weights "
                    f"with --config.init_from={self._folder.parent}"
                )
            with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
                state = handler.restore(checkpoint / "state", args=ocp.args.StandardRestore(abstract))
        _check_step(checkpoint, state.step)
        return state

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved as `meta` with a step.

        Raises:
            UserError: the checkpoint is damaged.
        """
        self._check(step)
        return meta_lib.read(self._folder / str(step))

    def params(self, step: int, extra: Iterable[str] = ()) -> dict[str, Any]:
        """The parameters alone of a step, as nested dicts of NumPy arrays in host memory.

        Args:
            step: whose.
            extra: branches of the state beside the parameters, which are put among them under their names.

        Raises:
            UserError: the checkpoint is damaged or lacks a branch, or a newer program made it.
        """
        self._check(step)
        checkpoint = self._folder / str(step)
        meta_lib.refuse_newer(meta_lib.read(checkpoint), f"checkpoint {checkpoint}")
        with _reading(checkpoint):
            tree = _stored(checkpoint)
            beside = tree["extra"] if isinstance(tree.get("extra"), dict) else {}
            if missing := [name for name in extra if name not in beside]:
                raise UserError(f"checkpoint {checkpoint} has no {', '.join(missing)} beside its parameters")
            branches = {"params": tree["params"], "step": tree["step"], "extra": {name: beside[name] for name in extra}}
            # An empty node has no shape: orbax says so by a leaf without one.
            branches = {name: branch for name, branch in branches.items() if jax.tree.leaves(branch)}
            wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), branches)
            restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
            with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
                restored = handler.restore(checkpoint / "state", args=args)
        _check_step(checkpoint, restored["step"])
        params: dict[str, Any] = restored.get("params", {})
        return {**params, **restored.get("extra", {})}

    def check_place(self) -> None:
        """Refuses to go on where the folder was deleted, or now belongs to another run.

        Raises:
            UserError: as said.
        """
        run = manifest.run_of(self._folder)
        if not self._folder.is_dir() or (self._run and run and run != self._run):
            raise UserError(
                f"{self._folder} was deleted or replaced while the run went on, which stops here; nothing more is "
                "written to it"
            )
        self._run = self._run or run

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
            UserError: the storage refuses for good; the checkpoints before are intact.
        """
        try:
            self._settle()
        except _Lost as lost:
            raise UserError(f"{lost}; {self._intact(lost.step)}") from None

    def close(self) -> None:
        """Waits, as `wait` does, and stops the background threads."""
        try:
            self.wait()
        finally:
            if not self._read_only:
                with contextlib.suppress(Exception):  # a failed save is reported above, and orbax reports it again
                    self._manager.close()

    def _check(self, step: int) -> None:
        if step not in self._checked:
            _on_first_process(lambda: _named(self._folder, step))
            self._checked.add(step)

    def _start(self, save: _Save) -> None:
        args = ocp.args.Composite(state=ocp.args.StandardSave(save.state), meta=ocp.args.JsonSave(save.meta))
        started = self._manager.save(save.step, args=args, metrics=save.figures or None)
        assert started, f"orbax will not save step {save.step} after step {self._manager.latest_step()}"

    def _figures(self, metrics: dict[str, float]) -> dict[str, float]:
        """Those that are saved with a step."""
        return {name: metrics[name] for name in {VALIDATED, self._best} if name in metrics}

    def _saved_figures(self, step: int) -> dict[str, float]:
        return dict(self._manager.metrics(step) or {})

    def _score(self, figures: dict[str, float]) -> float:
        """Less is better; what has no figure is the worst."""
        return self._sign * figures.get(self._best, self._sign * math.inf)

    def _settle(self) -> None:
        save, self._pending = self._pending, None
        if save is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._again(save, error)

    def _again(self, save: _Save, error: Exception) -> None:
        """Tries a failed save again, with longer and longer pauses."""
        # Of several processes only one may have failed, and the others wait for it inside orbax: none tries again.
        pauses = RETRY_AFTER if jax.process_count() == 1 else ()
        for pause in pauses:
            self.check_place()
            trouble = _trouble(error)
            if not save.alive():
                raise _Lost(save.step, trouble)
            log.warning("step %d could not be saved (%s); again in %.0f s", save.step, trouble, pause)
            self._sleep(pause)
            try:
                self._reopen(save.step)
                self._start(save)
                self._manager.wait_until_finished()
                return
            except Exception as new:
                error = new
        trouble = _trouble(error)
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                _remove_unfinished(self._folder, save.step)
        raise UserError(
            f"step {save.step} could not be saved in {self._folder} (attempts: {len(pauses) + 1}): {trouble}; "
            f"{self._intact(save.step)}"
        ) from error

    def _reopen(self, step: int) -> None:
        # After a failure orbax's manager believes that it still saves, and has forgotten what it meant to delete.
        with contextlib.suppress(Exception):
            self._manager.close()
        _remove_unfinished(self._folder, step)
        _on_first_process(lambda: _set_aside_damaged(self._folder))
        self._manager = self._open()

    def _intact(self, failed: int) -> str:
        before = [step for step in manifest.finished(self._folder) if step != failed]
        return (
            f"the last good checkpoint, step {before[0]}, is intact" if before else "there is no checkpoint before it"
        )


class _ListedPath(atomicity.AtomicRenameTemporaryPath):
    """Orbax's temporary folder; process 0 alone ends it, after all have written and before older steps are deleted."""

    async def finalize(self) -> None:
        """Renames the folder and, if it is a step's and not one inside it, writes the manifest."""
        await super().finalize()
        final = Path(self.get_final())
        if manifest.step_of(final.name) is not None:
            await asyncio.to_thread(manifest.write, final)


class _Lost(Exception):
    """A save failed and its arrays are gone."""

    def __init__(self, step: int, trouble: str) -> None:
        super().__init__(f"step {step} could not be saved: {trouble}")
        self.step = step


def _trouble(error: BaseException) -> str:
    """The storage's error message; raises `error` again if it did not come from there."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return f"{cause.strerror or cause}" + (f" ({cause.filename})" if cause.filename else "")
        code = re.search(r"os_error_code='(\d+)'", str(cause))  # tensorstore's ValueError
        if code:
            return os.strerror(int(code[1]))
        cause = cause.__cause__ or cause.__context__
    raise error


def _on_first_process(decide: Callable[[], int | None]) -> int | None:
    """Returns on every process what process 0 decided; a `UserError` of it is raised on all."""
    if jax.process_count() == 1:
        return decide()
    answer, trouble = _NONE, ""
    if jax.process_index() == 0:
        try:
            step = decide()
            answer = _NONE if step is None else step
        except UserError as error:
            answer, trouble = _REFUSED, str(error)
    answer = int(multihost_utils.broadcast_one_to_all(np.int32(answer)))
    if answer == _REFUSED:
        said = all_say(trouble)[0]
        raise EverywhereError(said if jax.process_index() == 0 else f"process 0: {said}")
    return None if answer == _NONE else answer


def _newest(folder: Path) -> int | None:
    """The newest whole step; logs which ones it passes over, and why."""
    steps, finished = manifest.steps(folder), manifest.finished(folder)
    wrong: dict[int, str] = {}
    if not finished:  # as before manifests existed
        _warn_without_manifests(folder)
    for step in finished or steps:
        summary = _trouble_of(folder / str(step), guarded=bool(finished))
        if not summary:
            for passed, why in wrong.items():
                log.warning("checkpoint %s is damaged: %s; using step %d", folder / str(passed), why, step)
            return step
        wrong[step] = summary
    if not steps:
        return None
    wrong |= {step: f"{manifest.NAME}: missing" for step in steps if step not in wrong}
    raise UserError(f"no whole checkpoint in {folder}: {'; '.join(f'{s}: {w}' for s, w in wrong.items())}")


def _newest_told(folder: Path) -> int | None:
    """As `_newest`, for readers: they leave what is not finished, and it may become a checkpoint yet."""
    newest = _newest(folder)
    if newest is not None and manifest.finished(folder):
        _tell_unfinished(folder, newest)
    return newest


def _tell_unfinished(folder: Path, newest: int) -> None:
    for step in manifest.steps(folder):
        if step > newest and not (folder / str(step) / manifest.NAME).exists():
            log.warning(
                "checkpoint %s has no %s: it was never finished, is being saved, or the file was lost; using step %d",
                *(folder / str(step), manifest.NAME, newest),
            )


def _trouble_of(checkpoint: Path, *, guarded: bool = True, large: bool = True) -> str:
    """What is wrong with a checkpoint, in one line; "" if it is whole.

    Args:
        checkpoint: its folder.
        guarded: by a manifest, as every one is where one beside it is; else it is only seen whether it can be parsed.
        large: read the large files too.
    """
    if guarded and (problems := manifest.problems(checkpoint, large=large)):
        return manifest.summary(problems)
    try:
        meta_lib.read(checkpoint)
        if (checkpoint / meta_lib.METRICS).exists():
            for name, figure in (meta_lib.read(checkpoint, meta_lib.METRICS) or {VALIDATED: None}).items():
                if not isinstance(figure, int | float):
                    return f"{meta_lib.METRICS} has {name}={figure!r:.50}, which is no number"
    except UserError as error:
        return str(error).partition(" is damaged: ")[2]
    return ""


def _warn_without_manifests(folder: Path) -> None:
    if manifest.steps(folder) and not manifest.finished(folder):
        log.warning("%s: no checkpoint has a %s, so damage cannot be seen; taken as it is", folder, manifest.NAME)


def _named(folder: Path, step: int) -> int:
    """`step`, if it is whole or no checkpoint beside it has a manifest."""
    if trouble := _trouble_of(folder / str(step), guarded=bool(manifest.finished(folder))):
        raise UserError(f"checkpoint {folder / str(step)} is damaged: {trouble}")
    return step


def _check_step(checkpoint: Path, step: Any) -> None:
    """Refuses a state that is of another step than its folder: where no manifest says it, the state itself does."""
    if int(step) != int(checkpoint.name):
        raise UserError(
            f"checkpoint {checkpoint} is of step {int(step)}: its folder was renamed or copied; name it {int(step)}"
        )


@contextlib.contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    """Within it whatever damage raises is one line, where there is no manifest by which it was seen before.

    Raises:
        UserError: as said.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (checkpoint / manifest.NAME).exists() or jax.process_count() > 1:
            raise
        text = " ".join(str(error).split())
        raise UserError(
            f"checkpoint {checkpoint} is damaged ({manifest.NAME}: missing): {type(error).__name__}: {text:.200}"
        ) from error


def _tidy(folder: Path) -> int | None:
    """Leaves only checkpoints to go on from or to retain; returns the newest whole step."""
    newest = _newest(folder)
    try:
        for path in list(folder.glob("[0-9]*")):
            named = re.fullmatch(r"[0-9]\d*", path.name)  # which orbax takes for a step
            if named and (manifest.step_of(path.name) is None or not path.is_dir()):
                log.warning("%s is no checkpoint", path)
                _set_aside(path)
        for path in list(folder.glob(f"*{atomicity.TMP_DIR_SUFFIX}*")):
            log.info("deleting %s, which an interrupted save left", path)
            shutil.rmtree(path)
        finished = manifest.finished(folder)
        for step in manifest.steps(folder):
            path = folder / str(step)
            if newest is not None and not finished:
                manifest.write(path)
            elif step not in finished:
                log.info("deleting %s: it has no %s, so it was never finished", path, manifest.NAME)
                shutil.rmtree(path)
            elif newest is not None and step > newest:
                _set_aside(path)
        manifest.claim(folder)  # also of a fresh run, which else would not notice that another takes its place
        if newest is not None:
            _set_aside_damaged(folder)
            upgraded = [step for step in manifest.finished(folder) if manifest.upgrade(folder / str(step))]
            if upgraded:
                log.info("%s: the %s of an earlier version now say step and run: %s", folder, manifest.NAME, upgraded)
    except OSError as error:
        raise UserError(f"{folder} cannot be tidied up: {error.strerror} ({error.filename})") from None
    return newest


def _write_metrics(checkpoint: Path, metrics: dict[str, float]) -> None:
    """As orbax does (`CheckpointManager.save(..., metrics=...)`), which can do it only while it saves a step."""
    file = checkpoint / "metrics" / "metrics"
    file.parent.mkdir(exist_ok=True)
    with replacing(file) as fresh:
        fresh.write_text(json.dumps(metrics), encoding="utf-8")
    manifest.write(checkpoint)


def _set_aside_damaged(folder: Path) -> None:
    """Sets aside what is damaged of the checkpoints that are not gone on from; each is told."""
    for step in manifest.finished(folder):
        path = folder / str(step)
        if trouble := _trouble_of(path, large=False):
            log.warning("checkpoint %s is damaged: %s", path, trouble)
            _set_aside(path)


def _set_aside(path: Path) -> None:
    log.warning("setting it aside as %s", set_aside(path, _DAMAGED))


def _remove_unfinished(folder: Path, step: int) -> None:
    for path in folder.glob(f"{step}{atomicity.TMP_DIR_SUFFIX}*"):
        shutil.rmtree(path)
    if step not in manifest.finished(folder):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder / str(step))


def find(path: str) -> tuple[Path, int]:
    """Finds a whole checkpoint: a run's folder, its ``checkpoints`` folder, or one step's folder inside.

    All processes call it together.

    Returns:
        The ``checkpoints`` folder and the step: the newest whole one, unless a step's folder was named.

    Where none has a manifest, as before manifests existed, it is taken as it is, with a warning.

    Raises:
        UserError: nothing there, the named one is damaged, or none is whole.
    """
    folder, named = _place(path)
    if named is not None:
        _warn_without_manifests(folder)
    step = _on_first_process(lambda: _newest_told(folder) if named is None else _named(folder, named))
    assert step is not None  # _place has seen one
    return folder, step


def _place(path: str) -> tuple[Path, int | None]:
    root = local(path, "checkpoint").resolve()
    named = manifest.step_of(root.name)
    if named is not None and ((root / "state").is_dir() or (root / manifest.NAME).exists()):
        return root.parent, named
    for folder in (root / "checkpoints", root):
        if manifest.steps(folder):
            return folder, None
    raise UserError(
        f"no checkpoint at {path!r}: it takes a run's folder (--workdir), or one checkpoint in it, "
        "as runs/tiny/checkpoints/1000"
    )


def load_params(path: str, extra: Iterable[str] = ()) -> dict[str, Any]:
    """The parameters alone of a checkpoint, as nested dicts of NumPy arrays in host memory.

    Of a run's folder it takes the newest checkpoint and no other, even if that is damaged. All processes call it
    together.

    Args:
        path: of a run, or of one checkpoint in it.
        extra: as of `Checkpoints.params`.

    Raises:
        UserError: no checkpoint there, or it is damaged.
    """
    folder, named = _place(path)
    finished = manifest.finished(folder)
    newest = max(finished or manifest.steps(folder))
    _warn_without_manifests(folder)
    if named is None:
        _tell_unfinished(folder, newest)
    return Checkpoints(folder, keep=1, read_only=True).params(newest if named is None else named, extra)


def _stored(checkpoint: Path) -> Any:
    """Shapes and dtypes of the state that a checkpoint holds, as nested dicts and lists."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        return handler.metadata(checkpoint / "state").tree


def differences_of(stored: Any, wanted: Any) -> list[str]:
    """Arrays that one of two states lacks or that have another shape, one entry an array."""
    old, new = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            if hasattr(leaf, "shape")  # orbax writes an empty node as a leaf
        }
        for tree in (stored, wanted)
    )
    lines = [f"{name} {old[name]} instead of {shape}" for name, shape in new.items() if old.get(name, shape) != shape]
    lines += [f"{name} is missing" for name in new if name not in old]
    return lines + [f"{name} is not expected" for name in old if name not in new]


def located(path: str) -> tuple[Path, int]:
    """The ``checkpoints`` folder and the step that `load_params` takes; nothing of them is checked.

    Raises:
        UserError: no checkpoint there.
    """
    folder, named = _place(path)
    return folder, max(manifest.finished(folder) or manifest.steps(folder)) if named is None else named


def load_meta(path: str) -> dict[str, Any]:
    """What was saved as `meta` with the checkpoint that `load_params` takes. All processes call it together.

    Raises:
        UserError: no checkpoint there, or it is damaged.
    """
    folder, step = located(path)
    with contextlib.closing(Checkpoints(folder, keep=1, read_only=True)) as checkpoints:
        return checkpoints.meta(step)
