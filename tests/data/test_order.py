"""The order of examples: a true permutation each epoch, unrelated to any other, the same wherever it is asked."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from m3ae_jax import config as config_lib
from m3ae_jax.data import order
from m3ae_jax.data.order import (
    ATTEMPTS,
    ORDER_VERSION,
    Order,
    fold_seed,
    hidden_count,
    keeps_caption,
    order_version,
    token_budget,
)
from m3ae_jax.errors import UserError
from m3ae_jax.train.identity import Identity

RATIOS = [k / 20 for k in range(20)]
SEEDS = st.integers(0, 2**31 - 1)
SOME_SEEDS = (0, 7, fold_seed(42, "webdataset", "train"))


def permutation(n: int, seed: int, stream: int = 0, attempt: int = 0) -> np.ndarray:
    return order.permute(np.arange(n), n, seed, stream, attempt).numpy()


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return abs(float(np.corrcoef(a, b)[0, 1]))


def most_batch_mates(n: int, batch: int, seed: int) -> int:
    """The most examples of one batch of epoch 0 that share a batch in epoch 1."""
    batch_in_next = np.empty(n, np.int64)
    batch_in_next[permutation(n, seed, 1)] = np.arange(n) // batch
    cell = (np.arange(n) // batch) * (n // batch) + batch_in_next[permutation(n, seed, 0)]
    return int(np.bincount(cell).max())


def chance(n: int, batch: int) -> float:
    """What `most_batch_mates` of true shuffles stays below: 8 standard deviations (Poisson, over many pairs)."""
    mean = batch * batch / n
    return mean + 8 * mean**0.5


# -- the permutation


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 100, 1000])
def test_permute_is_a_bijection(n: int) -> None:
    for seed, stream, attempt in [(0, 0, 0), (3, 1, 0), (2**31 - 1, 2**32 - 1, ATTEMPTS - 1)]:
        assert sorted(permutation(n, seed, stream, attempt)) == list(range(n))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 5000), seed=SEEDS, stream=st.integers(0, 2**32 - 1), attempt=st.integers(0, ATTEMPTS - 1))
def test_permute_is_a_bijection_for_any_key(n: int, seed: int, stream: int, attempt: int) -> None:
    assert (np.sort(permutation(n, seed, stream, attempt)) == np.arange(n)).all()


def test_permute_keeps_shape_and_takes_a_key_for_each_element() -> None:
    index = np.arange(12).reshape(3, 4)
    streams = np.arange(3)[:, None] + np.zeros(4, np.int64)
    result = order.permute(index, 12, 5, streams)
    assert result.shape == (3, 4) and result.dtype == tf.int64
    rows = [order.permute(index[row], 12, 5, row).numpy() for row in range(3)]
    np.testing.assert_array_equal(result, rows)
    assert order.permute(np.int64(3), 12, 5).shape == ()


def test_golden_values(golden: Callable[..., None]) -> None:
    draws = np.arange(12)
    values = {
        "version": ORDER_VERSION,
        "fold_seed": [fold_seed(0), fold_seed(42, "scenes", "train"), fold_seed("a", "b"), fold_seed("ab")],
        "index of 7": Order(7, seed=3).index(draws).numpy().tolist(),
        "index of 7, attempt 1": Order(7, seed=3).index(draws, 1).numpy().tolist(),
        "index of 1000": Order(1000, seed=3).index(draws).numpy().tolist(),
        "index of 12 million, epoch 99": Order(12_000_000, seed=2**31 - 1)
        .index(draws + 99 * 12_000_000)
        .numpy()
        .tolist(),
        "keeps a caption": np.flatnonzero(keeps_caption(np.arange(40), 40, 0.3, 3)).tolist(),
    }
    golden("order.json", values)


def test_item_8_the_order_of_former_crops_is_another_version() -> None:
    assert (order_version(1), order_version(2)) == (ORDER_VERSION, 3)


def test_item_8_a_run_of_former_crops_is_told_how_to_go_on() -> None:
    config = config_lib.resolve(config_lib.default())
    identity = Identity(config, {"order_version": order_version(config.data.crop_rule)})
    with pytest.raises(UserError, match=r"order_version=3 \(the run has 2\).*add --config\.data\.crop_rule=1") as error:
        identity.check("runs/a", {"config": config.to_dict(), "order_version": 2})
    assert "--allow_config_change=order_version" in str(error.value) and "\n" not in str(error.value)
    former = config_lib.default()
    former.data.crop_rule = 1
    assert not Identity(config_lib.resolve(former), {"order_version": order_version(1)}).check(
        "runs/a", {"config": config.to_dict(), "order_version": 2}
    )
    with pytest.raises(UserError) as error:
        identity.check("runs/a", {"config": config.to_dict(), "order_version": 1})
    assert "crop_rule" not in str(error.value)


# -- how good the shuffle is


@pytest.mark.parametrize("seed", SOME_SEEDS)
def test_no_correlation_within_an_epoch_or_between_epochs(seed: int) -> None:
    n = 65_536
    first = permutation(n, seed, 0)
    assert correlation(np.arange(n), first) < 0.02
    assert correlation(first[:-1], first[1:]) < 0.02
    for other in (permutation(n, seed, 1), permutation(n, seed, 2), permutation(n, seed, 0, attempt=1)):
        assert correlation(first, other) < 0.02
        assert (first == other).sum() < 10


@pytest.mark.parametrize("seed", SOME_SEEDS)
@pytest.mark.parametrize(("n", "batch"), [(65_536, 4096), (65_536, 512), (49_152, 1024)])
def test_batch_mates_part_in_the_next_epoch(n: int, batch: int, seed: int) -> None:
    assert most_batch_mates(n, batch, seed) < chance(n, batch)


def test_too_few_rounds_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the 4 rounds of `tf.random.experimental.index_shuffle` whole batches stay together."""
    monkeypatch.setattr(order, "_ROUNDS", 4)
    assert correlation(permutation(65_536, 7, 0), permutation(65_536, 7, 1)) > 0.9
    assert most_batch_mates(65_536, 4096, 7) > 10 * chance(65_536, 4096)
    assert most_batch_mates(49_152, 1024, 7) > 10 * chance(49_152, 1024)


