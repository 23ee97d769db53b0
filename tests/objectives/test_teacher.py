"""The momentum teacher: which parameters it has, and how it follows them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3ae_jax.objectives.parts.teacher import momentum_at, moved, subset

PARAMS = {
    "image": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)},
    "heads": {"match": jnp.ones(2), "words": jnp.zeros(4)},
}


def test_a_teacher_has_the_branches_that_are_named_and_no_others() -> None:
    taken = subset(PARAMS, ("image", "heads/words"))
    assert jax.tree.structure(taken) == jax.tree.structure({"image": {"bias": 0, "kernel": 0}, "heads": {"words": 0}})
    with pytest.raises(LookupError):
        subset(PARAMS, ("sound",))


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.995, 1.0])
def test_each_leaf_is_the_moving_average_in_float32(momentum: float) -> None:
    teacher = subset(jax.tree.map(lambda x: x + 2.0, PARAMS), ("image",))
    after = moved(teacher, PARAMS, ("image",), momentum)
    for old, new, got in zip(*map(jax.tree.leaves, (teacher, subset(PARAMS, ("image",)), after)), strict=True):
        want = np.float32(momentum) * np.asarray(old) + (np.float32(1) - np.float32(momentum)) * np.asarray(new)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        assert got.dtype == jnp.float32
        if momentum in (0.0, 1.0):
            np.testing.assert_array_equal(got, old if momentum else new)


def test_a_small_difference_still_moves_it() -> None:
    """In bfloat16 it would be rounded away and the teacher would stand still."""
    teacher, params = {"w": jnp.float32(1.0)}, {"w": jnp.float32(1.01)}
    for _ in range(200):
        teacher = moved(teacher, params, ("w",), 0.995)
    assert abs(float(teacher["w"]) - (1.01 - 0.01 * 0.995**200)) < 1e-5
    low = jnp.bfloat16(1.0)
    assert jnp.bfloat16(0.995) * low + jnp.bfloat16(0.005) * jnp.bfloat16(1.01) == low


def test_the_momentum_rises_linearly_and_stays() -> None:
    steps = [momentum_at(jnp.int32(step), 0.9, 1.0, 10) for step in (0, 5, 10, 99)]
    np.testing.assert_allclose(steps, [0.9, 0.95, 1.0, 1.0], rtol=1e-6)
    assert float(momentum_at(jnp.int32(0), 0.9, 0.99, 0)) == np.float32(0.99)
