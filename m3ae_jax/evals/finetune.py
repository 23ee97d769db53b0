"""The paper's fine-tuning: the encoder, a LayerNorm and a linear layer on CLS, all trained.

AdamW (0.9, 0.999), decay 0.05, batch 1024, 100 epochs of which 5 warm up, peak 1e-3 whatever the batch, cosine to 0;
rates fall by layer, drop path 0.1, mixup 0.8 and cutmix 1.0 one step the one and the other step the other, label
smoothing 0.1, RandAugment (the reference's command and defaults, section 1.3 of the study of it; MAE's protocol, arXiv
2111.06377, appendix A.1). Test pictures are not augmented.

Where the reference is another, as it contradicts what it is to do: its mixup and cutmix were drawn once, when the step
was compiled, and here at each step, a function of seed and step; its embeddings had the head's rate and its final
LayerNorm the lowest, and here embeddings are the lowest layer (`layer_of`); its depth was always 24.

With captions in the input nothing is mixed: a caption cannot be blended as pixels can, and either of two captions would
give away a class that is only a share of the answer.

Legend: ``B`` examples of a batch, ``L`` patches, ``P`` numbers in a patch, ``D`` width, ``C`` classes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import m3ae_jax.data.images as images
from m3ae_jax.config.fields import setting
from m3ae_jax.data.augment import RandAugment
from m3ae_jax.data.order import fold_seed
from m3ae_jax.data.tokens import patch_grid
from m3ae_jax.evals.base import Result
from m3ae_jax.evals.linear_probe import affine
from m3ae_jax.evals.restored import group_name
from m3ae_jax.evals.supervised import Answers, Carry, Change, Fields, Sums, Task, descend, result, sums, test, train
from m3ae_jax.objectives.base import Objective, Params, Part, build
from m3ae_jax.objectives.parts.pixels import normalize_pixels
from m3ae_jax.parallel.mesh import replicated
from m3ae_jax.train.optimizer import decay_mask, warmup_cosine
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

log = logging.getLogger("m3ae_jax")

_HEAD = "fine-tuned"

Tuned = dict[str, Any]
"""What is trained: ``encoder``, parameters by path; ``norm``, ``scale`` and ``bias`` `[D]`; ``head``, ``kernel`` `[D,
C]` and ``bias`` `[C]`."""


class FinetuneFields(Fields):
    """Of fine-tuning; the defaults are those for ImageNet."""

    batch_size: int = setting(1024, low=2)
    """Examples of a step."""
    duration: str = setting("100 epochs", duration=True)
    """Length of the training."""
    warmup: str = setting("5 epochs", duration=True, low=0)
    """How long the rate rises from 0."""
    learning_rate: float = setting(1e-3, low=0.0, aliases=("lr",))
    """Peak, whatever the batch size."""
    b1: float = setting(0.9, low=0.0, high=0.999999)
    """Decay of Adam's first moment."""
    b2: float = setting(0.999, low=0.0, high=0.999999)
    """Decay of Adam's second moment."""
    weight_decay: float = setting(0.05, low=0.0, aliases=("wd",))
    """Decay of the weights."""
    layer_decay: float = setting(0.75, low=0.01, high=1.0)
    """A layer's rate is that of the one above times this."""
    drop_path: float = setting(0.1, low=0.0, high=0.99)
    """As model.drop_path."""
    mixup: float = setting(0.8, low=0.0, high=1000.0)
    """Both parameters of the beta distribution; 0: no mixup."""
    cutmix: float = setting(1.0, low=0.0, high=1000.0)
    """Both parameters of the beta distribution; 0: no cutmix."""
    cutmix_probability: float = setting(0.5, low=0.0, high=1.0)
    """Share of cutmix, where there are both."""
    label_smoothing: float = setting(0.1, low=0.0, high=0.99)
    """Share of the classes' probability that all have alike."""
    rand_augment: float = setting(9.0, low=0.0, high=10.0)
    """Magnitude of RandAugment; 0: none."""


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Accuracy on ``eval.test`` of an encoder fine-tuned on ``eval.train``; `state` stays as it is.

    Raises:
        UserError: an example has no class, or the data lack the input that is read.
    """
    options = setup.config.eval.finetune
    task = Task(setup, "finetune", _rand_augment(setup))
    if options.input != "image" and (options.mixup or options.cutmix):
        log.info("finetune: eval.finetune.input=%r has captions, so nothing is mixed", options.input)
    start, solver, shardings = _begin(task, state.params)
    step = setup.jit(_step(task, solver), donate_argnums=0, out_shardings=(shardings, replicated(setup.mesh)))
    count = setup.jit(lambda tuned, batch, params: {_HEAD: _tested(task, tuned, batch, params)})
    trained = train(task, lambda carry, batch, done: step(carry, batch, done, state.params), start)
    counts = test(task, lambda batch: count(trained.state[0], batch, state.params))
    return result(task, trained, counts)


def _step(
    task: Task, solver: optax.GradientTransformation
) -> Callable[[Carry, Part, jax.Array, Params], tuple[Carry, dict[str, Sums]]]:
    """The step, a function of (carry, batch, steps done, parameters of the state); all it draws is of seed and step."""
    setup, smoothing = task.setup, task.options.label_smoothing
    noisy = setup.config.copy_and_resolve_references()
    noisy.model.drop_path = task.options.drop_path
    objective = build(noisy, setup.tokenizer.vocab_size if setup.tokenizer else 0)
    mix, key = _mixer(setup), jax.random.key(fold_seed(setup.config.seed, "finetune"))

    def step(carry: Carry, batch: Part, done: jax.Array, params: Params) -> tuple[Carry, dict[str, Sums]]:
        of_mix, of_model = jax.random.split(jax.random.fold_in(key, done))
        mixed, answers = blended(mix, of_mix, batch, task.classes, smoothing)

        def logits_of(tuned: Tuned) -> jax.Array:
            return _logits(task, objective, tuned, params, mixed, of_model)

        carry, logits = descend(solver, carry, logits_of, answers)
        return carry, {_HEAD: sums(logits, mixed, answers)}

    return step


def _tested(task: Task, tuned: Tuned, batch: Part, params: Params) -> Sums:
    logits = _logits(task, task.setup.objective, tuned, params, batch, None)
    return sums(logits, batch, Answers.of(batch, task.classes))


# --- what is trained -----------------------------------------------------------------------------------------


def _logits(
    task: Task, objective: Objective, tuned: Tuned, params: Params, batch: Part, rng: jax.Array | None
) -> jax.Array:
    features = task.features(objective, merged(params, tuned["encoder"]), batch, rng)
    norm = nn.LayerNorm(epsilon=task.setup.config.model.layer_norm_epsilon)
    normal: Any = norm.apply({"params": tuned["norm"]}, features)
    return affine(tuned["head"], normal)


def merged(params: Params, encoder: Mapping[str, jax.Array]) -> Params:
    """Parameters with those of `encoder` in the place of theirs."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: encoder.get(_name(path), leaf), params)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_read(function: Callable[..., Any], params: Params, *rest: Any) -> set[str]:
    """The paths of the parameters that ``function(params, *rest)`` reads: a decoder's need neither rate nor moments.

    Args:
        function: traced, not run.
        params: arrays or their shapes.
        rest: likewise.
    """
    paths = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    program = jax.make_jaxpr(function)(params, *rest).jaxpr
    read = {id(variable) for equation in program.eqns for variable in equation.invars}
    return {path for path, variable in zip(paths, program.invars, strict=False) if id(variable) in read}


