"""The constructed layer is gradient descent, to rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.evaluation.few_shot import orders, sensitivity, sparsity
from jaxformer.nn.descent import descent_answer, descent_layer, descent_tokens, descent_weights
from jaxformer.recipe import ConfigError

B, N = 3, 7


def problem(dx, dy):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, N, dx), (B, N, dy), (B, dx), (dy, dx)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def by_layers(x, y, x_q, W_0, eta, steps):
    weights, E = descent_weights(W_0, eta, N), descent_tokens(x, y, x_q, W_0)
    for _ in range(steps):
        E = descent_layer(weights, E)
    return descent_answer(E, len(W_0))


def by_descent(x, y, x_q, W_0, eta, steps):
    def loss(W, x, y):
        return jnp.sum((x @ W.T - y) ** 2) / (2 * N)

    def one(x, y, x_q):
        W = W_0
        for _ in range(steps):
            W = W - eta * jax.grad(loss)(W, x, y)
        return W @ x_q

    return jax.vmap(one)(x, y, x_q)


@pytest.mark.parametrize(("dx", "dy", "steps"), [(4, 1, 1), (3, 2, 1), (3, 2, 3)])
@pytest.mark.parametrize("x64", [False, True])
def test_layers_are_steps(dx, dy, steps, x64):
    with jax.enable_x64(x64):
        given = problem(dx, dy)
        layers, descent = (
            jax.jit(f, static_argnames="steps")(*given, 0.3, steps=steps)
            for f in (by_layers, by_descent)
        )
        np.testing.assert_allclose(layers, descent, atol=1e-12 if x64 else 1e-5)
        assert not np.allclose(layers, given[2] @ given[3].T, atol=0.01)  # it did move


def test_the_order_of_demonstrations_changes_nothing():
    x, y, x_q, W_0 = problem(3, 2)
    turns = jnp.asarray(orders(4, N))
    run = jax.jit(jax.vmap(lambda turn: by_layers(x[:, turn], y[:, turn], x_q, W_0, 0.3, 2)))
    assert sensitivity(run(turns)) < 1e-6


def test_it_is_nearly_all_zeros_at_the_size_of_a_language_model():
    d = 64
    weights = descent_weights(0.1 + jnp.abs(problem(d, d)[3]), 0.1, N)
    assert sparsity(weights, "W_K|W_Q", (1e-6,))[1e-6] == 1 - 1 / (4 * d)
    assert sparsity(weights, "W_V", (1e-6,))[1e-6] == pytest.approx(0.75 - 1 / (4 * d))


def test_without_demonstrations_there_is_no_step():
    with pytest.raises(ConfigError, match="N: 0 demonstrations"):
        descent_weights(jnp.eye(2), 0.1, 0)
