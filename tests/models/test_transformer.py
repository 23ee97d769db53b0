"""The transformer, and encoder and decoder on it: what must not change the numbers, and what must."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from m3ae_jax import config as configs
from m3ae_jax.data.tokens import Modality
from m3ae_jax.models import transformer
from m3ae_jax.models.decoder import Decoder
from m3ae_jax.models.encoder import Encoder
from m3ae_jax.models.fields import SIZES
from m3ae_jax.models.transformer import OutputHead, Tap, Transformer, TransformerOptions
from m3ae_jax.objectives.m3ae import M3AE

LOGICAL_AXES = {"layers", "embed", "heads", "head_dim", "mlp", "vocab", "patch"}
OPTIONS = TransformerOptions(width=16, depth=3, heads=2)
BATCH, TOKENS = 4, 6
X = np.random.default_rng(0).normal(size=(BATCH, TOKENS, OPTIONS.width)).astype(np.float32)
VALID = np.arange(TOKENS) < np.array([[6], [4], [1], [5]])
RATES = ("dropout", "attention_dropout", "drop_path")


@pytest.fixture(scope="module")
def params() -> Any:
    """Of `OPTIONS`; random, so that no bias and no residual branch is idle."""
    return randomised(Transformer(OPTIONS).init, X, VALID)


@pytest.fixture(scope="module")
def plain(params: Any) -> jax.Array:
    """What the stack of `OPTIONS` says of `X`."""
    return jax.jit(lambda p: apply(OPTIONS, p))(params)


@pytest.fixture(scope="module")
def fresh() -> Any:
    """The layers of `OPTIONS` as they are initialised."""
    return nn.unbox(jax.jit(Transformer(OPTIONS).init)(jax.random.key(0), X, VALID)["params"])["blocks"]


def randomised(init: Callable[..., Any], *inputs: Any) -> Any:
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), *inputs)["params"])
    generator = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * generator.normal(size=x.shape), jnp.float32), shapes)


def apply(options: TransformerOptions, params: Any, x: Any = X, valid: Any = VALID, rng: Any = None) -> Any:
    """With `rng`, as in training."""
    rngs = {} if rng is None else {"dropout": rng}
    return Transformer(options).apply({"params": params}, x, valid, deterministic=rng is None, rngs=rngs)


# --- loop or unrolled ---------------------------------------------------------------------------------------


def test_unroll_changes_neither_parameters_nor_numbers(params: Any, plain: jax.Array) -> None:
    unrolled = dataclasses.replace(OPTIONS, unroll=True)
    boxed: list[Any] = [jax.eval_shape(Transformer(o).init, jax.random.key(0), X, VALID) for o in (OPTIONS, unrolled)]
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, *boxed))
    np.testing.assert_allclose(jax.jit(lambda p: apply(unrolled, p))(params), plain, atol=1e-5)


def test_unroll_compiles_no_loop(params: Any) -> None:
    def has_loop(options: TransformerOptions) -> bool:
        return "stablehlo.while" in jax.jit(lambda p: apply(options, p)).lower(params).as_text()

    assert has_loop(OPTIONS)
    assert not has_loop(dataclasses.replace(OPTIONS, unroll=True))


def test_merged_kernel_axes_change_nothing(params: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where heads are split over devices the kernels keep their axes (`flat_product`)."""

    def loss(p: Any) -> jax.Array:
        return jnp.sum(jnp.sin(apply(OPTIONS, p)))

    merged = jax.jit(jax.value_and_grad(loss))(params)
    monkeypatch.setattr(transformer, "splits", lambda axis: True)
    apart = jax.jit(jax.value_and_grad(lambda p: loss(p)))(params)  # traced anew
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), merged, apart)


def test_layers_start_different(fresh: Any) -> None:
    kernel = fresh["mlp_in"]["kernel"]
    assert kernel.shape == (3, 16, 64)
    assert len({layer.tobytes() for layer in np.asarray(kernel)}) == 3


# --- dropout ------------------------------------------------------------------------------------------------


