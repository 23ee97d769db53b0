"""The losses of contrast, their queue and temperature, against formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3ae_jax.objectives.parts.contrast import (
    clamped,
    empty_queue,
    in_chunks,
    positives,
    pushed,
    right_first,
    sigmoid_loss,
    similarities,
    softmax_loss,
    unit,
)

B, D = 12, 8
SCALE = 1 / 0.07


def embeddings(rows: int = B, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.random.default_rng(seed).normal(size=(2, rows, D)).astype(np.float32)
    return tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def test_with_one_positive_each_it_is_infonce() -> None:
    image, text = embeddings()
    logits = SCALE * image @ text.T
    want = -np.diagonal(log_softmax(logits))
    loss = softmax_loss(jnp.asarray(logits), jnp.eye(B, dtype=bool), jnp.ones(B, bool))
    np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_duplicates_of_a_picture_are_never_negatives() -> None:
    image, text = embeddings()
    ids = np.array([3, 3, 5, 5, 5, 7, 8, 9, 10, 11, 0, 0], np.int32)
    positive = np.array(positives(jnp.asarray(ids), jnp.asarray(ids)))
    assert not positive[10:].any()  # 0 is nobody's id
    positive |= np.eye(B, dtype=bool)
    logits = SCALE * image @ text.T
    want = -(log_softmax(logits) * positive).sum(1) / positive.sum(1)
    valid = jnp.ones(B, bool)
    np.testing.assert_allclose(softmax_loss(jnp.asarray(logits), jnp.asarray(positive), valid), want, rtol=1e-5)
    # At equal logits everywhere a row with k positives has no gradient towards any of them alone.
    slope = jax.grad(lambda x: softmax_loss(x, jnp.asarray(positive), valid).sum())(jnp.zeros((B, B)))
    assert np.allclose(slope[0, :2], 1 / B - 1 / 2, atol=1e-6) and np.allclose(slope[0, 2:], 1 / B, atol=1e-6)


def test_sigmoid_is_a_logistic_regression_of_each_pair() -> None:
    image, text = embeddings()
    logits = 10 * image @ text.T - 10
    sign = np.where(np.eye(B), 1.0, -1.0)
    want = np.log1p(np.exp(-sign * logits.astype(np.float64))).sum(1)
    loss = sigmoid_loss(jnp.asarray(logits), jnp.eye(B, dtype=bool), jnp.ones(B, bool))
    np.testing.assert_allclose(loss, want, rtol=1e-5)


@pytest.mark.parametrize("kind", [softmax_loss, sigmoid_loss])
def test_padding_is_no_key_whatever_it_holds(kind) -> None:
    image, text = embeddings()
    logits = jnp.asarray(SCALE * image @ text.T)
    valid = jnp.arange(B) < 9
    whole = kind(logits[:9, :9], jnp.eye(9, dtype=bool), jnp.ones(9, bool))
    padded = kind(logits.at[:, 9:].set(1e4), jnp.eye(B, dtype=bool), valid)
    np.testing.assert_allclose(padded[:9], whole, rtol=1e-5)
    assert np.isfinite(jax.grad(lambda x: kind(x, jnp.eye(B, dtype=bool), valid)[:9].sum())(logits)).all()


def test_a_row_without_a_positive_costs_nothing() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(B, B)).astype(np.float32))
    loss = softmax_loss(logits, jnp.zeros((B, B), bool), jnp.ones(B, bool))
    assert not loss.any()


def test_soft_targets_sum_to_one_and_a_share_of_zero_is_infonce() -> None:
    image, text = embeddings()
    logits, soft = jnp.asarray(SCALE * image @ text.T), jnp.asarray(SCALE * text @ image.T)
    eye, valid = jnp.eye(B, dtype=bool), jnp.ones(B, bool)
    np.testing.assert_array_equal(softmax_loss(logits, eye, valid, soft, 0.0), softmax_loss(logits, eye, valid))
    teacher = np.exp(log_softmax(np.asarray(soft)))
    target = 0.4 * teacher + 0.6 * np.eye(B)
    np.testing.assert_allclose(target.sum(1), 1.0, rtol=1e-6)
    want = -(target * log_softmax(np.asarray(logits))).sum(1)
    np.testing.assert_allclose(softmax_loss(logits, eye, valid, soft, 0.4), want, rtol=1e-5)
    slope = jax.grad(lambda s: softmax_loss(logits, eye, valid, s, 0.4).sum())(soft)
    assert not np.asarray(slope).any()


def test_embeddings_have_length_one_and_zero_stays_zero() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, D)).astype(np.float32)).at[0].set(0)
    length = np.linalg.norm(unit(x), axis=1)
    np.testing.assert_allclose(length[1:], 1.0, rtol=1e-6)
    assert length[0] == 0 and np.isfinite(jax.grad(lambda y: unit(y).sum())(x)).all()


@pytest.mark.parametrize(
    ("x", "gradient", "passes"),
    [(0.5, 1.0, 1), (0.0, 1.0, 0), (0.0, -1.0, 1), (1.0, -1.0, 0), (1.0, 1.0, 1), (2.0, -1.0, 0)],
)
def test_a_clamped_parameter_stays_within_its_bounds_and_comes_back(x: float, gradient: float, passes: int) -> None:
    value, back = jax.vjp(lambda y: clamped(y, 0.0, 1.0), jnp.float32(x))
    assert float(value) == min(max(x, 0.0), 1.0) and float(back(jnp.float32(gradient))[0]) == passes * gradient


def test_a_queue_wraps_and_leaves_other_places_as_they_were() -> None:
    queue = empty_queue(jax.random.key(0), 12, D)
    np.testing.assert_allclose(np.linalg.norm(queue["image"], axis=1), 1.0, rtol=1e-5)
    assert not queue["id"].any()
    for push in range(4):
        rows = {
            "image": jnp.full((4, D), 10.0 + push),
            "text": jnp.full((4, D), 20.0 + push),
            "id": jnp.full(4, 1 + push, jnp.int32),
        }
        before, queue = queue, pushed(queue, rows)
        place = 4 * (push % 3)
        assert (queue["image"][place : place + 4] == 10.0 + push).all() and (
            queue["id"][place : place + 4] == 1 + push
        ).all()
        others = np.delete(np.arange(12), np.arange(place, place + 4))
        for name in ("image", "text", "id"):
            np.testing.assert_array_equal(queue[name][others], before[name][others])
    assert int(queue["next"]) == 4
    with pytest.raises(ValueError, match="12 is not divisible by the 5"):
        pushed(queue, {"id": jnp.zeros(5, jnp.int32)})


@pytest.mark.parametrize("chunks", [1, 2, 6])
def test_chunks_change_neither_loss_nor_gradient(chunks: int) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, 5)).astype(np.float32))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, D)).astype(np.float32))

    def loss(weights: jax.Array, chunks: int) -> jax.Array:
        def embed(rows: jax.Array, number: jax.Array) -> dict[str, jax.Array]:
            del number
            return {"image": unit(rows @ weights[0]), "text": unit(jnp.tanh(rows) @ weights[1])}

        of = in_chunks(embed, x, chunks)
        logits = SCALE * similarities(of["image"], of["text"])
        return softmax_loss(logits, jnp.eye(B, dtype=bool), jnp.ones(B, bool)).mean()

    want, slope = jax.value_and_grad(loss)(weights, 1)
    got, chunked = jax.value_and_grad(loss)(weights, chunks)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(chunked, slope, rtol=1e-4, atol=1e-6)


def test_the_right_one_comes_first_or_not() -> None:
    logits = jnp.asarray([[3.0, 1.0, 9.0], [0.0, 2.0, 1.0], [5.0, 0.0, 4.0]])
    first = right_first(logits, jnp.eye(3, dtype=bool), jnp.asarray([True, True, False]))
    assert first.tolist() == [1.0, 1.0, 0.0]