def _begin(task: Task, params: Params) -> tuple[Carry, optax.GradientTransformation, Any]:
    """Copies of the encoder's parameters, a head and moments on the mesh; the optimizer; where all of it lies."""
    setup, width = task.setup, task.width(params)
    read = leaves_read(lambda p, part: task.features(setup.objective, p, part), params, task.abstract_part)

    def fresh(params: Params) -> Tuned:
        leaves = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
        key = jax.random.key(setup.config.seed)
        kernel = nn.initializers.lecun_normal()(key, (width, task.classes), jnp.float32)
        return {
            # A copy, as the step gives up the arrays that it is given.
            "encoder": {name: jnp.copy(leaf) for name, leaf in leaves.items() if name in read},
            "norm": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
            "head": {"kernel": kernel, "bias": jnp.zeros(task.classes)},
        }

    whole = replicated(setup.mesh)
    abstract = jax.eval_shape(fresh, params)
    shardings = jax.tree.map(lambda _: whole, abstract)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if _name(path) in read:
            shardings["encoder"][_name(path)] = leaf.sharding
    solver = optimizer(task, layer_rates(abstract, setup.objective.stacks, task.options.layer_decay))
    moments = jax.eval_shape(solver.init, abstract)
    of_state = optax.tree.map_params(
        solver, lambda _, place: place, moments, shardings, transform_non_params=lambda _: whole
    )
    tuned = jax.jit(fresh, out_shardings=shardings)(params)
    return (tuned, jax.jit(solver.init, out_shardings=of_state)(tuned)), solver, (shardings, of_state)


