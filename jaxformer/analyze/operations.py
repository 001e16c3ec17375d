"""The matrix products of a model, one by one: what they cost by the kind of their operands."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

from jaxformer import paths
from jaxformer.nn.attention import Mix, Scores
from jaxformer.nn.conv import Conv
from jaxformer.nn.depthwise import DepthwiseConv
from jaxformer.nn.einsum import Einsum

MAPS = (Einsum, Conv, DepthwiseConv)
PICOJOULE_MAC, PICOJOULE_ADD = 4.6, 0.9  # of float32 at 45 nm (Horowitz 2014, ISSCC)


@dataclasses.dataclass(frozen=True)
class Product:
    """Multiply-adds of one module for one call of the model, and the weights it has for them."""

    path: str
    macs: int
    weights: int  # 0: both operands are activations


def products(model: Any, variables: Any, *args: Any, **kwargs: Any) -> list[Product]:
    """All `Einsum`s, convolutions, `Scores` and `Mix`es of `model.apply`, in their order.

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
    if isinstance(part, MAPS) and method == "contract":
        kernel = args[1]
        summed = math.prod(kernel.shape[axis] for axis in part.contracted)
        return y.size * summed, kernel.size
    if method != "__call__":
        return None
    if isinstance(part, Scores):
        return y.size * args[0].shape[-1], 0
    if isinstance(part, Mix):
        return y.size * args[0].shape[-1], 0
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


def spike_energy(found: Sequence[Product], spikes: Mapping[str, float]) -> float:
    """Millijoules: an addition for each spike that reaches a multiply-add, else the whole of it.

    `spikes` is, by path, how many spikes an input fires on average over all its steps.
    """
    picojoules = sum(
        product.macs * (PICOJOULE_ADD * spikes[product.path])
        if product.path in spikes
        else product.macs * PICOJOULE_MAC
        for product in found
    )
    return picojoules / 1e9
