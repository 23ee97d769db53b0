"""How a visual vocabulary is used, and how much of a picture it keeps.

Usage is the share of the codes that occur among 100 ids a code of ``data.val``. Where the source is too small for that
it is read again, each time with other crops and flips, as in training. PSNR is of its pictures as they are.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from m3ae_jax.data.order import Order, fold_seed
from m3ae_jax.data.pipeline import Feed, View
from m3ae_jax.evals.base import Result, table
from m3ae_jax.evals.features import fresh_params, shared
from m3ae_jax.evals.restored import bootstrap_interval
from m3ae_jax.evals.verdict import sentence
from m3ae_jax.objectives.base import Params, Part, Tokenizes, model_params
from m3ae_jax.objectives.batch import clean
from m3ae_jax.objectives.parts.pixels import psnr
from m3ae_jax.objectives.parts.quantize import usage
from m3ae_jax.parallel.mesh import fetch, put_batch
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

log = logging.getLogger("m3ae_jax")

IDS_PER_CODE = 100
_MEAN_COLOUR = "mean colour of each patch"


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Usage, perplexity and PSNR, trained and untrained; beside them the PSNR of each patch's mean colour."""
    objective: Any = setup.objective
    assert isinstance(objective, Tokenizes)
    source = setup.val_source or setup.train_data.members[0].source
    ((modality,),) = (group.modalities for group in setup.objective.groups)
    pictures, seed = math.ceil(IDS_PER_CODE * objective.codes / modality.tokens), fold_seed("evaluations")
    whole = min(setup.config.eval.examples, len(source))
    plain = View(Order(len(source), seed), seed, augment=False, end=whole)
    cropped = dataclasses.replace(plain, augment=pictures > len(source), end=pictures)
    feeds = {"kept": Feed((source,), (plain,)), "used": Feed((source,), (cropped,))}
    log.info("codebook: %s pictures are read for the usage of each of two models", f"{pictures:,}")
    rows, scalars = [], {"codes": float(objective.codes), "ids": float(pictures * modality.tokens)}
    for who, params in _models(setup, state).items():
        hits = sum(one["hits"].astype(np.float64) for one in _seen(setup, params, feeds["used"]))
        kept = list(_seen(setup, params, feeds["kept"]))
        each, mean_colour = (np.concatenate([one[name] for one in kept]) for name in ("psnr", "mean_colour"))
        bounds = bootstrap_interval(each, np.ones_like(each))
        of = {"usage": float(np.mean(hits > 0)), "perplexity": float(usage(jnp.asarray(hits))["perplexity"])}
        of |= {"psnr": float(each.mean())}
        scalars |= {f"{who}/{name}": value for name, value in of.items()}
        scalars |= {f"{who}/psnr/{end}": value for end, value in bounds.items()}
        between = f"{of['psnr']:.2f} [{bounds['low']:.2f}, {bounds['high']:.2f}]"
        rows.append([who, f"{of['usage']:.3f}", f"{of['perplexity']:,.0f}", between])
    scalars["mean_colour/psnr"] = float(mean_colour.mean())
    rows.append([_MEAN_COLOUR, "", "", f"{mean_colour.mean():.2f}"])
    said = (
        f"{scalars['trained/usage']:.1%} of {objective.codes:,} codes occur among {scalars['ids']:,.0f} ids",
        f"PSNR {scalars['trained/psnr']:.2f} dB, {scalars['mean_colour/psnr']:.2f} dB of mean colours",
    )
    how = f"crops of {len(source):,} pictures" if cropped.augment else f"ids of {pictures:,} pictures"
    about = f"{how}; PSNR of {len(each):,} pictures, interval by bootstrap over them"
    heads = ("", "usage", "perplexity", "PSNR (dB)")
    return Result.of("codebook", scalars, table(heads, rows), sentence(said, about))


def _models(setup: Setup, state: TrainState) -> dict[str, Params]:
    objective = setup.objective

    def untrained(params: Params) -> Any:
        boxed = objective.init_extra(params, jax.random.key(setup.config.seed))
        return nn.unbox(model_params(objective, params, boxed))

    fresh = fresh_params(setup)
    return {"trained": model_params(objective, state.params, state.extra), "untrained": untrained(fresh)}


def _seen(setup: Setup, params: Params, feed: Feed) -> Iterator[dict[str, np.ndarray]]:
    """Of batches how often each id occurred, and of each picture ``psnr`` and that of its ``mean_colour``."""
    look = shared(setup, "codebook", lambda: setup.jit(_look(setup.objective)))
    end = feed.views[0].end
    size = setup.eval_rows(end)
    for part in setup.batches(feed, setup.objective.groups, size, 0, -(-end // size)):
        on_device = put_batch(part, setup.mesh)
        found, valid = fetch((look(params, on_device), on_device["example"]["valid"]))
        yield {name: x if name == "hits" else x[valid] for name, x in found.items()}


def _look(objective: Any) -> Callable[[Params, Part], dict[str, jax.Array]]:
    """What `_seen` computes of a batch."""

    def look(params: Params, part: Part) -> dict[str, jax.Array]:
        (sets,) = part["groups"].values()
        tokens = clean(sets)
        ids, value = objective.ids(params, tokens), tokens["value"]
        counted = (tokens["valid"] & part["example"]["valid"][:, None]).astype(jnp.float32)
        colours = value.reshape(*value.shape[:2], -1, 3).astype(jnp.float32)
        mean = jnp.round(jnp.broadcast_to(jnp.mean(colours, axis=2, keepdims=True), colours.shape))
        return {
            "hits": jax.ops.segment_sum(counted.reshape(-1), ids.reshape(-1), objective.codes),
            "psnr": psnr(objective.pixels(params, ids, tokens["position"]), value),
            "mean_colour": psnr(mean.reshape(value.shape), value),
        }

    return look