def optimizer(task: Task, rates: Any) -> optax.GradientTransformation:
    """AdamW whose whole update, decay included, is multiplied by `rates`, a pytree like the parameters."""
    o, no_decay = task.options, tuple(task.setup.config.optimizer.no_decay)
    return optax.chain(
        optax.scale_by_adam(o.b1, o.b2, eps=1e-8),
        optax.add_decayed_weights(o.weight_decay, lambda tuned: decay_mask(tuned, no_decay)),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, rates)),
        optax.scale_by_learning_rate(warmup_cosine(o.learning_rate, 0.0, task.warmup, task.steps)),
    )


def layer_of(path: str, depth: int) -> int:
    """The layer of a parameter that is no block's: 0 for embeddings, positions, types and CLS, else the head's.

    So the final LayerNorm is the head's, as in BEiT and MAE, whose assignment this is (arXiv 2106.08254, appendix).

    Args:
        path: its name.
        depth: blocks of the encoder; these are the layers 1 to `depth`, the head is `depth` + 1.
    """
    return 0 if path.endswith("cls_token") or "embedding" in path else depth + 1


def layer_rates(tuned: Tuned, stacks: Sequence[str], decay: float) -> Tuned:
    """A factor of the learning rate for each parameter, ``decay ** (depth + 1 - layer)``.

    Args:
        tuned: arrays or their shapes.
        stacks: paths in ``tuned["encoder"]`` of the layer stacks in forward order, whose leaves have the layers as
            first axis; those that it does not hold are left out.
        decay: from a layer to that below it.

    Returns:
        A pytree like `tuned` of float32 arrays: scalars, and `[layers, 1, ...]` for stacked parameters.
    """
    encoder = tuned["encoder"]
    stack_of = {name: next((stack for stack in stacks if name.startswith(f"{stack}/")), "") for name in encoder}
    layers = dict.fromkeys(stacks, 0)
    layers |= {stack_of[name]: leaf.shape[0] for name, leaf in encoder.items() if stack_of[name]}
    depth = sum(layers.values())
    first = dict(zip(layers, np.cumsum([1, *layers.values()]).tolist(), strict=False))

    def rate(name: str, leaf: Any) -> np.ndarray:
        layer: Any = layer_of(name, depth)
        if stack := stack_of[name]:
            layer = first[stack] + np.arange(layers[stack]).reshape(-1, *[1] * (leaf.ndim - 1))
        return np.asarray(decay ** np.asarray(depth + 1.0 - layer), np.float32)

    of_head = {part: jax.tree.map(lambda _: np.float32(1.0), tuned[part]) for part in ("norm", "head")}
    return {"encoder": {name: rate(name, leaf) for name, leaf in encoder.items()}, **of_head}


# --- augmentation --------------------------------------------------------------------------------------------


def _rand_augment(setup: Setup) -> Change | None:
    magnitude = setup.config.eval.finetune.rand_augment
    return RandAugment.of(setup.config.data, magnitude) if magnitude else None


