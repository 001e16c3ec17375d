"""Quantised linear maps in whole numbers: products of int8 codes, sums in int32, one rescaling."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxformer.compress.intercepted import Intercepted, Wrapper
from jaxformer.compress.packed import KERNELS, MOST_BITS, Packed, pack_kernels, unpacked, widened
from jaxformer.compress.quantized import COLLECTION, Quantized, Rule, operands
from jaxformer.compress.quantizers import Symmetric, Uniform
from jaxformer.nn.einsum import Axes


class Codes(NamedTuple):
    """Values (code + offset) * scale: int8 codes, and int32 offsets in the shape of the scale."""

    code: jax.Array
    offset: jax.Array
    scale: jax.Array


def codes(quantizer: Uniform | Symmetric, x: jax.Array, state: Mapping[str, jax.Array]) -> Codes:
    """What the quantiser makes of x, for at most 8 bits.

    The values are those of the quantiser. Where its zero point is no whole number (RepQ-ViT takes
    means of such), clipped ones end at the last whole code, less than one step from its own.
    """
    scale, whole = state["scale"], jnp.round(x / state["scale"])
    if isinstance(quantizer, Symmetric):
        code = jnp.clip(whole, -quantizer.most - 1, quantizer.most)
        return Codes(code.astype(jnp.int8), jnp.zeros(scale.shape, jnp.int32), scale)
    zero = state["zero"]
    whole = jnp.clip(whole, jnp.ceil(-zero), jnp.floor(2**quantizer.bits - 1 - zero))
    offset = jnp.round(2 ** (quantizer.bits - 1) - zero)
    return Codes((whole - offset).astype(jnp.int8), offset.astype(jnp.int32), scale)


@dataclasses.dataclass(frozen=True)
class Integer(Quantized):
    """`Quantized` with linear maps in integers, for answers alone: no gradient passes.

    A map is computed so if its kernel is `Packed` in `params`, its input has uniform codes of at
    most 8 bits with one scale, and its kernel no axis of separate maps. All else is rounded and
    computed in floats. On a CPU core four of DeiT-S's blocks with 8 bits were so 1.06 times faster
    than rounded floats, and not faster than the float model (.95).
    """

    params: Any = dataclasses.field(default_factory=dict)

    def __call__(self, method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if operands(context) == ("input", "kernel"):
            rule, leaf = self.rule(module, "input"), at(self.params, (*module.path, "kernel"))
            if isinstance(leaf, Packed) and in_integers(module.equation, rule):
                x, _, bias = args
                state = module.get_variable(COLLECTION, "input")
                left = codes(rule.quantizer, x.astype(jnp.float32), state)  # type: ignore
                y = linear(module.equation, left, of_packed(leaf))
                return finished(module, y, bias, x.dtype)
        return super().__call__(method, args, kwargs, context)


def at(tree: Any, path: tuple[str, ...]) -> Any:
    """What lies at a path of nested dicts; None if nothing does."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def in_integers(equation: str, of_input: Rule | None) -> bool:
    """Whether a linear map whose input has that rule can be computed in integers."""
    axes = Axes.of(equation)
    return (
        not any(axis in axes.x and axis in axes.out for axis in axes.kernel)
        and of_input is not None
        and isinstance(of_input.quantizer, Uniform | Symmetric)
        and of_input.quantizer.bits <= MOST_BITS
        and of_input.per == "tensor"
        and not of_input.but
    )


def of_packed(leaf: Packed) -> Codes:
    """The codes of a kernel as they lie, moved to around 0."""
    half = 2 ** (leaf.codes.bits - 1)
    code = leaf.codes.unpack().astype(jnp.int16) - half
    return Codes(code.astype(jnp.int8), half - leaf.zero.astype(jnp.int32), leaf.scale)


def linear(equation: str, x: Codes, kernel: Codes) -> jax.Array:
    """The map without its bias, in float32: sums of (x + a) (w + b) = x w + b x + a w + a b."""
    axes, code = Axes.of(equation), kernel.code
    # Contracted axes first: a kernel of (inputs, outputs), as the product of integers wants it.
    order = (*axes.contracted, *(i for i in range(code.ndim) if i not in axes.contracted))
    inside = len(axes.contracted)
    count = math.prod(code.shape[i] for i in axes.contracted)
    outputs = [code.shape[i] for i in order[inside:]]

    def per_output(value: jax.Array) -> jax.Array:
        return jnp.broadcast_to(value.transpose(order)[(0,) * inside], outputs).reshape(-1)

    w_IxO = code.transpose(order).reshape(count, -1)
    x_XxI = x.code.reshape(*x.code.shape[: x.code.ndim - inside], count)
    a, b_O = x.offset.reshape(()), per_output(kernel.offset)
    contract = (((x_XxI.ndim - 1,), (0,)), ((), ()))
    y = jax.lax.dot_general(x_XxI, w_IxO, contract, preferred_element_type=jnp.int32)
    y += x_XxI.sum(-1, dtype=jnp.int32)[..., None] * b_O
    y += a * (w_IxO.sum(0, dtype=jnp.int32) + count * b_O)
    scaled = y.astype(jnp.float32) * (x.scale.reshape(()) * per_output(kernel.scale))
    return scaled.reshape(*x_XxI.shape[:-1], *outputs)


def finished(module: Any, y: jax.Array, bias: jax.Array | None, dtype: Any) -> jax.Array:
    """With the bias, in the dtype that the `Einsum` would have given."""
    y = y if bias is None else y + bias
    return y.astype(module.out_dtype or module.dtype or dtype)


@dataclasses.dataclass(frozen=True)
class QuantizedModel(Wrapper):
    """`model` with operands quantised by `rules`, of which kernels lie packed in the parameters."""

    rules: Quantized

    def init(self, *args: Any, **kwargs: Any) -> Any:
        made = Intercepted(self.model, (self.rules,)).init(*args, **kwargs)
        return pack_kernels(made, self.rules)

    def prepare(self, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        return widened(variables)

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        # What is unpacked is on its quantiser's grid already, and where it is not read as floats
        # the compiler leaves it out.
        rules = self.rules.without(KERNELS).rules
        model = Intercepted(self.model, (Integer(rules, variables["params"]),))
        return model.apply(unpacked(variables), *args, **kwargs)
