"""A trained model of another run that stands still beside an objective: a visual tokenizer, a judge of pictures.

Its weights are in ``extra``, so they go with every checkpoint; what it is stands in the run's own config, as text, so
that the run needs the other one no more once it has begun.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import m3ae_jax.config as config_lib
from m3ae_jax.errors import UserError
from m3ae_jax.objectives.base import Boxed, Load, build
from m3ae_jax.objectives.batch import clean

_GROUPS = ("model.", "data.image_", "data.patch_size")


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A model that stands still.

    Attributes:
        objective: by which it was trained.
        config: of it, as it is used here.
        field: of the config that names its run.
        path: of its run; empty once it is part of this one.
        branches: of its parameters that are needed; none: all, and those of `Objective.model_extra`.
    """

    objective: Any
    config: ConfigDict
    field: str
    path: str
    branches: tuple[str, ...] = ()

    def init(self, rng: jax.Array) -> Boxed:
        """What `loads` fills."""
        params = self.objective.init(rng)
        if self.branches:
            return {name: params[name] for name in self.branches}
        extra = self.objective.init_extra(params, rng) if self.objective.model_extra else {}
        return {**params, **{name: extra[name] for name in self.objective.model_extra}}

    def hidden_ids(self, params: Any, group: Mapping[str, Any]) -> jax.Array:
        """Of a visual tokenizer: ids of a group's target patches, `[B, K] int32`; it sees the whole picture."""
        ids: jax.Array = self.objective.ids(jax.lax.stop_gradient(params), clean(group))
        return ids[:, ids.shape[1] - group["target"]["valid"].shape[1] :]

    def painted(self, params: Any, group: Mapping[str, Any], ids: jax.Array) -> jax.Array:
        """Of a visual tokenizer: the target patches, `[B, K, P] uint8`, of guessed ids `[B, K]`.

        What an id looks like depends on the others: those of the visible patches stand beside.
        """
        tokens = clean(group)
        shown = tokens["valid"].shape[1] - ids.shape[1]
        true = self.objective.ids(params, tokens)[:, :shown]
        pixels: jax.Array = self.objective.pixels(
            params, jnp.concatenate([true, ids.astype(true.dtype)], axis=1), tokens["position"]
        )
        return pixels[:, shown:]

    def loads(self, into: str) -> tuple[Load, ...]:
        """Of each branch, into a branch of the state.

        Raises:
            UserError: no run is named.
        """
        if not self.path:
            raise UserError(
                f"{self.field} is empty: name a run of {self.config.objective!r}, --config.{self.field}=RUN"
            )
        abstract = nn.unbox(jax.eval_shape(self.init, jax.random.key(0)))
        of_extra = set(self.objective.model_extra)
        return tuple(
            Load(self.path, f"{into}/{name}", f"extra/{name}" if name in of_extra else name, True, self.field, True)
            for name, branch in abstract.items()
            if jax.tree.leaves(branch)
        )


def described(field: str, path: str, objective: str) -> str:
    """What a run's model is, as JSON text of the fields that make it.

    Args:
        field: of the config that names the run, for the message.
        path: of the run, or a checkpoint in it.
        objective: which it must have been trained by.

    Raises:
        UserError: there is no run, or it is another objective's.
    """
    run = next((p for p in (Path(path), *Path(path).parents[:2]) if (p / "config.json").is_file()), None)
    if run is None:
        raise UserError(f"{field}={path!r} holds no run: there is no config.json in it")
    config = config_lib.load(str(run / "config.json"))
    if config.objective != objective:
        raise UserError(f"{field}={path!r} is a run of {config.objective!r}, not of {objective!r}")
    groups = (*_GROUPS, f"{objective}.")
    changed = config_lib.difference(config_lib.default(objective), config_lib.resolve(config))
    settings = config_lib.fields(config)
    kept = {
        name: value
        for name, _, value in changed
        if name.startswith(groups) and not (settings[name].loss or settings[name].weights)
    }
    return json.dumps({"objective": objective, **kept}, sort_keys=True)


class Slot(NamedTuple):
    """Two fields of a group that say which model stands still beside its objective.

    Attributes:
        run: names the run.
        description: what the model is (`described`); filled in.
        objective: by which it must have been trained.
    """

    run: str
    description: str
    objective: str


TOKENIZER = Slot("image_tokenizer", "image_tokenizer_model", "visual_tokenizer")
"""In whose ids pictures are restored."""


def built(config: ConfigDict, path: str, slot: Slot, *, branches: tuple[str, ...] = ()) -> Frozen:
    """The model that a slot's description describes; without one the default model, which has no weights (for plans).

    Args:
        config: of the run that uses it; it is computed as this says. Where no run is named its weights are in this
            run's state.
        path: of the group.
        slot: its fields.
        branches: see `Frozen`.

    Raises:
        UserError: its pictures are cut otherwise, or have another size, which k-means does not mind.
    """
    field, named, description = f"{path}.{slot.run}", config[path][slot.run], config[path][slot.description]
    sizes = {f"data.{name}": config.data[name] for name in ("patch_size", "image_size")}
    fields: dict[str, Any] = json.loads(description) if description else {"objective": slot.objective, **sizes}
    its = config_lib.default(fields.pop("objective"))
    config_lib.apply_overrides(its, [(name, _text(value)) for name, value in fields.items()])
    any_size = its.get("visual_tokenizer", {}).get("quantizer") == "kmeans"
    for name in ("patch_size", *(() if any_size else ("image_size",))):
        if its.data[name] != config.data[name]:
            theirs = its.data[name]
            raise UserError(
                f"data.{name}={config.data[name]}: {field}{f'={named!r}' if named else ''} was trained with {theirs}; "
                f"set data.{name}={theirs}, or name another run"
            )
    its.data.image_size, its.data.modalities = config.data.image_size, ("image",)
    its.compute = config.compute
    its = config_lib.resolve(its)
    return Frozen(build(its, 0), its, field, named, branches)


def _text(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, list) else str(value)


def fill_in(config: ConfigDict, path: str, slot: Slot, needed: bool, without: str) -> None:
    """Fills in the description of a run that a group of fields names; for `FieldGroup.check`.

    Args:
        config: the whole.
        path: of the group.
        slot: its fields.
        needed: whether the group's objective uses it.
        without: the fields that it needs, for the message.

    Raises:
        UserError: it is no such run, or named and not needed.
    """
    group: Any = config[path]
    if not needed:
        if group[slot.run]:
            raise UserError(f"{path}.{slot.run}={group[slot.run]!r} is not used without {without}")
        return
    if group[slot.run] and not (group[slot.description] and not Path(group[slot.run]).exists()):
        group[slot.description] = described(f"{path}.{slot.run}", group[slot.run], slot.objective)