# -- draws to examples


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 300), seed=SEEDS, start=st.integers(0, 900), count=st.integers(1, 50))
def test_index_is_a_pure_function_of_the_draw(n: int, seed: int, start: int, count: int) -> None:
    whole = Order(n, seed).index(np.arange(1000)).numpy()
    part = Order(n, seed).index(np.arange(start, start + count)).numpy()
    np.testing.assert_array_equal(part[: 1000 - start], whole[start : start + count])


def test_each_epoch_holds_each_example_once() -> None:
    epochs = Order(50, seed=1).index(np.arange(4 * 50)).numpy().reshape(4, 50)
    assert (np.sort(epochs, axis=1) == np.arange(50)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_attempts_are_other_permutations() -> None:
    epoch = np.arange(50)
    attempts = [tuple(Order(50, seed=1).index(epoch, attempt).numpy()) for attempt in range(ATTEMPTS)]
    assert len(set(attempts)) == ATTEMPTS
    assert all(sorted(a) == list(epoch) for a in attempts)


def test_without_shuffling_draws_follow_the_source() -> None:
    fixed = Order(5, seed=1, shuffle=False)
    np.testing.assert_array_equal(fixed.index(np.arange(12)), np.arange(12) % 5)
    np.testing.assert_array_equal(fixed.index(np.arange(12), 1), (np.arange(12) + 1) % 5)


def test_fold_seed_tells_parts_apart_and_fits_31_bits() -> None:
    seeds = [fold_seed(*parts) for parts in ((1,), (1, "a"), ("1a",), ("a", 1), (1, "b"), (1, "a", ""))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)


# -- which examples keep their caption


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 2000), fraction=st.floats(0, 1), seed=SEEDS)
def test_exactly_the_share_keeps_its_caption(n: int, fraction: float, seed: int) -> None:
    assert keeps_caption(np.arange(n), n, fraction, seed).numpy().sum() == round(fraction * n)


def test_captions_are_kept_by_index_and_nested() -> None:
    n = 200
    kept = {f: keeps_caption(np.arange(n), n, f, seed=3).numpy() for f in (0.1, 0.2, 0.3)}
    assert (kept[0.1] <= kept[0.2]).all() and (kept[0.2] <= kept[0.3]).all()
    shuffled = np.random.default_rng(0).permutation(n)
    np.testing.assert_array_equal(keeps_caption(shuffled, n, 0.3, seed=3), kept[0.3][shuffled])
    assert (keeps_caption(np.arange(n), n, 0.3, seed=4).numpy() != kept[0.3]).any()


# -- counts


@pytest.mark.parametrize("ratio", RATIOS)
def test_hidden_count_rounds_half_up_the_same_everywhere(ratio: float) -> None:
    real = np.arange(257)
    exact = [int(n * Fraction(round(ratio * 20), 20) + Fraction(1, 2)) for n in range(257)]
    assert [hidden_count(n, ratio) for n in range(257)] == exact
    np.testing.assert_array_equal(hidden_count(real, ratio), exact)
    np.testing.assert_array_equal(hidden_count(tf.constant(real, tf.int32), ratio), exact)


@pytest.mark.parametrize("ratio", RATIOS)
def test_token_budget_is_enough_and_not_more(ratio: float) -> None:
    for tokens in (0, 1, 2, 7, 64, 196, 256):
        hidden = [hidden_count(n, ratio) for n in range(tokens + 1)]
        visible = [n - h for n, h in enumerate(hidden)]
        assert token_budget(tokens, ratio) == (max(visible), max(hidden))
