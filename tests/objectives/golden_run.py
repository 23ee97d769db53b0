"""Writes down what M3AE computes, for test_golden.py: ``python tests/objectives/golden_run.py OUTPUT.json``.

The parameters that it starts from are a function of their names in the tree of commit 377e22f, which had encoder and
decoder in one module; `FORMER` maps today's names to those. So the numbers can be compared with that commit's.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["JAX_PLATFORMS"] = "cpu"

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

import m3ae_jax.config as config_lib
import m3ae_jax.evals.run as evals
from m3ae_jax.evals import grounding
from m3ae_jax.evals.validation import Validation, priors
from m3ae_jax.parallel.mesh import put_batch
from m3ae_jax.train.optimizer import decay_mask
from m3ae_jax.train.setup import Setup, prepare
from m3ae_jax.train.step import TrainState, step_gradient

FORMER = (
    (r"encoder/transformer/", "encoder/"),
    (r"decoder/transformer/", "decoder/"),
    (r"encoder/cls_token$", "cls_token"),
    (r"decoder/projection/", "decoder_projection/"),
    (r"encoder/(\w+)/embedding/", r"\1_embedding/"),
    (r"encoder/(\w+)/position_embedding$", r"\1_position_embedding"),
    (r"encoder/(\w+)/type_embedding$", r"\1_encoder_type_embedding"),
    (r"decoder/(\w+)_masks/mask_embedding$", r"\1_mask_embedding"),
    (r"decoder/(\w+)_masks/type_embedding$", r"\1_decoder_type_embedding"),
    (r"decoder/(\w+_output)/", r"\1/"),
)
"""Patterns at the start of a parameter's path, and what stood there before."""

STEPS = 200
GRADIENTS_AT = (1, 100, 200)
SMALL = {
    "batch_size": 32,
    "model.width": 32,
    "model.depth": 2,
    "model.heads": 2,
    "m3ae.decoder_width": 32,
    "m3ae.decoder_depth": 1,
    "m3ae.decoder_heads": 2,
    "evals": "",
    "eval.examples": 64,
    "eval.batch_size": 32,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mae": (
        "tiny",
        {"data.modalities": "image", "m3ae.use_type_embedding": "false", "m3ae.normalize_patches": "true"},
    ),
    "words": (
        "tiny",
        {
            "data.modalities": "text",
            "m3ae.text_average": "token",
            "compute.vocabulary_blocks": 3,
            "micro_batches": 2,
            "data.caption_fraction": 0.5,
        },
    ),
    "cross": (
        "tiny",
        {
            "m3ae.decoder_attention": "cross",
            "m3ae.output_head_depth": 1,
            "m3ae.image_positions": "learned",
            "model.activation": "gelu",
            "compute.unroll": "false",
        },
    ),
    "mixture": ("mixture", {"m3ae.image_target_share": 0.5, "micro_batches": 2}),
}
EVALUATIONS = (
    "grounding", "masked_prediction", "retrieval", "attention", "mask_ratios", "knn", "probe", "few_shot", "ood",
    "linear_probe", "finetune", "robustness", "tsne",
)  # fmt: skip
EVALUATED = {
    "eval.examples": 64,
    "eval.batch_size": 32,
    "eval.train_examples": 128,
    "eval.test_examples": 96,
    "eval.pairs": 48,
    "eval.scored_pairs": 6,
    "eval.pictures": 4,
    "eval.label": "color",
    "eval.attention.examples": 16,
    "eval.robustness.examples": 16,
    "eval.robustness.epsilons": "2.0,",
    "eval.robustness.pgd_steps": 2,
    "eval.linear_probe.batch_size": 64,
    "eval.linear_probe.duration": "4 steps",
    "eval.linear_probe.warmup": "1 steps",
    "eval.linear_probe.flip": "false",
    "eval.finetune.batch_size": 64,
    "eval.finetune.duration": "3 steps",
    "eval.finetune.warmup": "1 steps",
    "eval.finetune.drop_path": 0.0,  # what dropout draws depends on the names of the modules
}
_SCENES = 48  # of grounding


def former(path: str) -> str:
    """The name of a parameter in commit 377e22f."""
    for pattern, before in FORMER:
        name, count = re.subn("^" + pattern, before, path)
        if count:
            return name
    raise KeyError(path)


