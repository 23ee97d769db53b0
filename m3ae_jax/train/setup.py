"""What a run is made of, put together once: config, data, tokenizer, objective, mesh, optimizer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import m3ae_jax.console as console
import m3ae_jax.data.run_tokenizer as run_tokenizer
from m3ae_jax.checkpoint import manifest
from m3ae_jax.checkpoint.init_from import load_into
from m3ae_jax.checkpoint.manager import load_meta, located
from m3ae_jax.checkpoint.meta import STATE_VERSION
from m3ae_jax.config import default, difference, resolve, steps, to_json
from m3ae_jax.config import load as load_config
from m3ae_jax.data.mixture import Mixture, open_mixture
from m3ae_jax.data.order import order_version
from m3ae_jax.data.pipeline import Batches, Feed, check_modalities, eval_view, together
from m3ae_jax.data.sources import build_source
from m3ae_jax.data.sources.base import Source, report_of
from m3ae_jax.data.sources.index import IndexReport
from m3ae_jax.data.text import Tokenizer, load_tokenizer
from m3ae_jax.data.tokens import Group, Modality, restricted
from m3ae_jax.errors import UserError
from m3ae_jax.models import positions
from m3ae_jax.models.attention import KERNELS
from m3ae_jax.objectives.base import Batch, Load, Objective, build
from m3ae_jax.objectives.batch import abstract_part
from m3ae_jax.parallel.mesh import (
    Rules,
    activations_on,
    batch_parts,
    check_batch_size,
    local_rows,
    make_mesh,
    mesh_rules,
)
from m3ae_jax.parallel.processes import check_equal, in_all
from m3ae_jax.train.optimizer import optimizer, rate_factors, schedule
from m3ae_jax.train.step import (
    TrainState,
    abstract_state,
    check_micro_batches,
    extra_of,
    init_state,
    jit_train_step,
)

log = logging.getLogger("m3ae_jax")

T = TypeVar("T")


@dataclasses.dataclass
class Setup:
    """The parts of a run.

    Attributes:
        config: resolved.
        train_data: one source, or several.
        val_source: None if no validation data was named.
        tokenizer: None without text.
        total_steps: steps of the whole run.
        learning_rate: the schedule, of a step.
    """

    config: ConfigDict
    train_data: Mixture
    val_source: Source | None
    tokenizer: Tokenizer | None
    objective: Objective
    mesh: Mesh
    rules: Rules
    total_steps: int
    learning_rate: optax.Schedule
    optimizer: optax.GradientTransformation

    def sources(self) -> dict[str, Source]:
        """What is trained and validated on, by the field of the config that names it."""
        names, members = self.train_data.names, self.train_data.members
        fields = [f"data.mixture.{name}" for name in names] if names else ["data.train"]
        held = {"data.val": self.val_source} if self.val_source else {}
        return {**{field: member.source for field, member in zip(fields, members, strict=True)}, **held}

    def reports(self) -> dict[str, IndexReport | None]:
        """What each of `sources` left out and does not read; None of one that does not say."""
        return {field: report_of(source) for field, source in self.sources().items()}

    def steps(self, name: str) -> int:
        """A duration field of the config (``eval.every``) in steps, at least 1."""
        text = functools.reduce(lambda group, part: group[part], name.split("."), self.config)
        return max(1, steps(name, text, self.config.batch_size, self.train_data.epoch_examples))

    def train_batches(self, start_step: int) -> Generator[dict[str, Any], None, None]:
        """The training batches of this process from a step on, ``{part: rows}``."""
        parts = {}
        for part in self.train_data.parts:
            feed, groups = self.train_data.feed(part, self.config), restricted(self.objective.groups, part.modalities)
            parts[part.name] = self.batches(feed, groups, part.size, start_step, self.total_steps)
        return together(parts)

    def slots(self, step: int) -> dict[str, tuple[int, int]]:
        """First and last slot of each part of the batch that step number `step` (from 1 on) trains on.

        Of a part with one source these are its draws, ``example.position``.
        """
        return {part.name: ((step - 1) * part.size, step * part.size - 1) for part in self.train_data.parts}

    @functools.cached_property
    def val_batches(self) -> Batches | None:
        """The fixed validation batches, each a part: the same examples, pixels and masks each time."""
        if self.val_source is None:
            return None
        return self.eval_batches(self.val_source, self.config.eval.examples)

    def eval_batches(self, source: Source, examples: int) -> Batches:
        """The first `examples` of a source, in order, unaugmented; the last batch is padded with invalid examples.

        Each is a part.
        """
        size = self.eval_rows(examples)
        view = eval_view(self.config, source, examples)
        groups = restricted(self.objective.groups, source.modalities)
        return self.batches(Feed((source,), (view,)), groups, size, 0, -(-view.end // size))

    def eval_rows(self, examples: int, size: int = 0) -> int:
        """Rows of a batch of an evaluation: `size` (0: ``eval.batch_size``) or all examples, as the mesh needs it."""
        parts = batch_parts(self.mesh)
        return -(-min(size or self.config.eval.batch_size, examples) // parts) * parts

    def batches(self, feed: Feed, groups: tuple[Group, ...], size: int, start: int, stop: int) -> Batches:
        """This process's rows of batches of one part.

        Args:
            feed: where examples come from.
            groups: what of them is needed.
            size: rows of all processes.
            start: first step.
            stop: one past the last step.
        """
        return Batches(
            self.config,
            groups,
            feed,
            self.tokenizer,
            batch_size=size,
            rows=local_rows(self.mesh, size),
            start_step=start,
            stop_step=stop,
        )

    def loads(self) -> tuple[Load, ...]:
        """Checkpoints that go into the fresh state: that of ``init_from``, then the objective's."""
        first = (Load(self.config.init_from),) if self.config.init_from else ()
        return (*first, *self.objective.loads())

    def fresh_state(self) -> TrainState:
        """What a run begins with: fresh parameters, and what ``init_from`` and the objective load into the state."""
        state = self.init_state()
        loads = self.loads()
        params = self._loaded(state.params, "params", loads)
        if params is not state.params:
            extra = extra_of(self.objective, params, self.abstract_state(), self.config.seed)
            state = dataclasses.replace(state, params=params, extra=extra)
        return dataclasses.replace(state, extra=self._loaded(state.extra, "extra", loads))

    def _loaded(self, tree: Any, name: str, loads: Iterable[Load]) -> Any:
        """``params`` or ``extra`` with the loads that go into it."""
        modalities = self._modalities()

        def fit(name: str, stored: np.ndarray, leaf: jax.Array) -> tuple[Any, str] | None:
            layers = len(leaf) if "/blocks/" in name else 0
            if 0 < layers < len(stored) and stored.shape[1:] == leaf.shape[1:]:
                return stored[:layers], f"the first {layers} of {len(stored)} layers"
            return positions.fitted(name, stored, leaf, modalities)

        for load in loads:
            into, _, branch = load.into.partition("/")
            if into not in ("params", "extra"):
                raise UserError(f"an objective's load of {load.path} goes into {load.into!r}: not params or extra")
            if into == name:
                tree = load_into(
                    tree, load.path, branch, load.source, complete=load.complete, fit=fit, field=load.field
                )
                self._tell_of(load)
        return tree

    def _tell_of(self, load: Load) -> None:
        """Logs what of a checkpoint's run differs from this one so that its weights mean something else."""
        if load.frozen:
            return
        meta = load_meta(load.path)
        for line in positions.computed_anew(meta.get("modalities", ()), self._modalities()):
            log.info("%s=%s: %s", load.field, load.path, line)
        for line in _meant_otherwise(meta, self.config, pictures=not load.into.endswith("/text")):
            log.warning("%s=%s: its weights were trained with %s", load.field, load.path, line)
        theirs, ours = meta.get("tokenizer"), self.tokenizer.fingerprint if self.tokenizer else ""
        if theirs and ours and theirs != ours:
            log.warning("%s=%s: it has another tokenizer: its embeddings are of other words", load.field, load.path)

    def init_state(self) -> TrainState:
        """A fresh state on the mesh."""
        return init_state(self.objective, self.optimizer, self.mesh, self.config.seed, self.rules)

    def abstract_state(self) -> TrainState:
        """The state's shapes and shardings."""
        return abstract_state(self.objective, self.optimizer, self.mesh, self.config.seed, self.rules)

    def jit(self, function: Callable[..., T], **options: Any) -> Callable[..., T]:
        """`jax.jit`, with its options, and with the models' activations constrained to the mesh."""
        return self._on_mesh(jax.jit(function, **options))

    def _on_mesh(self, jitted: Callable[..., T]) -> Callable[..., T]:
        def call(*arguments: Any) -> T:
            with activations_on(self.mesh, self.rules):  # while it is traced, at the first call
                return jitted(*arguments)

        return call

    def train_step(self) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
        """The training step, jitted (`jit_train_step`)."""
        c = self.config
        abstract = self.abstract_state()
        return self._on_mesh(
            jit_train_step(
                self.objective,
                self.optimizer,
                c.seed,
                c.micro_batches,
                abstract,
                self.mesh,
                self.train_data.names,
                c.anomaly.spike,
            )
        )

    def identity(self) -> dict[str, Any]:
        """What makes the numbers of a run what they are, beside its config."""
        return {
            "state_version": STATE_VERSION,
            "order_version": order_version(self.config.data.crop_rule),
            "train_data": self.train_data.fingerprint,
            "tokenizer": self.tokenizer.fingerprint if self.tokenizer else "",
        }

    def modalities(self) -> list[dict[str, Any]]:
        """The table of the objective's modalities, JSON-able: stored with each checkpoint."""
        return [dataclasses.asdict(modality) for modality in self._modalities()]

    def _modalities(self) -> list[Modality]:
        return list({m.name: m for group in self.objective.groups for m in group.modalities}.values())

    def derived(self) -> dict[str, Any]:
        """Values that follow from the config and its data, for people to read."""
        config, data = self.config, self.train_data
        warmup = steps("optimizer.warmup", config.optimizer.warmup, config.batch_size, data.epoch_examples)
        return {
            **derived(config, self.tokenizer.vocab_size if self.tokenizer else 0),
            "steps": self.total_steps,
            "warmup_steps": warmup,
            "training examples": {m.name: len(m.source) for m in data.members} if data.names else data.epoch_examples,
            **({"rows of a batch": {part.name: part.size for part in data.parts}} if data.names else {}),
            "validation examples": len(self.val_source) if self.val_source else "none: data.val.path is empty",
            "mesh": ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items()),
            **self.identity(),
        }


