"""A DiT that finds positions by itself (section 3): causal attention on the grid, one convolution.

Blocks alternate between full self-attention and attention with A = softmax(Q K^T / sqrt(d) + M),
M = 0 where a key is visible and -inf elsewhere. What a token does not see tells its place: with
i visible tokens the variance of its output goes as 1 / i. In front of the blocks a convolution
with zero padding tells neighbours apart. Nothing else knows of positions, so nothing has to be
extrapolated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.models.transformer import require
from jaxformer.nn.conv import GridConv, dirac
from jaxformer.nn.einsum import Initializer
from jaxformer.nn.grid import Grid, GridRoPE, GridSinusoid, GridTable
from jaxformer.nn.make import Make
from jaxformer.nn.norm import LayerNorm
from jaxformer.nn.position import Position
from jaxformer.nn.rotary import BaseScaling, Frequencies, LinearScaling, RIFLEx, YaRN

INITS: dict[str, Initializer | None] = {"fan_in": None, "dirac": dirac}


class LocalityEnhancement(nn.Module):
    """C_{3,1,1,1}: a 3 x 3 convolution of the patches with zero padding, and a `norm` or none.

    While training, the same kernel is applied with dilation `dilation` with probability `p_dilate`,
    drawn once for the rows of a call; afterwards never. The zeros beyond the border are what
    tells where it is.
    """

    p_dilate: float = 0.0
    dilation: int = 2
    kernel_init: Initializer | None = None
    norm: Make | None = None

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, grid: Grid, *, train: bool = False) -> jax.Array:
        dilation: int | jax.Array = 1
        if train and self.p_dilate:
            wide = jax.random.bernoulli(self.make_rng("dropout"), self.p_dilate)
            dilation = jnp.where(wide, self.dilation, 1)
        most = self.dilation if train and self.p_dilate else 1
        conv = GridConv(most=most, kernel_init=self.kernel_init, name="conv")
        image = x_BxLxD.reshape(-1, *grid, x_BxLxD.shape[-1])
        y_BxLxD = conv(image, dilation).reshape(x_BxLxD.shape)
        return y_BxLxD if self.norm is None else self.norm(name="norm")(y_BxLxD)


STRETCHES: dict[str, Callable[[float, int], Frequencies]] = {
    "none": lambda factor, trained: Frequencies(),
    "interpolate": lambda factor, trained: LinearScaling(factor=factor),
    "ntk": lambda factor, trained: BaseScaling(factor=factor),
    "yarn": lambda factor, trained: YaRN(factor=factor, length=trained),
    "riflex": lambda factor, trained: RIFLEx(factor=factor, length=trained),
}


def positions(
    kind: str,
    *,
    trained: Grid,
    grid: Grid,
    stretch: str = "none",
    p_dilate: float = 0.0,
    dilation: int = 2,
    conv_init: str = "fan_in",
    conv_norm: bool = False,
) -> dict[str, Any]:
    """What tells positions, as arguments of `dit`: "conv" is the paper's, "none" nothing.

    The baselines are "sincos", "learned" and "rope"; `stretch` is how they reach from the grid
    `trained` on to a larger `grid`: "interpolate" squeezes sin-cos and rotary positions into it,
    the others are of rotary positions. A learned table is always interpolated.

    Raises:
        ConfigError: no such kind, stretch or initialisation.
    """
    require("model.position", kind, ("conv", "none", "sincos", "learned", "rope"))
    require("model.stretch", stretch, STRETCHES)
    require("model.conv_init", conv_init, INITS)
    if kind == "conv":
        conv = Make(
            LocalityEnhancement,
            p_dilate=p_dilate,
            dilation=dilation,
            kernel_init=INITS[conv_init],
            norm=Make(LayerNorm, epsilon=1e-6) if conv_norm else None,
        )
        return {"position": conv}
    if kind == "sincos":
        squeeze = trained if stretch == "interpolate" else None
        return {"position": Make(GridSinusoid, trained=squeeze)}
    if kind == "learned":
        return {"position": Make(GridTable, trained=trained)}
    if kind == "rope":
        factor = max(1.0, *(n / t for n, t in zip(grid, trained, strict=True)))
        frequencies = STRETCHES[stretch](factor, max(trained))
        return {"attention_position": Make(GridRoPE, frequencies=frequencies)}
    return {"attention_position": Make(Position)}
