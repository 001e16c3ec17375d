"""`Activation`: elementwise functions as a module, so that they can be intercepted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.nn.make import Make

FUNCTIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),  # GPT-2's
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


class Activation(nn.Module):
    """The function of that name, elementwise.

    Raises:
        ConfigError: no such function.
    """

    function: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.function not in FUNCTIONS:
            raise ConfigError(
                f"Activation.function={self.function!r}: must be one of {', '.join(FUNCTIONS)}"
            )

    def __call__(self, x: jax.Array) -> jax.Array:
        return FUNCTIONS[self.function](x)


GELU = Make(Activation, function="gelu")
GELU_TANH = Make(Activation, function="gelu_tanh")
QUICK_GELU = Make(Activation, function="quick_gelu")
RELU = Make(Activation, function="relu")
SILU = Make(Activation, function="silu")
TANH = Make(Activation, function="tanh")