def test_without_dropout_nothing_is_drawn(params: Any, plain: jax.Array) -> None:
    """With a random key at hand, as the training step gives it."""
    traced = jax.jit(lambda p, key: apply(OPTIONS, p, rng=key)).trace(params, jax.random.key(0))
    assert "random_bits" not in str(traced.jaxpr)
    compiled = traced.lower().compile()
    words = ("threefry", "rng", "xor")  # a CPU's threefry is inlined, as shifts and xor
    assert not {word for word in words if word in compiled.as_text()}
    assert np.array_equal(compiled(params, jax.random.key(0)), plain)


@pytest.mark.parametrize("rate", RATES)
def test_each_rate_draws_in_training_alone(params: Any, plain: jax.Array, rate: str) -> None:
    changes: dict[str, Any] = {rate: 0.5}
    options = dataclasses.replace(OPTIONS, **changes)
    assert "random_bits" not in str(jax.make_jaxpr(lambda p: apply(options, p))(params))
    train = jax.jit(lambda key: apply(options, params, rng=key))
    first = train(jax.random.key(0))
    assert np.array_equal(first, train(jax.random.key(0)))
    assert not np.allclose(first, train(jax.random.key(1)))
    assert not np.allclose(first, plain)
    assert np.isfinite(first).all()


def test_drop_path_drops_whole_branches(params: Any) -> None:
    """A branch is kept and scaled up, or it is absent; earlier layers lose fewer, the first none."""
    branches = jax.tree.map(jnp.zeros_like, params)
    branches["norm"]["scale"] += 1.0
    branches["blocks"]["mlp_out"]["bias"] += jnp.eye(3, OPTIONS.width)  # layer n adds 1 to channel n
    options = dataclasses.replace(OPTIONS, drop_path=0.5)
    run = jax.jit(lambda key: apply(options, branches, np.tile(np.eye(1, 16, 15) * 10, (4, 6, 1)), rng=key))
    outputs = np.concatenate([run(jax.random.key(seed)) for seed in range(100)])
    assert np.array_equal(outputs, np.repeat(outputs[:, :1], TOKENS, axis=1))  # one draw an example
    # LayerNorm's shift and scale go: channel 3 is always 0, channel 15 always 10.
    added = 10 * (outputs[:, 0, :3] - outputs[:, 0, 3:4]) / (outputs[:, 0, 15:] - outputs[:, 0, 3:4])
    np.testing.assert_allclose(added[:, 0], 1.0, atol=1e-4)
    for layer, rate in ((1, 0.25), (2, 0.5)):
        kept = added[:, layer] > 0.5
        np.testing.assert_allclose(added[kept, layer], 1 / (1 - rate), atol=1e-3)
        np.testing.assert_allclose(added[~kept, layer], 0.0, atol=1e-3)
        assert abs(kept.mean() - (1 - rate)) < 0.1


# --- padding ------------------------------------------------------------------------------------------------


def test_padding_is_invisible(params: Any) -> None:
    other = np.where(VALID[..., None], X, 100.0 + X[:, ::-1])
    run = jax.jit(lambda x: apply(OPTIONS, params, x))
    assert np.array_equal(run(X)[VALID], run(other)[VALID])
    seen = jax.jit(lambda x: apply(OPTIONS, params, x, np.ones_like(VALID)))
    assert not np.allclose(seen(X)[VALID], seen(other)[VALID])


def test_padding_equals_absence(params: Any, plain: jax.Array) -> None:
    short = jax.jit(lambda p: apply(OPTIONS, p, X[1:2, :4], np.ones((1, 4), bool)))(params)
    np.testing.assert_allclose(plain[1:2, :4], short, rtol=1e-4, atol=1e-5)


def test_padding_gets_no_gradient(params: Any) -> None:
    def real_outputs(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(apply(OPTIONS, params, x)) * VALID[..., None])

    gradient = jax.jit(jax.grad(real_outputs))(X)
    assert not np.any(gradient[~VALID])
    assert np.any(gradient[VALID])


