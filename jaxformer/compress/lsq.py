"""Learned step sizes: weights of few bits whose steps are trained with them.

LSQ is of Esser et al. 2020, arXiv 1902.08153. It acts where a weight meets an activation, in
`Einsum`, `Conv` and `DepthwiseConv`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer import paths
from jaxformer.analyze.operations import MAPS
from jaxformer.compress.straight_through import round_ste, scale_gradient, straight_through
from jaxformer.errors import ConfigError
from jaxformer.nn.interception import fits

LEAST = 1e-6  # a step is never smaller


def code_range(bits: int) -> tuple[int, int]:
    """The least and the largest code of `bits` bits, -2^(b-1) and 2^(b-1) - 1."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def initial_step(weight: jax.Array, bits: int) -> jax.Array:
    """2 mean |W| / sqrt(Qp) (section 2.1), of the whole weight."""
    return 2 * jnp.abs(weight).mean() / math.sqrt(code_range(bits)[1])


def lsq(weight: jax.Array, step: jax.Array, bits: int) -> jax.Array:
    """round(clip(W / step, Qn, Qp)) step, half to even; `step` broadcasts.

    The rounding's derivative is 1. The step's is multiplied by 1 / sqrt(size of W times Qp). A step
    below `LEAST` counts as that and has the derivative that it would have there.
    """
    low, high = code_range(bits)
    step = straight_through(jnp.maximum(step, LEAST), step)
    step = scale_gradient(step, 1 / math.sqrt(weight.size * high))
    return round_ste(jnp.clip(weight / step, low, high)) * step


@dataclasses.dataclass(frozen=True)
class LearnedSteps:
    """An interceptor: maps whose path fits `pattern` have weights of `bits` bits.

    The parameter "scale" beside a kernel holds one step for each output channel, all alike at first
    (`initial_step` of whatever kernel there is when it is declared).

    Raises:
        ConfigError: fewer bits than two.
    """

    bits: int
    pattern: str = ""

    def __post_init__(self) -> None:
        if self.bits < 2:
            raise ConfigError(f"model.bits={self.bits}: must be at least 2")

    def __call__(
        self,
        method: Callable[..., Any],
        args: Any,
        kwargs: Any,
        context: nn.module.InterceptorContext,
    ) -> Any:
        layer = context.module
        if not isinstance(layer, MAPS) or context.method_name != "contract":
            return method(*args, **kwargs)
        if not fits(self.pattern, layer):
            return method(*args, **kwargs)
        x, kernel, bias = args
        axes, start = layer.contracted, initial_step(kernel, self.bits)
        shape = tuple(n for i, n in enumerate(kernel.shape) if i not in axes)
        step = layer.param("scale", lambda key: jnp.full(shape, start, jnp.float32))
        return method(x, lsq(kernel, jnp.expand_dims(step, axes), self.bits), bias)


def clamped_steps(params: Any) -> jax.Array:
    """How many steps beside kernels are below `LEAST`, so that they no longer shrink."""
    named = paths.leaves(params)
    steps = [x for name, x in named.items() if name.endswith("scale") and _kernel(name) in named]
    return sum(((step < LEAST).sum() for step in steps), jnp.zeros((), jnp.int32))


def _kernel(scale: str) -> str:
    return scale.removesuffix("scale") + "kernel"
