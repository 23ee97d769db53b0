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

from m3ae_jax.config.fields import setting
from m3ae_jax.evals.base import Result
from m3ae_jax.evals.features import fresh_params
from m3ae_jax.evals.supervised import Answers, Fields, Sums, Task, counted, descend, result, sums, test, train
from m3ae_jax.objectives.base import Params, Part
from m3ae_jax.parallel.mesh import replicated
from m3ae_jax.train.optimizer import warmup_cosine
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

_MOMENTUM, _EPSILON = 0.9, 1e-5  # of the batch norm, the reference's


class LinearProbeFields(Fields):
    """Of the linear classification; the defaults are those for ImageNet."""

    batch_size: int = setting(2048, low=2)
    """Examples of a step."""
    duration: str = setting("90 epochs", duration=True)
    """Length of the training."""
    warmup: str = setting("10 epochs", duration=True, low=0)
    """How long the rate rises from 0."""
    learning_rate: float = setting(0.1, low=0.0, aliases=("lr",))
    """For 256 examples, as optimizer.learning_rate."""
    optimizer: str = setting("lars", choices=("lars", "sgd"))
    """lars; on small data sgd learns faster, as LARS is made for many steps."""
    momentum: float = setting(0.9, low=0.0, high=0.999999)
    """Of the optimizer."""
    weight_decay: float = setting(0.0, low=0.0, aliases=("wd",))
    """Decay of the weights."""
    untrained: bool = setting(True)
    """Train a second head on an untrained encoder, for comparison."""


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
        UserError: an example has no class, or the data lack the input that is read.
    """
    task = Task(setup, "linear_probe")
    encoders = {"trained": state.params}
    if task.options.untrained:
        encoders["untrained"] = fresh_params(setup)
    solver = optimizer(task)
    start = jax.jit(
        lambda: {name: fresh(task.width(state.params), task.classes, setup.config.seed, solver) for name in encoders},
        out_shardings=replicated(setup.mesh),
    )

    def features(params: dict[str, Params], batch: Part) -> dict[str, jax.Array]:
        return {name: task.features(setup.objective, of_encoder, batch) for name, of_encoder in params.items()}

    def step(heads: dict[str, Head], batch: Part, params: dict[str, Params]) -> Any:
        read = features(params, batch)
        after = {name: head_step(head, solver, read[name], batch) for name, head in heads.items()}
        return {name: head for name, (head, _) in after.items()}, {name: s for name, (_, s) in after.items()}

    def count(heads: dict[str, Head], batch: Part, params: dict[str, Params]) -> dict[str, Sums]:
        read = features(params, batch)
        return {name: tested(head, read[name], batch) for name, head in heads.items()}

    stepped, counted_test = setup.jit(step, out_shardings=replicated(setup.mesh)), setup.jit(count)
    trained = train(task, lambda heads, batch, _: stepped(heads, batch, encoders), start())
    counts = test(task, lambda batch: counted_test(trained.state, batch, encoders))
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


def head_step(head: Head, solver: optax.GradientTransformation, features: jax.Array, batch: Part) -> tuple[Head, Sums]:
    """One step on features `[B, D] float32`, by the statistics of this batch.

    Args:
        head: before it.
        solver: its optimizer.
        features: the frozen encoder's.
        batch: of `Task.train_batches`.
    """
    mean, variance = moments(features, counted(batch))
    normal = normalize(features, mean, variance)
    answers = Answers.of(batch, len(head.params["bias"]))
    carry, logits = descend(solver, (head.params, head.opt_state), lambda p: affine(p, normal), answers)
    after = Head(
        *carry,
        mean=_MOMENTUM * head.mean + (1 - _MOMENTUM) * mean,
        variance=_MOMENTUM * head.variance + (1 - _MOMENTUM) * variance,
        share=_MOMENTUM * head.share + (1 - _MOMENTUM),
    )
    return after, sums(logits, batch, answers)


def tested(head: Head, features: jax.Array, batch: Part) -> Sums:
    """Counts a batch by the running averages, divided by the weight that the batches have had in them."""
    # The reference starts from mean 0 and variance 1, which a short training would still remember.
    normal = normalize(features, head.mean / head.share, head.variance / head.share)
    logits = affine(head.params, normal)
    return sums(logits, batch, Answers.of(batch, logits.shape[1]))


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