def derived(config: ConfigDict, vocab_size: int) -> dict[str, Any]:
    """Values that follow from a resolved config alone."""
    objective = build(config, vocab_size)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    return {
        "peak_learning_rate": config.optimizer.learning_rate * config.batch_size / 256,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "vocab_size": vocab_size,
        "token slots": {
            group.name: {name: spec["valid"].shape[1] for name, spec in group.spec(1).items()}
            for group in objective.groups
        },
    }


def prepare(config: ConfigDict, workdir: Path | None = None) -> Setup:
    """Opens the data and builds the parts that a resolved config names.

    Args:
        config: resolved.
        workdir: the run's folder, where there may be one: it has its tokenizer.

    Raises:
        UserError: the data or the tokenizer is missing, or does not fit the config.
    """
    mesh = make_mesh(config)
    _check_device(config)
    check_batch_size(config, mesh)
    has_val = config.data.val.path or config.data.val.source == "scenes"

    def opened() -> tuple[Mixture, Source | None]:
        unit = batch_parts(mesh) * config.micro_batches
        return open_mixture(config, unit), build_source(config, "val") if has_val else None

    # Into a folder that all share, one process writes the indices, and the others read them.
    train_data, val_source = in_all(opened, first_alone=bool(config.data.index_dir))
    _check_same_data(train_data, val_source)
    if val_source and not set(val_source.modalities) & set(config.data.modalities):
        raise UserError(
            f"data.val holds only {', '.join(val_source.modalities)}, and data.modalities="
            f"{tuple(config.data.modalities)!r} trains none of it"
        )
    tokenizer = _tokenizer(config, workdir) if "text" in config.data.modalities else None
    objective = build(config, tokenizer.vocab_size if tokenizer else 0)
    check_micro_batches(objective, config.micro_batches)
    for part in train_data.parts:
        for member in part.members:
            source = train_data.members[member].source
            check_modalities(restricted(objective.groups, part.modalities), source, tokenizer)
    _check_parts(config, objective, [*(part.modalities for part in train_data.parts), *_held(val_source)])
    if config.optimizer.rates:
        rate_factors(nn.unbox(jax.eval_shape(objective.init, jax.random.key(0))), tuple(config.optimizer.rates))
    examples = train_data.epoch_examples
    total = max(1, steps("duration", config.duration, config.batch_size, examples))
    learning_rate = schedule(config, total, examples)
    return Setup(
        config=config,
        train_data=train_data,
        val_source=val_source,
        tokenizer=tokenizer,
        objective=objective,
        mesh=mesh,
        rules=mesh_rules(config),
        total_steps=total,
        learning_rate=learning_rate,
        optimizer=optimizer(config, learning_rate),
    )


