"""Kernels as the matrices that they are: rows are outputs, columns inputs."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp

from jaxformer.errors import ConfigError
from jaxformer.nn.einsum import Axes
from jaxformer.parallel.sharding import PARAMETER_RULES, axes_of


def _axes(name: str, ndim: int) -> tuple[int, int]:
    """Leading axes of stacked layers, and where the outputs of a kernel begin."""
    contracted, _ = axes_of(name, ndim, PARAMETER_RULES) or (range(ndim - 1), ())
    return int("layers" in contracted), len(contracted)


def as_matrix(name: str, x: jax.Array) -> jax.Array:
    """The parameter `name` as (outputs, inputs), after an axis of layers if they are stacked.

    Tables stay as they are, and biases of heads become one row. Kernels whose name the library's
    rules do not know have their outputs along the last axis.
    """
    if re.search(r"(query|key|value)/bias$", name):
        return x.reshape(*x.shape[:-2], -1)
    if not name.endswith("/kernel"):
        return x
    stacked, split = _axes(name, x.ndim)
    order = (*range(stacked), *range(split, x.ndim), *range(stacked, split))
    layers, inputs = x.shape[:stacked], math.prod(x.shape[stacked:split])
    return jnp.transpose(x, order).reshape(*layers, -1, inputs)


def from_matrix(name: str, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `as_matrix`."""
    if not name.endswith("/kernel"):
        return matrix.reshape(shape)
    stacked, split = _axes(name, len(shape))
    outputs = len(shape) - split
    parts = (*shape[:stacked], *shape[split:], *shape[stacked:split])
    middle = stacked + outputs
    order = (*range(stacked), *range(middle, len(shape)), *range(stacked, middle))
    return jnp.transpose(matrix.reshape(parts), order)


class PlainMap:
    """An `Einsum` from all of the inputs to all of the outputs, read off its equation.

    Raises:
        ConfigError: the equation has other axes, or inputs and outputs in another order.
    """

    def __init__(self, equation: str) -> None:
        axes = Axes.of(equation)
        ins = [axis for axis in axes.kernel if axis not in axes.out]
        outs = [axis for axis in axes.kernel if axis not in axes.x]
        if "".join(ins) != axes.x or "".join(outs) != axes.out:
            raise ConfigError(
                f"Einsum.equation={equation!r}: is not a map of all inputs to outputs"
            )
        self.inputs, self.outputs = len(ins), len(outs)
        self._order = [axes.kernel.index(axis) for axis in (*outs, *ins)]

    def matrix(self, kernel: jax.Array) -> jax.Array:
        """(outputs, inputs)."""
        moved = jnp.transpose(kernel, self._order)
        return moved.reshape(math.prod(moved.shape[: self.outputs]), -1)

    def kernel(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The inverse: a kernel of that shape."""
        parts = tuple(shape[i] for i in self._order)
        back = [self._order.index(i) for i in range(len(shape))]
        return jnp.transpose(matrix.reshape(parts), back)

    def rows(self, x: jax.Array) -> jax.Array:
        """Inputs as (..., inputs)."""
        return x if self.inputs == 1 else x.reshape(*x.shape[: x.ndim - self.inputs], -1)