def name_of(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def known(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter, as a function of its former name."""
    seed = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big")
    noise = 0.05 * np.random.Generator(np.random.Philox(seed)).standard_normal(shape)
    return np.asarray(noise + path.endswith("scale"), np.float32)


def leaves(tree: Any) -> dict[str, np.ndarray]:
    """By former name."""
    return {former(name_of(path)): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def digest(x: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()[:16]


def batch_digest(batch: dict[str, Any]) -> str:
    """Of all values of a batch, as that commit laid it out."""
    parts = batch if len(batch) > 1 else {"": next(iter(batch.values()))}
    columns = ("position", "index", "attempt", "reason", "valid", "source")
    tree = {
        name: {"groups": part["groups"], "example": {key: part["example"][key] for key in columns}}
        for name, part in parts.items()
    }
    whole = hashlib.sha256()
    flat = [(name_of(path), np.asarray(x)) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
    for name, x in sorted(flat, key=lambda one: one[0]):
        wide = x.astype(np.int64) if x.dtype.kind == "i" else x
        whole.update(name.encode() + str(wide.shape).encode() + np.ascontiguousarray(wide).tobytes())
    return whole.hexdigest()[:16]


def config_of(name: str, changes: dict[str, Any]) -> Any:
    config = config_lib.load(f"configs/{name}.py")
    changes = {"data.crop_rule": 1, **changes}  # that of commit 377e22f
    config_lib.apply_overrides(config, [(field, str(value)) for field, value in changes.items()])
    return config_lib.resolve(config)


def run(config: Any, steps: int, gradients_at: tuple[int, ...]) -> tuple[Setup, TrainState, dict[str, Any]]:
    """Trains; notes losses, terms and batches of every step, and gradients of some."""
    setup = prepare(config)
    shapes = nn.unbox(jax.eval_shape(setup.objective.init, jax.random.key(0)))
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray(known(former(name_of(path)), x.shape)), shapes
    )
    state = TrainState(jnp.int32(0), params, setup.optimizer.init(params), {})
    step = setup.train_step()
    sources = len(setup.train_data.names)
    gradient = setup.jit(step_gradient(setup.objective, config.seed, config.micro_batches, sources))
    out: dict[str, Any] = {"loss": [], "terms": {}, "batches": [], "gradients": {}}
    with contextlib.closing(setup.train_batches(0)) as batches:
        for number, batch in enumerate(itertools.islice(batches, steps), 1):
            out["batches"].append(batch_digest(batch))
            on_device = put_batch(batch, setup.mesh)
            if number in gradients_at:
                out["gradients"][str(number)] = {
                    name: [float(np.linalg.norm(x.astype(np.float64))), digest(x)]
                    for name, x in leaves(gradient(state, on_device)[0]).items()
                }
            state, figures = step(state, on_device)
            figures = jax.device_get(figures)
            out["loss"].append(float(figures["loss"]))
            for name, value in figures.items():
                if "/" not in name and name.endswith(("_loss", "_accuracy")):
                    out["terms"].setdefault(name, []).append(float(value))
    out["params"] = {name: digest(x) for name, x in leaves(state.params).items()}
    return setup, state, out


def fresh_table(setup: Setup) -> dict[str, Any]:
    """Of each fresh parameter: shape, logical axes, whether it is decayed, and its distribution."""
    boxed = jax.jit(setup.objective.init)(jax.random.key(0))
    params = nn.unbox(boxed)
    decayed = leaves(decay_mask(params, tuple(setup.config.optimizer.no_decay)))
    is_spec = {"is_leaf": lambda x: isinstance(x, jax.sharding.PartitionSpec)}
    specs = jax.tree_util.tree_leaves_with_path(nn.get_partition_spec(boxed), **is_spec)
    axes = {former(name_of(path)): list(spec) for path, spec in specs}
    return {
        name: {
            "shape": list(x.shape),
            "axes": axes[name],
            "decay": bool(decayed[name]),
            "mean": float(x.mean()),
            "std": float(x.std()),
            "max": float(np.abs(x).max()),
        }
        for name, x in leaves(params).items()
    }


def made_with() -> dict[str, str]:
    """What the last bits of these numbers depend on."""
    cpu = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)$", cpu.read_text(), re.MULTILINE) if cpu.exists() else None
    features = hashlib.sha256(" ".join(sorted((flags[1] if flags else platform.processor()).split())).encode())
    cores = str(len(os.sched_getaffinity(0)))
    return {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "cpu": features.hexdigest()[:8], "cores": cores}


def main(output: str) -> None:
    grounding.SCENES = _SCENES
    results: dict[str, Any] = {"made_with": made_with()}
    for name, changes in (("tiny", {}), ("share", {"m3ae.image_target_share": 0.5})):
        setup, state, results[name] = run(config_of("tiny", {**EVALUATED, **changes}), STEPS, GRADIENTS_AT)
        if name == "share":
            continue
        results[name] |= {"fresh": fresh_table(setup), "validation": Validation(setup)(state), "priors": priors(setup)}
        results[name]["evals"] = {}
        for evaluation in EVALUATIONS:
            scalars = evals.run(evaluation, setup, state).scalars
            # What an untrained encoder gives depends on the names of the modules, from which its numbers are drawn.
            # What that commit did not count: test examples that are training examples too.
            known = {k: v for k, v in scalars.items() if "untrained" not in k and not k.endswith("overlap")}
            results[name]["evals"][evaluation] = known
    for name, (file, changes) in VARIANTS.items():
        setup, state, results[name] = run(config_of(file, {**SMALL, **changes}), 3, (1,))
        results[name] |= {"fresh": fresh_table(setup), "validation": Validation(setup)(state), "priors": priors(setup)}
    Path(output).write_text(text(results), encoding="utf-8")


def text(results: dict[str, Any]) -> str:
    """JSON with a line for each entry of a run."""
    runs = [
        f"{json.dumps(run)}: {{\n"
        + ",\n".join(f" {json.dumps(name)}: {json.dumps(value, sort_keys=True)}" for name, value in sorted(of.items()))
        + "\n}"
        for run, of in sorted(results.items())
    ]
    return "{" + ",\n".join(runs) + "}\n"


if __name__ == "__main__":
    main(sys.argv[1])