def _held(source: Source | None) -> list[tuple[str, ...]]:
    return [tuple(source.modalities)] if source else []


def _check_parts(config: ConfigDict, objective: Objective, parts: Iterable[Iterable[str]]) -> None:
    """Lets the objective refuse parts of the data that lack a modality; now, and not when the step is compiled.

    Raises:
        UserError: it does.
    """
    wanted = set(config.data.modalities)
    lacking = {tuple(sorted(wanted.intersection(modalities))) for modalities in parts} - {tuple(sorted(wanted))}
    key = jax.random.key(0)
    for modalities in sorted(lacking):
        if groups := restricted(objective.groups, modalities):
            boxed = jax.eval_shape(objective.init, key)
            extra = nn.unbox(jax.eval_shape(objective.init_extra, boxed, key))
            part = abstract_part(groups, config.batch_size)
            jax.eval_shape(
                lambda params, extra, part: objective.loss(params, extra, part, None, jax.numpy.int32(0)).terms,
                nn.unbox(boxed),
                extra,
                part,
            )


def _meant_otherwise(meta: Mapping[str, Any], config: ConfigDict, *, pictures: bool) -> Iterator[str]:
    """The fields that change what weights of the same shapes compute, where a checkpoint's differ from these."""
    stored, names = meta.get("config") or {}, ("model.heads", "model.activation", "model.layer_norm_epsilon")
    for name in (*names, *(("data.image_mean", "data.image_std") if pictures else ())):
        group, _, field = name.partition(".")
        theirs, ours = stored.get(group, {}).get(field), config[group][field]
        theirs, ours = (tuple(value) if isinstance(value, list | tuple) else value for value in (theirs, ours))
        if theirs not in (None, ours):
            yield f"{name}={theirs}, which here is {ours}"


