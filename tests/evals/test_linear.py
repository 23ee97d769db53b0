"""The probe, the neighbours, few-shot draws and the out-of-distribution scores, against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3ae_jax.evals import few_shot, knn, linear, ood

linear_model = pytest.importorskip("sklearn.linear_model")
from sklearn.metrics import roc_auc_score  # noqa: E402
from sklearn.neighbors import KNeighborsClassifier  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402


def clusters(n, width, classes, noise=2.0, seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) * (np.arange(1, width + 1) ** -1.0)[:, None]
    label = rng.integers(0, classes, n)
    centers = np.random.default_rng(1).normal(size=(classes, width))
    return ((centers[label] + noise * rng.normal(size=(n, width))) @ mixing + 3).astype(np.float32), label


@pytest.mark.parametrize(("n", "width", "classes", "l2"), [(400, 16, 3, 1e-2), (400, 16, 2, 1e-4), (40, 64, 5, 1e-2)])
def test_the_probe_is_scikit_learns(n, width, classes, l2):
    x, y = clusters(n, width, classes)
    ours = linear.Problem(x, y, classes).fit(l2)
    scaled = StandardScaler().fit(x)
    theirs = linear_model.LogisticRegression(C=1 / (n * l2), tol=1e-10, max_iter=10_000)
    theirs.fit(scaled.transform(x), y)
    logits = ours.logits(x)
    probability = np.exp(logits - logits.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    wanted = theirs.predict_proba(scaled.transform(x))
    if classes == 2:  # scikit-learn fits one weight where we fit two of opposite signs, each penalised
        theirs = linear_model.LogisticRegression(C=2 / (n * l2), tol=1e-10, max_iter=10_000)
        wanted = theirs.fit(scaled.transform(x), y).predict_proba(scaled.transform(x))
    np.testing.assert_allclose(probability, wanted, atol=2e-3)
    assert (logits.argmax(1) == wanted.argmax(1)).mean() > 0.99


def test_a_warm_start_ends_where_a_cold_one_does():
    x, y = clusters(300, 12, 4)
    warm = linear.Problem(x, y, 4)
    for l2 in (1.0, 1e-2, 1e-4):
        found = warm.fit(l2)
    cold = linear.Problem(x, y, 4).fit(1e-4)
    np.testing.assert_allclose(found.logits(x), cold.logits(x), atol=0.05)
    assert found.accuracy(x, y) == pytest.approx(cold.accuracy(x, y), abs=0.01)


def test_item_13_groups_stay_together_when_the_penalty_is_chosen():
    """Several drawings of a concept: a classifier that knows one of them by heart knows the others."""
    rng = np.random.default_rng(0)
    concept, classes = np.repeat(np.arange(60), 5), rng.integers(0, 2, 60)
    drawings = rng.normal(size=(60, 100))[concept] + 0.05 * rng.normal(size=(300, 100))
    x, y = drawings.astype(np.float32), classes[concept]
    leaking, grouped = linear.swept(x, y, 2), linear.swept(x, y, 2, group=concept)
    held, rest = linear.held_out(300, None)
    assert linear.Problem(x[rest], y[rest], 2).fit(1e-3).accuracy(x[held], y[held]) == 1.0
    held, rest = linear.held_out(300, concept)
    assert not set(concept[held]) & set(concept[rest]) and sorted([*held, *rest]) == list(range(300))
    assert linear.Problem(x[rest], y[rest], 2).fit(1e-3).accuracy(x[held], y[held]) < 0.75  # there is nothing to learn
    assert len(held) == 60 and leaking.l2 in linear.L2 and grouped.l2 in linear.L2
    same = linear.swept(x, y, 2, group=None)
    np.testing.assert_array_equal(same.weight, leaking.weight)


@pytest.mark.parametrize(
    ("group", "held"),
    [([0] * 10, 10), ([0] * 9 + [1], None), (list(range(10)), 2), ([0] * 5 + [1] * 5, 5)],
)
def test_whole_groups_are_held_out_and_of_several_some_are_left(group, held):
    group = np.array(group)
    chosen, rest = linear.held_out(10, group)
    assert not set(group[chosen]) & set(group[rest]) and len(chosen) + len(rest) == 10
    assert len(chosen) == held if held else 0 < len(chosen) < 10
    assert linear.swept(np.eye(10, dtype=np.float32), np.arange(10) % 2, 2, group=group).l2 in linear.L2


def test_the_sweep_takes_a_penalty_that_does_well():
    x, y = clusters(600, 40, 4, noise=4.0)
    other, truth = clusters(2000, 40, 4, noise=4.0, seed=9)
    found = linear.swept(x, y, 4)
    all_of_them = [linear.Problem(x, y, 4).fit(l2).accuracy(other, truth) for l2 in linear.L2]
    assert found.l2 in linear.L2
    assert found.accuracy(other, truth) > max(all_of_them) - 0.03


def test_constant_and_missing_classes_and_features_do_no_harm():
    x, y = clusters(50, 8, 3)
    x[:, 2] = 1e4
    found = linear.swept(x, np.where(y == 1, 5, y), 7)
    assert np.isfinite(found.logits(x)).all() and found.accuracy(x, np.where(y == 1, 5, y)) > 0.5
    assert linear.Problem(x[:1], y[:1], 3).fit(1.0).accuracy(x[:1], y[:1]) == 1.0
    assert np.isfinite(linear.swept(x[:2], np.array([0, 1]), 2).weight).all()


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_neighbours_are_scikit_learns(k):
    x, y = clusters(500, 16, 6)
    q, _ = clusters(130, 16, 6, seed=3)

    def votes(distance):
        return np.exp((1 - distance) / 0.07)

    theirs = KNeighborsClassifier(k, weights=votes, metric="cosine", algorithm="brute").fit(x, y)
    for block in (32, 512):
        ours = knn.classify(x, y, q, (k,), block)[k]
        np.testing.assert_array_equal(ours, theirs.predict(q))


def test_equally_near_neighbours_count_in_order_and_equal_votes_by_class():
    x = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    q = np.array([[2, 0], [0, 3], [1, 1]], np.float32)
    found = knn.classify(x, np.array([2, 1, 0]), q, (1, 2, 3))
    assert found[1].tolist()[:2] == [2, 0]
    assert found[2][0] == 1  # one vote each
    assert found[3].tolist()[1] == 0


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_auroc_with_ties(inside, outside):
    truth = [0] * len(inside) + [1] * len(outside)
    assert ood.auroc(np.array(inside), np.array(outside)) == pytest.approx(roc_auc_score(truth, inside + outside))


def test_mahalanobis_and_confidence():
    x, y = clusters(4000, 6, 3, noise=0.5)
    score = ood.Mahalanobis(x, y)
    means = np.stack([x[y == c].mean(0) for c in range(3)]).astype(np.float64)
    inverse = np.linalg.inv(np.cov((x - means[y]).T, bias=True))
    wanted = np.min([np.einsum("nd,de,ne->n", x - m, inverse, x - m) for m in means], axis=0)
    assert np.corrcoef(score(x), wanted)[0, 1] > 0.98
    assert ood.auroc(score(x), score(x * -3)) > 0.9
    logits = np.array([[50.0, 0, 0], [1, 1, 1], [200, 0, 0]])
    found = ood.confidence(logits)
    assert found[1] == pytest.approx(np.log(1 / 3)) and found[2] > found[0] > found[1]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(1, 10), st.integers(0, 3))
def test_draws(labels, shots, seed):
    label = np.array(labels)
    rows = few_shot.draw(label, shots, seed)
    assert len(set(rows.tolist())) == len(rows)
    counts = np.bincount(label, minlength=5)
    np.testing.assert_array_equal(np.bincount(label[rows], minlength=5), np.minimum(counts, shots))
    assert set(rows.tolist()) <= set(few_shot.draw(label, shots + 1, seed).tolist())


def test_the_interval_is_students():
    # Of 1, 2, 3: deviation 1, t = 4.303 with two degrees of freedom.
    assert few_shot.half_interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / np.sqrt(3), rel=1e-3)
