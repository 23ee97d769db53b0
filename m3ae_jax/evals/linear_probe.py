"""The paper's linear classification: batch norm without scale and shift, and one linear layer, on a frozen encoder.

All tokens are visible. LARS with momentum 0.9, batch 2048, 90 epochs of which 10 warm up, peak 0.1 x batch / 256,
cosine to 0 (the reference's command, section 1.3 of the study of it; MAE's protocol, arXiv 2111.06377, appendix
A.1). Features are computed anew at each step from newly cropped and flipped pictures; no gradient reaches the
encoder. The quick probe on features that are computed once is `probe`.

Of an encoder that never trained, a second head is trained on the same pictures by the same steps: what the
architecture alone is worth.

Where the reference is another: it leaves out the last partial batch of the test examples and tests at the start of
an epoch, so never after the last; here each test example counts once, after the last step.

Legend: ``B`` examples of a batch, ``D`` width, ``C`` classes.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from m3ae_jax.evals import Result
from m3ae_jax.evals.features import fresh_params
from m3ae_jax.evals.supervised import Sums, Task, counted, cross_entropy, result, sums, test, train
from m3ae_jax.objectives.base import Batch, Params
from m3ae_jax.parallel.mesh import replicated
from m3ae_jax.train.optimizer import warmup_cosine
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

_MOMENTUM, _EPSILON = 0.9, 1e-5  # of the batch norm, the reference's


@flax.struct.dataclass
class Head:
    """A batch norm and a linear layer.

    Attributes:
        params: ``kernel`` `[D, C]` and ``bias`` `[C]`, float32.
        opt_state: the optimizer's.
        mean: running mean of the features, `[D]`, not yet divided by `share`.
        variance: running variance, `[D]`, likewise.
        share: scalar, the weight of the batches in the running averages.
    """

    params: dict[str, jax.Array]
    opt_state: Any
    mean: jax.Array
    variance: jax.Array
    share: jax.Array


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Accuracy on ``eval.test`` of a linear layer trained on ``eval.train``.

    Raises:
        UserError: an example has no class, or the data lack the input that is asked for.
    """
    task = Task(setup, "linear_probe")
    encoders = {"trained": state.params}
    if task.options.untrained:
        encoders["untrained"] = fresh_params(setup)
    solver = optimizer(task)
    start = jax.jit(
        lambda: {name: fresh(setup.config.model.width, task.classes, setup.config.seed, solver) for name in encoders},
        out_shardings=replicated(setup.mesh),
    )

    def step(heads: dict[str, Head], batch: Batch, params: dict[str, Params]) -> Any:
        found = {
            name: head_step(head, solver, task.features(setup.objective, params[name], batch), batch)
            for name, head in heads.items()
        }
        return {name: head for name, (head, _) in found.items()}, {name: s for name, (_, s) in found.items()}

    def ask(heads: dict[str, Head], batch: Batch, params: dict[str, Params]) -> dict[str, Sums]:
        return {
            name: tested(head, task.features(setup.objective, params[name], batch), batch)
            for name, head in heads.items()
        }

    stepped, asked = setup.jit(step, out_shardings=replicated(setup.mesh)), setup.jit(ask)
    trained = train(task, lambda heads, batch, _: stepped(heads, batch, encoders), start())
    counts = test(task, lambda batch: asked(trained.state, batch, encoders))
    return result(task, trained, counts)


def optimizer(task: Task) -> optax.GradientTransformation:
    """LARS or SGD with momentum, by the schedule of the real batch size."""
    o = task.options
    rate = warmup_cosine(o.learning_rate * task.batch_size / 256, 0.0, task.warmup, task.steps)
    if o.optimizer == "lars":
        return optax.lars(rate, weight_decay=o.weight_decay, momentum=o.momentum)
    return optax.chain(optax.add_decayed_weights(o.weight_decay), optax.sgd(rate, momentum=o.momentum))


def fresh(width: int, classes: int, seed: int, solver: optax.GradientTransformation) -> Head:
    """A head before its first step; LeCun-normal, as the reference's."""
    kernel = nn.initializers.lecun_normal()(jax.random.key(seed), (width, classes), jnp.float32)
    params = {"kernel": kernel, "bias": jnp.zeros(classes)}
    return Head(params, solver.init(params), jnp.zeros(width), jnp.zeros(width), jnp.float32(0.0))


def head_step(head: Head, solver: optax.GradientTransformation, features: jax.Array, batch: Batch) -> tuple[Head, Sums]:
    """One step on features `[B, D] float32`, by the statistics of this batch.

    Args:
        head: before it.
        solver: its optimizer.
        features: the frozen encoder's.
        batch: of `Task.train_batches`.
    """
    weight = counted(batch)
    mean, variance = moments(features, weight)
    normal = normalize(features, mean, variance)
    target = jax.nn.one_hot(batch["label"], head.params["bias"].shape[0])

    def loss_of(params: dict[str, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits = affine(params, normal)
        loss = cross_entropy(logits, target)
        return jnp.sum(loss * weight) / jnp.maximum(jnp.sum(weight), 1.0), (logits, loss)

    grads, (logits, loss) = jax.grad(loss_of, has_aux=True)(head.params)
    updates, opt_state = solver.update(grads, head.opt_state, head.params)
    after = Head(
        optax.apply_updates(head.params, updates),
        opt_state,
        mean=_MOMENTUM * head.mean + (1 - _MOMENTUM) * mean,
        variance=_MOMENTUM * head.variance + (1 - _MOMENTUM) * variance,
        share=_MOMENTUM * head.share + (1 - _MOMENTUM),
    )
    return after, sums(logits, batch["label"], batch, loss, weight)


def tested(head: Head, features: jax.Array, batch: Batch) -> Sums:
    """Counts a batch by the running averages, divided by the weight that the batches have had in them."""
    # The reference starts from mean 0 and variance 1, which a short training would still remember.
    logits = affine(head.params, normalize(features, head.mean / head.share, head.variance / head.share))
    loss = cross_entropy(logits, jax.nn.one_hot(batch["label"], logits.shape[1]))
    return sums(logits, batch["label"], batch, loss, counted(batch))


def moments(features: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and (biased) variance over the examples that count, `[D] float32`."""
    count = jnp.maximum(jnp.sum(weight), 1.0)
    mean = jnp.sum(features * weight[:, None], axis=0) / count
    return mean, jnp.sum(jnp.square(features - mean) * weight[:, None], axis=0) / count


def normalize(features: jax.Array, mean: jax.Array, variance: jax.Array) -> jax.Array:
    """Batch norm without scale and shift."""
    return (features - mean) * jax.lax.rsqrt(variance + _EPSILON)


def affine(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Logits `[B, C] float32`, in full precision."""
    with jax.default_matmul_precision("highest"):
        return x @ params["kernel"] + params["bias"]