def _tokenizer(config: ConfigDict, run: Path | None) -> Tokenizer:
    """That of the run or, of a run that begins, that which is named.

    Raises:
        UserError: there is none; to train one is advised where nothing has been trained with another.
    """
    path, begins_with = config.data.tokenizer, config.init_from
    if run and manifest.steps(run / "checkpoints"):
        return run_tokenizer.of_run(path, run, run_tokenizer.HOW)
    if begins_with and (theirs := _tokenizer_of(located(begins_with)[0].parent)):
        advice = f"the weights of init_from={begins_with!r} go with theirs: --config.data.tokenizer={theirs}"
        if not path:
            raise UserError(f"data.tokenizer is empty; {advice}")
        return load_tokenizer(path, advice)
    if not path:
        raise UserError(
            "data.tokenizer is empty; it takes FILE.model (SentencePiece), a BERT vocab.txt, a tokenizer.json or "
            f"'scenes'. To train one: python -m m3ae_jax.data.train_tokenizer --source={config.data.train.source} "
            f"--path={config.data.train.path or 'DIR'} --output=tokenizer.model"
        )
    return load_tokenizer(path)


def _tokenizer_of(run: Path) -> str:
    """Where another run's tokenizer lies, or lay; empty of one without text."""
    with contextlib.suppress(UserError, OSError):
        return str(run_tokenizer.held(run) or load_config(str(run / "config.json")).data.tokenizer)
    return ""


def _check_same_data(train_data: Mixture, val_source: Source | None) -> None:
    """Refuses processes that would train on other examples than the first one."""
    sources = {f"the data of {member.name}": member.source for member in train_data.members}
    for name, source in {**sources, **({"data.val": val_source} if val_source else {})}.items():
        check_equal(name, f"{len(source):,} examples (fingerprint {source.fingerprint})")


def _check_device(config: ConfigDict) -> None:
    needs, backend = KERNELS[config.compute.attention], jax.default_backend()
    if needs not in (None, backend):
        raise UserError(f"compute.attention={config.compute.attention!r} needs a {needs}, here is a {backend}: use xla")


def data_sizes(config: ConfigDict) -> tuple[int, int]:
    """Words of the vocabulary and examples of an epoch of a resolved config; 0 for what cannot be opened."""
    vocabulary = examples = 0
    with contextlib.suppress(UserError):
        vocabulary = load_tokenizer(config.data.tokenizer).vocab_size if config.data.tokenizer else 0
    with contextlib.suppress(UserError):
        examples = open_mixture(config, 1).epoch_examples
    return vocabulary, examples


BERT_VOCABULARY = 30_522


def describe(config: ConfigDict) -> str:
    """``--mode=print_config``: what differs from the default, the resolved config, and what follows from it.

    The last only as far as the data can be opened.
    """
    changes = difference(default(config.objective), config)
    differs = "\n".join(f"  {name}={value!r} (default {before!r})" for name, before, value in changes) or "  nothing"
    resolved = resolve(config)
    try:
        values = prepare(resolved).derived()
    except UserError as error:
        vocabulary = BERT_VOCABULARY if "text" in resolved.data.modalities else 0
        values = {**derived(resolved, vocabulary), "not known yet": error}
    table = console.table(list(values.items()))
    return f"differs from the default:\n{differs}\n\n{to_json(resolved)}\nderived:\n{table}"