Mixer = Callable[[jax.Array, Part], tuple[Part, jax.Array]]
"""Of a key and a batch: the batch with mixed pictures, and the share of the example's own, a scalar."""


def _mixer(setup: Setup) -> Mixer | None:
    """What mixes pictures; None if nothing is mixed."""
    o, config = setup.config.eval.finetune, setup.config
    if o.input != "image" or not (o.mixup or o.cutmix):
        return None
    name = group_name(setup, "image")
    draw = functools.partial(
        draw_weights,
        places=places(config.data.patch_size, patch_grid(config)),
        mixup=o.mixup,
        cutmix=o.cutmix,
        cutmix_probability=o.cutmix_probability,
    )

    def mix(key: jax.Array, batch: Part) -> tuple[Part, jax.Array]:
        visible = batch["groups"][name]["visible"]
        weight = draw(key)
        pixels = normalize_pixels(visible["value"], config)
        # Nothing is hidden, so the patches of all examples stand in the same order.
        pixels = weight * pixels + (1 - weight) * pixels[::-1]
        group = {**batch["groups"][name], "visible": {**visible, "value": pixels}}
        return {**batch, "groups": {**batch["groups"], name: group}}, jnp.mean(weight)

    return mix


def blended(mix: Mixer | None, key: jax.Array, batch: Part, classes: int, smoothing: float) -> tuple[Part, Answers]:
    """Mixes each example with that as far from the batch's other end.

    Args:
        mix: pictures; None: nothing is mixed.
        key: of this step.
        batch: of `Task.train_batches`.
        classes: how many.
        smoothing: share of the answer that is spread evenly over all classes.

    Returns:
        The batch, and its answers: the label is the class with the larger share, and those examples count whose two
        pictures do.
    """
    own = Answers.of(batch, classes, smoothing)
    if mix is None:
        return batch, own
    batch, share = mix(key, batch)
    target = share * own.target + (1 - share) * own.target[::-1]
    label = jnp.where(share >= 0.5, own.label, own.label[::-1])
    return batch, Answers(target, label, own.weight * own.weight[::-1])


def places(patch: int, cells: tuple[int, int]) -> np.ndarray:
    """Row and column in the picture of each number in its patches, `[2, L, P] int32`.

    Args:
        patch: side of a patch, pixels.
        cells: rows and columns of patches.
    """
    rows, columns = np.indices((cells[0] * patch, cells[1] * patch), np.int32)
    return np.stack([images.patchify(np.stack([x] * 3, axis=-1)[None], patch)[0] for x in (rows, columns)])


def draw_weights(
    key: jax.Array, places: np.ndarray, mixup: float, cutmix: float, cutmix_probability: float
) -> jax.Array:
    """How much of a batch's own pictures remains, number by number.

    Mixup (arXiv 1710.09412) takes one weight for all, from a beta distribution. Cutmix (arXiv 1905.04899) cuts out a
    box of the picture's shape, its centre anywhere, of an area of one minus such a weight; what lies outside the
    picture is lost, so the box's true share is the mean of what is returned.

    Args:
        key: of the draw.
        places: see `places`.
        mixup: both parameters of the distribution; 0: never.
        cutmix: likewise.
        cutmix_probability: where there are both.

    Returns:
        `[L, P] float32` in 0..1.
    """
    which, of_mixup, of_cutmix, centre = jax.random.split(key, 4)
    row, column = places
    size = np.array([row.max() + 1, column.max() + 1])
    whole = jnp.broadcast_to(jax.random.beta(of_mixup, mixup, mixup) if mixup else 1.0, row.shape)
    if not cutmix:
        return whole
    side = jnp.sqrt(1 - jax.random.beta(of_cutmix, cutmix, cutmix))
    half = jnp.floor(size * side).astype(jnp.int32) // 2
    middle = jax.random.randint(centre, (2,), 0, size)
    low, high = middle - half, middle + half
    inside = (row >= low[0]) & (row < high[0]) & (column >= low[1]) & (column < high[1])
    cuts = jax.random.bernoulli(which, cutmix_probability) if mixup else True
    return jnp.where(cuts, jnp.where(inside, 0.0, 1.0), whole)
