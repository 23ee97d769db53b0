"""Hard negatives: never the row's own, never an equal picture, as likely as they are alike."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from m3ae_jax.objectives.parts.matching import hard_negatives

R, D = 8, 4


def vectors(seed: int = 0, rows: int = R) -> tuple[jax.Array, jax.Array]:
    x = np.random.default_rng(seed).normal(size=(2, rows, D)).astype(np.float32)
    x /= np.linalg.norm(x, axis=2, keepdims=True)
    return jnp.asarray(x[0]), jnp.asarray(x[1])


def draws(count: int, rows: int = 0, **options) -> tuple[np.ndarray, np.ndarray]:
    queries, keys = options.pop("vectors", vectors())
    size = len(queries)
    ids = options.get("ids", jnp.arange(1, size + 1))
    valid = options.get("valid", jnp.ones(size, bool))

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        negatives = hard_negatives(key, queries, keys, options.get("scale", 3.0), (ids,), valid, rows)
        return negatives.of(jnp.arange(size)), negatives.exists

    place, exists = jax.vmap(one)(jax.random.split(jax.random.key(1), count))
    return np.asarray(place), np.asarray(exists)


def test_a_negative_is_another_row_with_another_picture() -> None:
    ids = np.array([1, 1, 2, 3, 3, 3, 4, 5])
    place, exists = draws(10_000, ids=jnp.asarray(ids))
    assert exists.all()
    assert (ids[place] != ids).all() and (place != np.arange(R)).all()


def test_frequencies_are_the_softmax_over_the_possible_rows() -> None:
    queries, keys = vectors()
    place, _ = draws(20_000)
    logits = 3.0 * np.asarray(queries, np.float64) @ np.asarray(keys, np.float64).T
    np.fill_diagonal(logits, -np.inf)
    chance = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for row in range(R):
        others = np.delete(np.arange(R), row)
        counts = np.bincount(place[:, row], minlength=R)[others]
        assert stats.chisquare(counts, chance[row, others] / chance[row, others].sum() * counts.sum()).pvalue > 1e-4


def test_negatives_come_from_groups_of_consecutive_rows_alone() -> None:
    place, _ = draws(500, rows=4)
    assert (place // 4 == np.arange(R) // 4).all()


def test_of_two_rows_there_is_one_possible_negative() -> None:
    place, exists = draws(100, rows=2)
    assert exists.all() and (place == np.arange(R) ^ 1).all()


def test_padding_is_no_negative_and_where_there_is_none_it_is_said() -> None:
    valid = jnp.asarray([True, True, True, False, False, False, False, False])
    place, exists = draws(200, valid=valid)
    assert (place[:, :3] < 3).all() and exists[:, :3].all() and not exists[:, 3:].any()
    _, none = draws(3, ids=jnp.full(R, 9))
    assert not none.any()


def test_without_a_key_the_most_alike_is_taken_and_a_gradient_goes_to_its_row() -> None:
    queries, keys = vectors()
    negatives = hard_negatives(None, queries, keys, 1.0, (jnp.arange(1, R + 1),), jnp.ones(R, bool))
    logits = np.array(queries @ keys.T)
    np.fill_diagonal(logits, -np.inf)
    want = logits.argmax(1)
    np.testing.assert_array_equal(negatives.of(jnp.arange(R)), want)
    features = jnp.asarray(np.random.default_rng(2).normal(size=(R, 3, 5)).astype(np.float32))
    np.testing.assert_array_equal(negatives.of(features), features[want])
    slope = jax.grad(lambda x: negatives.of(x).sum())(features)
    np.testing.assert_allclose(slope[:, 0, 0], np.bincount(want, minlength=R))
