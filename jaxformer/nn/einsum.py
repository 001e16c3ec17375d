"""`Einsum`: the one module in which an activation meets a weight matrix."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.kernels.target import target
from jaxformer.parallel.sharding import one_device

Initializer = jax.nn.initializers.Initializer
KernelInit = Callable[[str], Initializer]  # of an equation


class Axes(NamedTuple):
    """The named axes of an equation; further leading axes of x and the output are an ellipsis."""

    x: str
    kernel: str
    out: str

    @classmethod
    def of(cls, equation: str) -> Axes:
        """Read "...D,DHK->...HK"; the ellipsis may be left out."""
        match = re.fullmatch(r"(\.{3})?([A-Za-z]+),([A-Za-z]+)->(\.{3})?([A-Za-z]+)", equation)
        if match is None or match[1] != match[4]:
            raise ValueError(
                f"Einsum.equation={equation!r}: must read like '...D,DHK->...HK', x then kernel"
            )
        return cls(match[2], match[3], match[5])

    @property
    def bias(self) -> str:
        return "".join(axis for axis in self.out if axis in self.kernel)

    @property
    def contracted(self) -> tuple[int, ...]:
        """Which axes of the kernel are summed over; what is left is one per output channel."""
        return tuple(i for i, axis in enumerate(self.kernel) if axis not in self.out)


class Einsum(nn.Module):
    """`einsum(equation, x, kernel) + bias`: the equation names what is contracted.

    `Einsum("...D,DHK->...HK", (8, 64))` maps a width to 8 heads of 64. Axes of the kernel that x
    has (D) take their sizes from it, the others (H, K) from `features`, in the kernel's order.
    Axes of the kernel in both x and the output are separate maps. The fan-in of the initialiser
    is the product of the contracted axes; the bias has the kernel's axes that are in the output.

    Parameters are float32. The product is computed in `dtype`, by default that of x, so that the
    dtype of the residual stream decides; `out_dtype=float32` keeps the accumulator's precision.
    """

    equation: str
    features: tuple[int, ...]
    use_bias: bool = True
    dtype: Any = None
    out_dtype: Any = None
    kernel_init: Initializer | None = None  # None: normal, variance 1 / fan-in
    bias_init: Initializer = jax.nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes = Axes.of(self.equation)
        sizes = dict(zip(reversed(axes.x), reversed(x.shape), strict=False))
        new = [axis for axis in axes.kernel if axis not in axes.x]
        sizes.update(zip(new, self.features, strict=True))
        kernel_init = self.kernel_init or fan_in_normal(self.equation)
        kernel_shape = tuple(sizes[axis] for axis in axes.kernel)
        kernel = self.param("kernel", kernel_init, kernel_shape, jnp.float32)
        bias = None
        if self.use_bias:
            bias_shape = tuple(sizes[axis] for axis in axes.bias)
            bias = self.param("bias", self.bias_init, bias_shape, jnp.float32)
        return self.contract(x, kernel, bias)

    @property
    def contracted(self) -> tuple[int, ...]:
        """Which axes of the kernel are summed over."""
        return Axes.of(self.equation).contracted

    def contract(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        """The map with its operands in view: what quantisers and relevance rules intercept."""
        dtype = self.dtype or (x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.float32)
        sums = self.out_dtype
        if sums is None and dtype == jnp.bfloat16 and target().platform == "cpu":
            # XLA has fast bfloat16 products for CPUs, but only with float32 results: 9 ms for 75.
            sums = jnp.float32
        axes = Axes.of(self.equation)
        y = _product(axes, x.astype(dtype), kernel.astype(dtype), sums)
        y = y.astype(self.out_dtype or dtype)
        if bias is None:
            return y
        sizes = iter(bias.shape)
        aligned = tuple(next(sizes) if axis in axes.kernel else 1 for axis in axes.out)
        return y + bias.reshape(aligned).astype(y.dtype)


def _product(axes: Axes, x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """The einsum; on one CPU, where it is a product of two matrices, as that.

    A kernel's gradient sums over all leading axes of x. Where those are several, XLA for CPUs
    transposes the gradient of the output, and computes the whole backward pass up to there again
    as it does so: a step of three layers takes 83 ms for 52. On several devices the axes have to
    stay apart, for each may be divided.
    """
    if not (axes.kernel == axes.x + axes.out and target().platform == "cpu" and one_device()):
        equation = f"...{axes.x},{axes.kernel}->...{axes.out}"
        return jnp.einsum(equation, x, kernel, preferred_element_type=dtype)
    lead, features = x.shape[: x.ndim - len(axes.x)], kernel.shape[len(axes.x) :]
    contracted = math.prod(kernel.shape[: len(axes.x)])
    y = jnp.matmul(
        x.reshape(math.prod(lead), contracted),
        kernel.reshape(contracted, math.prod(features)),
        preferred_element_type=dtype,
    )
    return y.reshape(*lead, *features)


def fan_in_normal(equation: str, scale: float = 1.0) -> Initializer:
    """A truncated normal of variance scale / fan-in, the fan-in read from the equation."""
    return jax.nn.initializers.variance_scaling(
        scale, "fan_in", "truncated_normal", *_roles(equation)
    )


def xavier_uniform(equation: str, maps: int = 1) -> Initializer:
    """Uniform with variance 2 / (fan-in + fan-out) (Glorot & Bengio 2010, section 4.2).

    `maps` equal ones count as one map with so many times the outputs.
    """
    axes_in, axes_out, _ = _roles(equation)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        fan_in, fan_out = (math.prod(shape[i] for i in axes) for axes in (axes_in, axes_out))
        bound = math.sqrt(6 / (fan_in + maps * fan_out))
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _roles(equation: str) -> tuple[list[int], list[int], list[int]]:
    """The axes of a kernel: inputs, outputs, and those of separate maps."""
    axes = Axes.of(equation)
    role: dict[str, list[int]] = {"in": [], "out": [], "batch": []}
    for i, axis in enumerate(axes.kernel):
        shared = axis in axes.x and axis in axes.out
        role["batch" if shared else "in" if axis in axes.x else "out"].append(i)
    return role["in"], role["out"], role["batch"]
