"""Which groups of fields a config has, and configs with every field at its default.

The groups are declared beside the code that reads them. They are named here as text and imported when a config is made,
so that their modules may import `config` themselves.
"""

from __future__ import annotations

import fnmatch
import importlib
import sys
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from m3ae_jax.config.fields import FieldGroup, Setting, declared
from m3ae_jax.errors import UserError, one_of

GROUPS: dict[str, str] = {
    "": "m3ae_jax.config.run:RunFields",
    "model": "m3ae_jax.models.fields:ModelFields",
    "compute": "m3ae_jax.models.fields:ComputeFields",
    "optimizer": "m3ae_jax.train.optimizer:OptimizerFields",
    "mesh": "m3ae_jax.parallel.mesh:MeshFields",
    "data": "m3ae_jax.data.fields:DataFields",
    "data.train": "m3ae_jax.data.sources.base:SourceFields",
    "data.val": "m3ae_jax.data.sources.base:HeldOutFields",
    "data.mixture.*": "m3ae_jax.data.sources.base:SourceFields",
    "data.scenes": "m3ae_jax.data.sources.scenes:SceneOptions",
    "anomaly": "m3ae_jax.train.guard:AnomalyFields",
    "checkpoint": "m3ae_jax.checkpoint.manager:CheckpointFields",
    "stall": "m3ae_jax.train.watchdog:StallFields",
    "metrics": "m3ae_jax.metrics.writers:MetricFields",
    "eval": "m3ae_jax.evals.fields:EvalFields",
    "eval.train": "m3ae_jax.data.sources.base:SourceFields",
    "eval.test": "m3ae_jax.data.sources.base:HeldOutFields",
    "eval.outside": "m3ae_jax.data.sources.base:HeldOutFields",
    "eval.linear_probe": "m3ae_jax.evals.linear_probe:LinearProbeFields",
    "eval.finetune": "m3ae_jax.evals.finetune:FinetuneFields",
    "eval.robustness": "m3ae_jax.evals.robustness:RobustnessFields",
    "eval.attention": "m3ae_jax.evals.attention:AttentionFields",
    "eval.tsne": "m3ae_jax.evals.tsne:TsneFields",
}
"""The class of each group by its path; ``*`` stands for names that the user chooses. The chosen objective's group
stands beside them."""

OBJECTIVES: dict[str, str] = {
    "m3ae": "m3ae_jax.objectives.m3ae:M3AE",
    "contrastive": "m3ae_jax.objectives.contrastive:Contrastive",
    "mamo": "m3ae_jax.objectives.mamo:MAMO",
    "simla": "m3ae_jax.objectives.simla:Simla",
    "visual_tokenizer": "m3ae_jax.objectives.visual_tokenizer:VisualTokenizer",
}
"""The built-in objectives."""

_FREE = ("data.val.", "checkpoint.", "stall.", "eval.")  # groups of which no field identifies a run


def default(objective: str = "m3ae") -> ConfigDict:
    """Every field that exists, with its default: the paper's recipe for the base size.

    Args:
        objective: a built-in one, or an import path "package.module:Class".

    Raises:
        UserError: there is no such objective.
    """
    config = defaults(imported(GROUPS[""]))
    for path, where in list(GROUPS.items())[1:]:
        *parents, name = path.removesuffix(".*").split(".")
        group = config
        for parent in parents:
            group = group[parent]
        group[name] = ConfigDict(type_safe=False) if path.endswith(".*") else defaults(imported(where))
    config.objective = ""
    set_objective(config, objective)
    return config


def defaults(group: type) -> ConfigDict:
    """A group with every field at its default."""
    return ConfigDict({name: setting.default for name, setting in declared(group).items()}, type_safe=False)


def source_fields() -> ConfigDict:
    """The fields of one source, as of ``config.data.train``."""
    return defaults(imported(GROUPS["data.train"]))


def memory_lean(config: ConfigDict, head_groups: int = 4) -> ConfigDict:
    """Makes room for the largest batch a chip: stores nothing that can be computed anew, parameters lie over 16 chips.

    Where there is room to spare ``--mode=plan --search`` finds what is faster.
    """
    config.mesh.preset = "fsdp"
    config.compute.update(remat="full", attention_head_groups=head_groups, vocabulary_blocks=8)
    return config


