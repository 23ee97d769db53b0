"""Operations in closed form: what a trace hides in loops, branches and rules of differentiation is counted too."""

import jax
import jax.numpy as jnp
import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.train.flops import flops_per_example, matmul_flops, step_flops, work

ROWS, WIDTH, DEPTH = 3, 8, 5
PRODUCT = 2 * ROWS * WIDTH * WIDTH
X, W, STACK = jnp.zeros((ROWS, WIDTH)), jnp.zeros((WIDTH, WIDTH)), jnp.zeros((DEPTH, WIDTH, WIDTH))


def layers(x, stack):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


def test_products_in_a_loop_count_each_time():
    assert matmul_flops(layers, X, STACK) == DEPTH * PRODUCT


def test_what_depends_on_the_parameters_counts_three_times():
    assert step_flops(lambda w, x: jnp.sum(x @ w), W, X) == 3 * PRODUCT
    assert step_flops(lambda w, x: jnp.sum(x @ x.T) + jnp.sum(w), W, X) == 2 * ROWS * ROWS * WIDTH
    assert step_flops(lambda stack, x: jnp.sum(layers(x, stack)), STACK, X) == DEPTH * 3 * PRODUCT


def test_a_carry_that_comes_to_depend_on_the_parameters_counts_so():
    def loss(w, x, frozen):
        """Two carries: the parameters reach the first one at once, the second by way of the first one."""

        def step(carry, fixed):
            near, far = carry
            return (jnp.tanh(near + jnp.sum(w)), far @ fixed + near), None

        return jnp.sum(jax.lax.scan(step, (x, x), frozen)[0][1])

    assert step_flops(loss, W, X, STACK) == DEPTH * 3 * PRODUCT
    assert step_flops(lambda w, x, frozen: jnp.sum(layers(x, frozen)) + jnp.sum(w), W, X, STACK) == DEPTH * PRODUCT


def test_of_branches_the_costliest_counts():
    def loss(w, x, frozen):
        branches = (lambda: x, lambda: x @ w, lambda: x @ frozen @ frozen)
        return jnp.sum(jax.lax.switch(jnp.int32(x[0, 0]), branches) @ frozen)

    assert matmul_flops(loss, W, X, W) == 2 * PRODUCT + PRODUCT
    # In a step the second branch: three times its product. What a branch returns depends on the parameters.
    assert step_flops(loss, W, X, W) == 3 * PRODUCT + 3 * PRODUCT
    assert step_flops(lambda w, x: jnp.sum(jax.lax.cond(True, lambda: x @ x.T, lambda: x @ x.T)), W, X) == (
        2 * ROWS * ROWS * WIDTH
    )


def test_a_loop_of_unknown_length_counts_once():
    def loss(w, x):
        return jnp.sum(jax.lax.while_loop(lambda x: jnp.sum(x) < 1, lambda x: x @ w, x))

    assert step_flops(loss, W, X) == 3 * PRODUCT


def test_a_teacher_counts_once():
    def loss(student, teacher, x):
        return jnp.sum((x @ student) * (x @ teacher))

    def of_itself(params, x):
        return jnp.sum((x @ params) * (jax.lax.stop_gradient(x @ params)))

    assert step_flops(loss, W, W, X) == 3 * PRODUCT + PRODUCT
    assert step_flops(lambda params, x: jnp.sum((x @ params) * (x @ jax.lax.stop_gradient(params))), W, X) == (
        3 * PRODUCT + PRODUCT
    )
    # A trace does not say that nobody asks for a gradient later on: what is stopped after its product counts in full.
    assert step_flops(of_itself, W, X) == 6 * PRODUCT


def test_a_rule_of_differentiation_does_not_count_in_place_of_the_function():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T @ saved[1], saved[0].T @ g))
    assert step_flops(lambda w, x: jnp.sum(product(x, w)), W, X) == 3 * PRODUCT
    assert step_flops(lambda w, x: jnp.sum(product(x, x.T)) + jnp.sum(w), W, X) == 2 * ROWS * ROWS * WIDTH


def test_what_remat_computes_anew_is_executed_but_not_needed():
    def loss(stack, x):
        return jnp.sum(jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, stack)[0])

    def plain(stack, x):
        return jnp.sum(layers(x, stack))

    assert step_flops(loss, STACK, X) == step_flops(plain, STACK, X) == DEPTH * 3 * PRODUCT
    assert matmul_flops(jax.grad(plain), STACK, X) == DEPTH * 3 * PRODUCT
    assert matmul_flops(jax.grad(loss), STACK, X) == DEPTH * 4 * PRODUCT


def config(**changes):
    c = config_lib.default()
    config_lib.apply_overrides(c, [(name, str(value)) for name, value in changes.items()])
    return config_lib.resolve(c)


def by_formula(width, depth, tokens, visible, vocabulary):
    """The paper's model at 224 px: 2 m n k of every product, forward, of one example."""
    patches, seen = 196, 49

    def stack(n, d, layers):
        return layers * (2 * n * 12 * d * d + 2 * 2 * n * n * d)

    encoder, decoder = 1 + seen + visible, 1 + patches + tokens
    heads = 2 * (patches - seen) * 512 * 768 + 2 * (tokens - visible) * 512 * vocabulary
    embed = 2 * seen * 768 * width + 2 * encoder * width * 512
    return stack(encoder, width, depth) + stack(decoder, 512, 8) + heads + embed


@pytest.mark.parametrize(("size", "width", "depth"), [("base", 768, 12), ("huge", 1280, 32)])
def test_flops_per_example_equal_the_formula(size, width, depth):
    got = work(config(**{"model.size": size, "data.image_size": 224}), 30_522)
    assert got.flops_per_example == flops_per_example(config(**{"model.size": size, "data.image_size": 224}), 30_522)
    assert got.flops_per_example == pytest.approx(3 * by_formula(width, depth, 64, 16, 30_522), rel=1e-6)


def test_remat_and_blocks_repeat_work_but_are_not_asked_for():
    plain = work(config(**{"model.size": "small"}), 30_522)
    full = work(config(**{"model.size": "small", "compute.remat": "full", "compute.vocabulary_blocks": 8}), 30_522)
    assert full.flops_per_example == pytest.approx(plain.flops_per_example, rel=0.01)
    assert 1.15 < full.executed_flops / plain.executed_flops < 4 / 3  # the heads are not done twice
    assert plain.executed_flops == pytest.approx(plain.flops_per_example * 4096, rel=0.02)
