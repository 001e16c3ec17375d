"""Feed-forward networks: (B, L, D) -> (B, L, D), each position by itself."""

from __future__ import annotations

import jax
from flax import linen as nn

from jaxformer.nn.activation import GELU, SILU
from jaxformer.nn.einsum import Einsum, KernelInit, fan_in_normal
from jaxformer.nn.make import Make


class MLP(nn.Module):
    """down(activation(up(x))) with `hidden` units."""

    hidden: int
    activation: Make = GELU
    use_bias: bool = True
    kernel_init: KernelInit = fan_in_normal

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, *, train: bool = False) -> jax.Array:
        del train

        def linear(equation: str, features: int, name: str) -> Einsum:
            init = self.kernel_init(equation)
            return Einsum(equation, (features,), self.use_bias, kernel_init=init, name=name)

        h_BxLxF = linear("...D,DF->...F", self.hidden, "up")(x_BxLxD)
        h_BxLxF = self.activation(name="activation")(h_BxLxF)
        return linear("...F,FD->...D", x_BxLxD.shape[-1], "down")(h_BxLxF)


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)): SwiGLU with SiLU, GEGLU with GELU (arXiv 2002.05202)."""

    hidden: int
    activation: Make = SILU
    use_bias: bool = False

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        gate_BxLxF = Einsum("...D,DF->...F", (self.hidden,), self.use_bias, name="gate")(x_BxLxD)
        up_BxLxF = Einsum("...D,DF->...F", (self.hidden,), self.use_bias, name="up")(x_BxLxD)
        h_BxLxF = self.activation(name="activation")(gate_BxLxF) * up_BxLxF
        width = x_BxLxD.shape[-1]
        return Einsum("...F,FD->...D", (width,), self.use_bias, name="down")(h_BxLxF)