def set_objective(config: ConfigDict, objective: str) -> None:
    """Changes the objective, and its group of fields with it.

    Raises:
        UserError: there is no such objective.
    """
    if objective != config.objective:
        objective_class(objective)
        for name in objective_groups(config):
            del config[name]
        config.objective = objective
        config.update({name: defaults(group) for name, group in objective_fields(objective).items()})


def imported(path: str) -> Any:
    """What an import path ``package.module:Name`` names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def objective_class(objective: str) -> Any:
    """The class that ``config.objective`` names, imported.

    Raises:
        UserError: no such objective, or it cannot be imported.
    """
    if objective in OBJECTIVES:
        return imported(OBJECTIVES[objective])
    if ":" not in objective:
        raise UserError(one_of("objective", objective, OBJECTIVES) + ' (or an import path "package.module:Class")')
    try:
        return imported(objective)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"objective={objective!r} cannot be imported: {error}") from None


def objective_fields(objective: str) -> dict[str, type[FieldGroup]]:
    """The class of the objective's group by its name; nothing if it has none.

    What the user named by an import path is looked for among the modules that are imported already: a config that comes
    with a checkpoint must not import anything.
    """
    module, colon, name = objective.partition(":")
    kind = getattr(sys.modules.get(module), name, None) if colon else objective_class(objective)
    fields = getattr(kind, "Fields", None)
    if not isinstance(fields, type) or not issubclass(fields, FieldGroup):
        return {}
    return {getattr(kind, "name", name.lower()) if colon else objective: fields}


def objective_groups(config: ConfigDict) -> list[str]:
    """Names of the groups at the top of a config that are those of an objective; there is at most one."""
    return [name for name, value in config.items() if isinstance(value, ConfigDict) and name not in GROUPS]


def class_of(path: str, objective: str) -> type[FieldGroup]:
    """The class of the group at a path; `FieldGroup` if none is known, as of an objective that is not imported yet."""
    for pattern, where in GROUPS.items():
        if fnmatch.fnmatchcase(path, pattern):
            return imported(where)
    return objective_fields(objective).get(path, FieldGroup)


def groups(config: ConfigDict, path: str = "") -> Iterator[tuple[str, ConfigDict]]:
    """All groups by path, the whole config first."""
    yield path, config
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from groups(value, join(path, name))


def leaves(config: ConfigDict) -> dict[str, Any]:
    """The value of each field by ``group.name``."""
    members = ((join(path, name), value) for path, group in groups(config) for name, value in group.items())
    return {name: value for name, value in members if not isinstance(value, ConfigDict)}


def fields(config: ConfigDict) -> dict[str, Setting]:
    """The declaration of each field by ``group.name``."""
    return {
        join(path, name): declared(class_of(path, config.objective)).get(name) or Setting(value)
        for path, group in groups(config)
        for name, value in group.items()
        if not isinstance(value, ConfigDict)
    }


def difference(a: ConfigDict, b: ConfigDict) -> list[tuple[str, Any, Any]]:
    """Fields of `b` that differ, as (name, value in `a` or None, value in `b`)."""
    before = leaves(a)
    return [(name, before.get(name), value) for name, value in leaves(b).items() if before.get(name) != value]


def same_objective(a: ConfigDict, b: ConfigDict) -> list[tuple[str, Any, Any]]:
    """As `difference`; of another objective that alone, and not the fields of its group, which all differ."""
    changes = difference(a, b)
    if a.objective == b.objective:
        return changes
    own = tuple(f"{name}." for name in objective_groups(b))
    ordered = sorted(changes, key=lambda change: change[0] != "objective")
    return [change for change in ordered if not change[0].startswith(own)]


def identifies(name: str, objective: str = "m3ae") -> bool:
    """Whether a run whose field of this name differs is another run.

    Raises:
        LookupError: there is no such field.
    """
    field = _setting_of(name, objective)
    return field.identifies and not field.program and not name.startswith(_FREE)


def names_weights(name: str, objective: str = "m3ae") -> bool:
    """Whether a field of this name says which weights a run starts from.

    Raises:
        LookupError: there is no such field.
    """
    return _setting_of(name, objective).weights


def _setting_of(name: str, objective: str) -> Setting:
    path, _, last = name.rpartition(".")
    if last not in (settings := declared(class_of(path, objective))):
        raise LookupError(f"no field {name} is declared")
    return settings[last]


def join(path: str, name: str) -> str:
    """The whole name of a field or group within the group at `path`."""
    return f"{path}.{name}" if path else name