# --- attention and the head ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("changes", [{}, {"unroll": True, "remat": "full"}, {"attention_head_groups": 2}])
def test_a_tap_shows_the_attention_of_its_layer(params: Any, plain: Any, layer: int, changes: dict[str, Any]) -> None:
    model = Transformer(dataclasses.replace(OPTIONS, **changes))

    def run(tap: Tap) -> Any:
        return model.apply({"params": params}, X, VALID, tap, method="tapped")

    y, maps = run(Tap(layer))
    assert maps.shape == (BATCH, 2, TOKENS, TOKENS)
    np.testing.assert_allclose(y, plain, atol=1e-5)
    np.testing.assert_allclose(maps.sum(-1), 1.0, atol=1e-5)
    assert not np.any(np.moveaxis(maps, -1, 1)[~VALID])  # as keys
    np.testing.assert_array_equal(run(Tap(layer, query=2))[1], maps[:, :, 2:3])
    assert np.abs(maps - run(Tap(1))[1]).max() > 1e-3
    # Alone, the first layer is that of a stack of one.
    if layer == 0:
        one = jax.tree.map(lambda x: x[:1], params["blocks"])
        alone = Transformer(dataclasses.replace(OPTIONS, depth=1))
        both = alone.apply({"params": params | {"blocks": one}}, X, VALID, Tap(), method="tapped")
        np.testing.assert_allclose(both[1], maps, atol=1e-6)


CONTEXT = np.random.default_rng(2).normal(size=(BATCH, 5, OPTIONS.width)).astype(np.float32)
CONTEXT_VALID = np.arange(5) < np.array([[5], [2], [4], [1]])
BOTH = dataclasses.replace(OPTIONS, attends="both")
WITH = {"context": CONTEXT, "context_valid": CONTEXT_VALID}


@pytest.fixture(scope="module")
def both_params() -> Any:
    """Of `BOTH`."""
    return randomised(functools.partial(Transformer(BOTH).init, **WITH), X, VALID)


@pytest.mark.parametrize("post_norm", [False, True])
def test_a_stack_that_attends_to_both_runs_without_a_context_as_one_that_attends_to_itself(
    both_params: Any, post_norm: bool
) -> None:
    own = {name: leaf for name, leaf in both_params["blocks"].items() if "cross" not in name}
    params = {**both_params, "blocks": own}
    alone, both = (dataclasses.replace(of, post_norm=post_norm) for of in (OPTIONS, BOTH))
    np.testing.assert_array_equal(
        Transformer(both).apply({"params": both_params}, X, VALID),
        Transformer(alone).apply({"params": params}, X, VALID),
    )


def test_what_a_context_says_is_read_and_its_padding_is_not(both_params: Any) -> None:
    model = Transformer(BOTH)

    def run(context: np.ndarray) -> Any:
        return model.apply({"params": both_params}, X, VALID, context=context, context_valid=CONTEXT_VALID)

    y = run(CONTEXT)
    assert np.abs(y - model.apply({"params": both_params}, X, VALID)).max() > 1e-2
    noise = np.where(CONTEXT_VALID[..., None], CONTEXT, 9.0).astype(np.float32)
    np.testing.assert_allclose(run(noise)[VALID], y[VALID], atol=1e-5)
    assert np.abs(run(CONTEXT[:, ::-1] * 1.5) - y).max() > 1e-2


@pytest.mark.parametrize(("of", "layer"), [("self", 1), ("context", 0), ("context", -1)])
def test_the_gradient_by_a_taps_delta_is_that_by_the_weights(both_params: Any, of: str, layer: int) -> None:
    model = Transformer(BOTH)

    def run(delta: Any) -> Any:
        return model.apply({"params": both_params}, X, VALID, Tap(layer, of, delta=delta), method="tapped", **WITH)

    def score(delta: Any) -> Any:
        return jnp.sum(jnp.sin(run(delta)[0][:, 0]))

    shape = run(None)[1].shape
    zero = jnp.zeros(shape)
    np.testing.assert_allclose(run(zero)[0], run(None)[0], atol=1e-5)
    gradient = jax.jit(jax.grad(score))(zero)
    generator = np.random.default_rng(3)
    for _ in range(3):
        direction = jnp.asarray(generator.normal(size=shape), jnp.float32)
        step = 1e-2
        numeric = (score(step * direction) - score(-step * direction)) / (2 * step)
        np.testing.assert_allclose(jnp.sum(gradient * direction), numeric, rtol=2e-2, atol=2e-2)
    assert float(jnp.abs(jax.grad(lambda d: jnp.sum(run(d)[0] * 0.0))(zero)).max()) == 0.0


