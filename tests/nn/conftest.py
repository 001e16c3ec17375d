"""Weights without the cost of compiling an initialiser."""

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def weights():
    """`weights(init, *args, **kwargs)`: arrays shaped like `init`'s, all of them drawn alike.

    No leaf is constant, so that every parameter matters.
    """

    def draw(init, *args, **kwargs):
        shapes = jax.eval_shape(lambda: init(jax.random.key(0), *args, **kwargs))
        leaves, structure = jax.tree.flatten(shapes)
        generator = np.random.default_rng(0)
        return structure.unflatten([np.float32(generator.normal(0, 0.3, x.shape)) for x in leaves])

    return draw
