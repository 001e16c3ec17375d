import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.compress.straight_through import round_ste, scale_gradient, sign_ste


def test_sign_passes_its_gradient_strictly_inside_one():
    x = jnp.array([-2.0, -1.0, -0.3, 0.0, 0.5, 1.0, 1.5])
    weight = jnp.arange(1.0, 8.0)
    np.testing.assert_array_equal(sign_ste(x), [-1, -1, -1, 0, 1, 1, 1])
    gradient = jax.grad(lambda x: (sign_ste(x) * weight).sum())(x)
    np.testing.assert_array_equal(gradient, [0, 0, 3, 4, 5, 0, 0])


def test_rounding_is_half_to_even_and_exact_under_further_steps():
    x = jnp.array([0.5, 1.5, -0.5, 2.4])
    np.testing.assert_array_equal(round_ste(x), [0, 2, 0, 2])
    # (round - x) + x would leave a remainder here, and the sign would make 1 of it.
    small = jnp.float32(1e-8)
    assert sign_ste(round_ste(small)) == 0
    np.testing.assert_array_equal(
        jax.hessian(lambda x: (round_ste(x) ** 2).sum())(x), 2 * jnp.eye(4)
    )


def test_a_scaled_gradient_leaves_the_value():
    value, gradient = jax.value_and_grad(lambda x: scale_gradient(x, 0.25) * 3)(jnp.float32(2))
    assert value == 6
    assert gradient == 0.75