@pytest.mark.parametrize(
    ("options", "given", "tap", "message"),
    [
        (OPTIONS, WITH, None, "takes no context"),
        (dataclasses.replace(OPTIONS, attends="context"), {}, None, "needs a context"),
        (BOTH, {"context": CONTEXT}, None, "comes with its context_valid"),
        (OPTIONS, {}, Tap(of="context"), "a tap of context"),
        (OPTIONS, {}, Tap(3), "the stack has 3"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(options: Any, given: Any, tap: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Transformer(options).init(jax.random.key(0), X, VALID, tap, method="tapped", **given)


def test_bfloat16_keeps_float32_parameters() -> None:
    half = dataclasses.replace(OPTIONS, dtype=jnp.bfloat16)
    model = Transformer(half)
    outputs, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), X, VALID)
    assert outputs.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype("float32")}


def test_fresh_kernels_are_xavier_uniform(fresh: Any) -> None:
    """On the flat (inputs, outputs) shape, as the reference's, whatever axes a kernel is stored with."""
    kernels = {"qkv": (16, 48), "out": (16, 16)}
    leaves = [(fresh["attention"][name]["kernel"], fans) for name, fans in kernels.items()]
    leaves += [(fresh["mlp_in"]["kernel"], (16, 64)), (fresh["mlp_out"]["kernel"], (64, 16))]
    for kernel, fans in leaves:
        limit = np.sqrt(6 / sum(fans))
        for layer in np.asarray(kernel):
            assert 0.9 * limit < np.abs(layer).max() <= limit


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_output_head(depth: int) -> None:
    head = OutputHead(X.shape[-1], 10, depth, "vocab", jnp.bfloat16)
    outputs, variables = jax.eval_shape(head.init_with_output, jax.random.key(0), X)
    assert outputs.shape == (BATCH, TOKENS, 10)
    assert outputs.dtype == jnp.float32
    hidden = {f"hidden_{n}" for n in range(depth)} | ({f"norm_{n}" for n in range(depth + 1)} if depth else set())
    assert set(variables["params"]) == {"output"} | hidden


# --- encoder and decoder ------------------------------------------------------------------------------------

GRID = (2, 5)
MODALITIES = (
    Modality("image", "picture", tokens=10, features=12, grid=GRID),
    Modality("text", "text", tokens=7, vocabulary=11),
)


class Autoencoder(nn.Module):
    """Encodes the visible tokens and restores the targets."""

    modalities: tuple[Modality, ...] = MODALITIES
    typed: bool = True

    @nn.compact
    def __call__(self, visible: Any, target: Any) -> dict[str, jax.Array]:
        encoded = Encoder(OPTIONS, self.modalities, self.typed, name="encoder")(visible)
        options = TransformerOptions(width=8, depth=2, heads=2)
        decoder = Decoder(options, self.modalities, self.typed, output_head_depth=1, name="decoder")
        return decoder(encoded, visible, target)


def token_sets(image: int, text: int, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Random sets of two examples; the second one's last two words are padding."""
    generator = np.random.default_rng(seed)
    positions = {
        m: np.stack([generator.permutation(n)[:k] for _ in range(2)]).astype(np.int32)
        for m, n, k in (("image", GRID[0] * GRID[1], image), ("text", 7, text))
    }
    words = np.arange(text) < np.array([[text], [text - 2]])
    return {
        "image": {
            "value": generator.normal(size=(2, image, 12)).astype(np.float32),
            "position": positions["image"],
            "valid": np.ones((2, image), bool),
        },
        "text": {
            "value": generator.integers(11, size=(2, text)).astype(np.int32),
            "position": positions["text"],
            "valid": words,
        },
    }


VISIBLE, TARGET = token_sets(4, 3, seed=2), token_sets(6, 4, seed=3)


@pytest.fixture(scope="module")
def restore() -> Any:
    """The compiled autoencoder: (visible, target) to what it restores."""
    model = Autoencoder()
    params = randomised(model.init, VISIBLE, TARGET)
    return jax.jit(lambda visible, target: model.apply({"params": params}, visible, target))


def changed(sets: dict[str, dict[str, np.ndarray]], **change: Any) -> dict[str, dict[str, np.ndarray]]:
    """The sets with other texts."""
    return {**sets, "text": {**sets["text"], **change}}


def test_grid_need_not_be_square(restore: Any) -> None:
    restored = restore(VISIBLE, TARGET)
    assert {m: x.shape for m, x in restored.items()} == {"image": (2, 6, 12), "text": (2, 4, 11)}
    assert all(np.isfinite(x).all() for x in restored.values())


@pytest.mark.parametrize("sets", [VISIBLE, TARGET], ids=["visible", "target"])
def test_padded_slots_of_a_set_are_invisible(restore: Any, sets: dict[str, dict[str, np.ndarray]]) -> None:
    text = sets["text"]
    other = changed(
        sets,
        value=np.where(text["valid"], text["value"], 9).astype(np.int32),
        position=np.where(text["valid"], text["position"], 6).astype(np.int32),
    )
    assert any(not np.array_equal(other["text"][name], text[name]) for name in ("value", "position"))
    want = restore(VISIBLE, TARGET)
    got = restore(other, TARGET) if sets is VISIBLE else restore(VISIBLE, other)
    real = TARGET["text"]["valid"]
    assert np.array_equal(got["image"], want["image"])
    assert np.array_equal(got["text"][real], want["text"][real])


def test_order_of_a_set_means_nothing(restore: Any) -> None:
    reverse = {m: {name: x[:, ::-1] for name, x in s.items()} for m, s in VISIBLE.items()}
    want, got = restore(VISIBLE, TARGET), restore(reverse, TARGET)
    for m in want:
        real = TARGET[m]["valid"]
        np.testing.assert_allclose(got[m][real], want[m][real], rtol=1e-4, atol=1e-4)


def test_hidden_values_are_not_looked_at(restore: Any) -> None:
    other = changed(TARGET, value=(TARGET["text"]["value"] + 1) % 11)
    want, got = restore(VISIBLE, TARGET), restore(VISIBLE, other)
    assert all(np.array_equal(got[m], want[m]) for m in want)
    elsewhere = changed(TARGET, position=TARGET["text"]["position"][:, ::-1])
    assert not np.allclose(restore(VISIBLE, elsewhere)["text"], want["text"])


@pytest.mark.parametrize("modalities", [("image",), ("text",), ("image", "text")])
@pytest.mark.parametrize("typed", [True, False])
def test_every_parameter_names_its_axes(modalities: tuple[str, ...], typed: bool) -> None:
    model = Autoencoder(tuple(m for m in MODALITIES if m.name in modalities), typed)
    visible, target = ({m: sets[m] for m in modalities} for sets in (VISIBLE, TARGET))
    boxed = jax.eval_shape(model.init, jax.random.key(0), visible, target)["params"]
    flat = flatten_dict(boxed, sep="/")
    for path, leaf in flat.items():
        assert isinstance(leaf, nn.LogicallyPartitioned), path
        assert len(leaf.names) == leaf.value.ndim, path
        assert set(leaf.names) - {None} <= LOGICAL_AXES, path
        assert any(leaf.names) or path == "decoder/projection/bias", path
        assert ("layers" in leaf.names) == ("/blocks/" in path), path
    assert not [path for path in flat if "type_embedding" in path] or typed
    absent = {"image", "text"} - set(modalities)
    assert not [path for path in flat if absent & {part.split("_")[0] for part in path.split("/")}]


# --- published sizes ----------------------------------------------------------------------------------------

VOCABULARY = 30_522
COUNTS = {
    "small": (74_782_266, 47_402_624),
    "base": (150_757_434, 111_656_960),
    "large": (376_155_194, 329_240_832),
    "huge": (711_666_746, 656_938_496),
}


def count(config: Any, vocab_size: int) -> int:
    objective = M3AE(configs.resolve(config), vocab_size)
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(objective.init, jax.random.key(0))))


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts_of_the_reference(size: str) -> None:
    config = configs.default()
    config.model.size = size
    got = count(config, VOCABULARY)
    config.data.modalities = ("image",)
    assert (got, count(config, 0)) == COUNTS[size]
    # The figures of MAE are with type embeddings, one vector in the encoder and one in the decoder.
    width = SIZES[size][0]
    config.m3ae.use_type_embedding = False
    assert count(config, 0) == COUNTS[size][1] - width - 512
