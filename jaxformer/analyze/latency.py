"""How long a Transformer block of given widths takes: a formula, a table, a clock.

A latency is a function of `Widths` whose fields may be arrays that broadcast: traced, so that a
search can ask for it inside a jitted step. Units are its own; only differences and ratios matter.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import Full
from jaxformer.nn.attention import Attention
from jaxformer.nn.block import Block
from jaxformer.nn.make import Make
from jaxformer.nn.mlp import MLP

FULL = Full()


class Widths(NamedTuple):
    """Of a block: the stream's, heads, of a head of queries and of values, of the MLP."""

    embedding: Any
    heads: Any
    qk: Any
    value: Any
    mlp: Any


class Latency(Protocol):
    def __call__(self, widths: Widths) -> jax.Array: ...


def multiply_adds(widths: Widths, tokens: int) -> jax.Array:
    """Of a block on `tokens` tokens."""
    e, h, qk, v, m = widths
    projections = e * h * (2.0 * qk + 2.0 * v) + 2.0 * e * m
    return tokens * projections + tokens**2 * h * (1.0 * qk + v)


def activations(widths: Widths, tokens: int) -> jax.Array:
    """Numbers that a block writes: stream, queries, keys, values and scores, hidden units."""
    e, h, qk, v, m = widths
    return tokens * (4.0 * e + h * (2.0 * qk + 2.0 * v) + 2.0 * m) + tokens**2 * (2.0 * h)


@dataclasses.dataclass(frozen=True)
class Analytic:
    """start + per_multiply_add x multiply-adds + per_activation x numbers written: a stand-in.

    Defaults are a device of 10^13 multiply-adds and 10^12 bytes in a second: seconds for one image.
    """

    tokens: int
    start: float = 0.0
    per_multiply_add: float = 1e-13
    per_activation: float = 4e-12

    def __call__(self, widths: Widths) -> jax.Array:
        return (
            self.start
            + self.per_multiply_add * multiply_adds(widths, self.tokens)
            + self.per_activation * activations(widths, self.tokens)
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Measured latencies on a grid, interpolated linearly in each width (multilinear).

    `grid` has the ascending values of each width, `values` one number for each of their products.

    Raises:
        ConfigError: a number is missing.
    """

    grid: Widths
    values: np.ndarray

    def __post_init__(self) -> None:
        shape = tuple(len(axis) for axis in self.grid)
        values = np.asarray(self.values, np.float64)
        if values.shape != shape:
            raise ConfigError(
                f"latency.values: has the shape {values.shape}, the grid has {shape} points"
            )
        for name, axis in zip(Widths._fields, self.grid, strict=True):
            if len(axis) < 2 or any(b <= a for a, b in itertools.pairwise(axis)):
                raise ConfigError(f"latency.grid.{name}={axis}: must be two or more that ascend")
        missing = np.argwhere(~np.isfinite(values))
        if len(missing):
            at = [axis[i] for axis, i in zip(self.grid, missing[0], strict=True)]
            raise ConfigError(
                f"latency.values: {len(missing)} points of the grid are missing, such as {at}; "
                "measure them"
            )

    @classmethod
    def load(cls, path: str | Path) -> Table:
        """Of an .npz with "values" and an array for each width, by its name."""
        with np.load(path) as file:
            missing = {"values", *Widths._fields} - set(file.files)
            if missing:
                raise ConfigError(f"latency: {path} lacks {', '.join(sorted(missing))}")
            return cls(Widths(*(file[name].tolist() for name in Widths._fields)), file["values"])

    def save(self, path: str | Path) -> None:
        np.savez(path, values=self.values, **self.grid._asdict())

    def check(self, widths: Widths) -> None:
        """Raise a `ConfigError` for concrete widths that are outside of the grid."""
        for name, axis, width in zip(Widths._fields, self.grid, widths, strict=True):
            if np.min(width) < axis[0] or np.max(width) > axis[-1]:
                raise ConfigError(
                    f"latency.grid.{name}: goes from {axis[0]} to {axis[-1]}, the model has "
                    f"{np.max(width)}; measure a larger grid"
                )

    def __call__(self, widths: Widths) -> jax.Array:
        low, part = [], []
        for axis, width in zip(self.grid, widths, strict=True):
            points = jnp.asarray(axis, jnp.float32)
            width = jnp.asarray(width, jnp.float32)
            i = jnp.clip(jnp.searchsorted(points, width, side="right") - 1, 0, len(axis) - 2)
            low.append(i)
            part.append((width - points[i]) / (points[i + 1] - points[i]))
        values = jnp.asarray(self.values, jnp.float32)
        total = jnp.zeros(())
        for corner in itertools.product((0, 1), repeat=len(low)):
            weight = jnp.ones(())
            for bit, p in zip(corner, part, strict=True):
                weight = weight * (p if bit else 1 - p)
            total = total + weight * values[tuple(i + b for i, b in zip(low, corner, strict=True))]
        return total


def measured(grid: Widths, time_of: Callable[[Widths], float]) -> Table:
    """The table of a grid, each point timed by `time_of`; a point without a width takes no time."""
    shape = tuple(len(axis) for axis in grid)
    values = np.zeros(shape)
    for index in np.ndindex(shape):
        widths = Widths(*(axis[i] for axis, i in zip(grid, index, strict=True)))
        if min(widths) > 0:
            values[index] = time_of(widths)
    return Table(grid, values)


@dataclasses.dataclass(frozen=True)
class TimedBlock:
    """Seconds that a jitted pre-norm block takes here: the median of `repeats` calls."""

    tokens: int
    batch: int = 1
    dtype: str = "float32"
    repeats: int = 20

    def block(self, widths: Widths) -> Block:
        e, h, qk, v, m = (int(width) for width in widths)
        del e
        mixer = Make(Attention, heads=h, head_size=qk, value_size=v, scale=qk**-0.5)
        return Block(mixer, Make(MLP, hidden=m))

    def clock(self, widths: Widths) -> Callable[[], float]:
        """What times one call of the block, compiled."""
        block = self.block(widths)
        x = jnp.ones((self.batch, self.tokens, int(widths.embedding)), self.dtype)
        variables = jax.jit(lambda x: block.init(jax.random.key(0), x, mask=FULL))(x)
        call = jax.jit(lambda v, x: block.apply(v, x, mask=FULL))
        jax.block_until_ready(call(variables, x))

        def once() -> float:
            start = time.perf_counter()
            jax.block_until_ready(call(variables, x))
            return time.perf_counter() - start

        return once

    def __call__(self, widths: Widths) -> float:
        once = self.clock(widths)
        return float(np.median([once() for _ in range(self.repeats)]))


def total(latency: Latency, blocks: Sequence[Widths]) -> jax.Array:
    """Of all blocks together."""
    stacked = Widths(
        *(jnp.stack([jnp.asarray(x, jnp.float32) for x in f]) for f in zip(*blocks, strict=True))
    )
    return jnp.sum(latency(stacked))
