"""The matrix products of a model, one by one: what they cost by the kind of their operands."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn

from jaxformer import paths
from jaxformer.nn.attention import Mix, Scores
from jaxformer.nn.depthwise import DepthwiseConv
from jaxformer.nn.einsum import Axes, Einsum


@dataclasses.dataclass(frozen=True)
class Product:
    """Multiply-adds of one module for one call of the model, and the weights it has for them."""

    path: str
    macs: int
    weights: int  # 0: both operands are activations


def products(model: Any, variables: Any, *args: Any, **kwargs: Any) -> list[Product]:
    """All `Einsum`s, `Scores`, `Mix`es and `DepthwiseConv`s of `model.apply`, in their order.

    Arguments may be `jax.ShapeDtypeStruct`s; nothing is computed. Layers under a scan count once,
    and fused attention is not seen: `swap(model, Fused, Unfused)`, and no `model.scan`.
    """
    found: list[Product] = []

    def watch(
        method: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        part, y = context.module, method(*args, **kwargs)
        cost = _cost(part, context.method_name, args, y)
        if cost is not None:
            found.append(Product("/".join(part.path), *cost))
        return y

    def call(variables: Any, args: Any) -> Any:
        with nn.intercept_methods(watch):
            return model.apply(variables, *args, **kwargs)

    jax.eval_shape(call, variables, args)
    return found


def _cost(part: nn.Module, method: str, args: Any, y: jax.Array) -> tuple[int, int] | None:
    """Multiply-adds and weights of a call, or None where it multiplies no matrix."""
    if isinstance(part, Einsum) and method == "contract":
        kernel = args[1]
        summed = math.prod(kernel.shape[axis] for axis in Axes.of(part.equation).contracted)
        return y.size * summed, kernel.size
    if method != "__call__":
        return None
    if isinstance(part, Scores):
        return y.size * args[0].shape[-1], 0
    if isinstance(part, Mix):
        return y.size * args[0].shape[-1], 0
    if isinstance(part, DepthwiseConv):
        return y.size * part.size**2, part.size**2 * y.shape[-1]
    return None


Rate = Callable[[Product], float]


def operations(found: Sequence[Product], rate: Rate) -> float:
    """Multiply-adds, each product's times what `rate` says that one of its own costs."""
    return sum(product.macs * rate(product) for product in found)


def megabytes(params: Any, found: Sequence[Product], bits: Rate) -> float:
    """The size of parameters in 10^6 bytes: float32 but for the weights of products.

    Those have as many bits as `bits` says.
    """
    whole = 32 * sum(leaf.size for leaf in paths.leaves(params).values())
    saved = sum(product.weights * (32 - bits(product)) for product in found)
    return (whole - saved) / 8e6
