"""Weights and activations of one bit: what binary networks put at a model's matrix products."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.analyze.operations import Product
from jaxformer.compress.straight_through import sign_ste
from jaxformer.nn.attention import Mix, Scores
from jaxformer.nn.einsum import Axes, Einsum
from jaxformer.nn.interception import fits


def mean_scale(kernel: jax.Array, equation: str) -> jax.Array:
    """The mean |W| of each output channel, which makes sign(W) times it the nearest to W.

    (Rastegari et al. 2016, arXiv 1603.05279, section 3.1); summed-over axes are kept, of size 1.
    """
    return jnp.abs(kernel).mean(Axes.of(equation).contracted, keepdims=True)


def centred_sign(kernel: jax.Array, equation: str) -> jax.Array:
    """sign(W - the mean of its output channel); the gradient passes where that is inside (-1, 1).

    A weight that is the mean of its channel gives 0.
    """
    return sign_ste(kernel - kernel.mean(Axes.of(equation).contracted, keepdims=True))


@dataclasses.dataclass(frozen=True)
class BinaryEinsum:
    """An interceptor: `Einsum`s whose path fits `pattern` have weights of one bit and a scale.

    W becomes alpha sign(W - its channel's mean). alpha is mean |W| without a gradient, or, if
    `learned`, a parameter "scale" beside the kernel, shaped like a bias, which starts as that: as
    mean |W| of whatever kernel there is when it is declared (`Intercepted.complete`).
    `binary_inputs` puts sign(x) in the place of x.
    """

    pattern: str
    binary_inputs: bool = True
    learned: bool = True

    def __call__(
        self,
        method: Callable[..., Any],
        args: Any,
        kwargs: Any,
        context: nn.module.InterceptorContext,
    ) -> Any:
        layer = context.module
        if not isinstance(layer, Einsum) or context.method_name != "contract":
            return method(*args, **kwargs)
        if not fits(self.pattern, layer):
            return method(*args, **kwargs)
        x, kernel, bias = args
        alpha = jax.lax.stop_gradient(mean_scale(kernel, layer.equation))
        if self.learned:
            kept, shape = alpha, alpha.shape
            axes = Axes.of(layer.equation).contracted
            scale = layer.param("scale", lambda key: jnp.squeeze(kept, axes))
            alpha = scale.reshape(shape)
        x = sign_ste(x) if self.binary_inputs else x
        return method(x, alpha * centred_sign(kernel, layer.equation), bias)


@dataclasses.dataclass(frozen=True)
class BinaryOperands:
    """An interceptor: queries, keys and values of attention that fits `pattern` are their signs.

    It acts on `Scores` and `Mix`, which a model has after `swap(model, Fused, Unfused)`. What is
    done to the probabilities between them is another interceptor's.
    """

    pattern: str

    def __call__(
        self,
        method: Callable[..., Any],
        args: Any,
        kwargs: Any,
        context: nn.module.InterceptorContext,
    ) -> Any:
        part = context.module
        if context.method_name == "__call__" and fits(self.pattern, part):
            if isinstance(part, Scores):
                q_BxLxHxK, k_BxSxHxK = args
                return method(sign_ste(q_BxLxHxK), sign_ste(k_BxSxHxK), **kwargs)
            if isinstance(part, Mix):
                p_BxHxLxS, v_BxSxHxK = args
                return method(p_BxHxLxS, sign_ste(v_BxSxHxK), **kwargs)
        return method(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class BinaryCost:
    """What one multiply-add of a product costs under `interceptors`, and how many bits a weight.

    64 products of bits are one operation; a binary weight leaves half of a multiply-add, the
    addition (OPs = BOPs / 64 + FLOPs, Liu et al. 2018, arXiv 1808.00278, section 4).
    """

    interceptors: tuple[Any, ...]

    def operations(self, product: Product) -> float:
        if not product.weights:
            operands = (found for found in self.interceptors if isinstance(found, BinaryOperands))
            fitting = any(re.search(found.pattern, product.path) for found in operands)
            return 1 / 64 if fitting else 1.0
        for found in self.interceptors:
            if isinstance(found, BinaryEinsum) and re.search(found.pattern, product.path):
                return 1 / 64 if found.binary_inputs else 1 / 2
        return 1.0

    def bits(self, product: Product) -> float:
        maps = (found for found in self.interceptors if isinstance(found, BinaryEinsum))
        return 1.0 if any(re.search(found.pattern, product.path) for found in maps) else 32.0
