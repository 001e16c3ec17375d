"""Matrices as products of sparse and small dense ones: their form, their size and their use.

DSFormer (arXiv 2312.13211): a matrix W (outputs, inputs) is cut into blocks (p, q), and every row
of a block is a combination of s rows of the block's own basis, W_b = S D with D (r, q) and s
values in each row of S (p, r). `jaxformer.compress.factorize` finds them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxformer.errors import ConfigError

MANY = 16  # rows from which factors are applied by dense products


@dataclasses.dataclass(frozen=True)
class FactorSpec:
    """Blocks (p, q), with r rows in a basis and s values in each row of S.

    `rows` None is p = all outputs. With `group` m the r columns of S are cut into groups of m,
    each of which holds s m / r of a row's values (n:m sparsity).
    """

    columns: int = 64  # q
    atoms: int = 96  # r
    nonzeros: int = 8  # s
    rows: int | None = None  # p
    group: int | None = None

    def check(self, outputs: int, inputs: int, name: str = "matrix") -> None:
        """Hold a spec to a matrix.

        Raises:
            ConfigError: blocks that do not divide it, or more values than a basis has rows.
        """
        p, q = self.rows or outputs, self.columns
        if q < 1 or inputs % q:
            raise ConfigError(f"{name}: columns={q} must divide its {inputs} inputs")
        if p < 1 or outputs % p:
            raise ConfigError(f"{name}: rows={p} must divide its {outputs} outputs")
        if not 1 <= self.nonzeros <= self.atoms:
            raise ConfigError(
                f"{name}: nonzeros={self.nonzeros} must be from 1 to the atoms={self.atoms}"
            )
        if self.atoms > 2**31 - 1:
            raise ConfigError(f"{name}: atoms={self.atoms} have no indices of 32 bits")
        m = self.group
        if m is not None and (self.atoms % m or self.nonzeros * m % self.atoms):
            raise ConfigError(
                f"{name}: group={m} must divide atoms={self.atoms} and give each group a whole "
                f"number of the {self.nonzeros} nonzeros"
            )

    @property
    def index_bits(self) -> int:
        """Of a place among all rows of the basis, or in its own group of them."""
        return max(1, math.ceil(math.log2(self.group or self.atoms)))

    def groups(self) -> jax.Array:
        """The first place of the group of each of a row's values (s,), if they are in order."""
        m = self.group or self.atoms
        return jnp.arange(self.nonzeros) // (self.nonzeros * m // self.atoms) * m


class Size(NamedTuple):
    """What a factorised matrix takes."""

    values: int  # of the bases and of S
    index_bits: int
    bits: int
    macs: int  # multiplications for one input

    def ratio(self, outputs: int, inputs: int, word: int = 32) -> float:
        """How many times smaller than the dense matrix in words of so many bits."""
        return outputs * inputs * word / self.bits


def size_of(spec: FactorSpec, outputs: int, inputs: int, word: int = 32) -> Size:
    """All blocks of a matrix: r q + p s values and p s indices each."""
    p, q, r, s = spec.rows or outputs, spec.columns, spec.atoms, spec.nonzeros
    blocks = (outputs // p) * (inputs // q)
    values = blocks * (r * q + p * s)
    index_bits = blocks * p * s * spec.index_bits
    return Size(values, index_bits, values * word + index_bits, blocks * (r * q + p * s))


class Factors(NamedTuple):
    """D (blocks, r, q), the values of S (blocks, p, s) and where they are (blocks, p, s)."""

    basis: jax.Array
    values: jax.Array
    indices: jax.Array


def cut(w: jax.Array, spec: FactorSpec) -> jax.Array:
    """A matrix (outputs, inputs) as blocks (blocks, p, q), those of one row of blocks together."""
    outputs, inputs = w.shape
    p, q = spec.rows or outputs, spec.columns
    return w.reshape(outputs // p, p, inputs // q, q).swapaxes(1, 2).reshape(-1, p, q)


def paste(blocks: jax.Array, outputs: int) -> jax.Array:
    """The inverse of `cut`."""
    count, p, q = blocks.shape
    across = count * p // outputs
    return blocks.reshape(outputs // p, across, p, q).swapaxes(1, 2).reshape(outputs, across * q)


def sparse(values: jax.Array, indices: jax.Array, atoms: int) -> jax.Array:
    """S (p, r) of its values and indices (p, s)."""
    rows = jnp.arange(values.shape[0])[:, None]
    return jnp.zeros((values.shape[0], atoms), values.dtype).at[rows, indices].add(values)


def product(factors: Factors) -> jax.Array:
    """The blocks S D (blocks, p, q)."""
    atoms = factors.basis.shape[-2]
    s = jax.vmap(lambda v, i: sparse(v, i, atoms))(factors.values, factors.indices)
    return jnp.einsum("bpr,brq->bpq", s, factors.basis)


def materialise(factors: Factors, outputs: int) -> jax.Array:
    """The matrix (outputs, inputs)."""
    return paste(product(factors), outputs)


def apply_factors(factors: Factors, x: jax.Array, outputs: int) -> jax.Array:
    """The matrix times x (..., inputs): z = D x, then s entries of z for each output.

    For many rows of x gathering took four times as long as the dense matrix on a CPU, at half of
    its FLOPs: S and D are then `two_products`, or S D is one.
    """
    if math.prod(x.shape[:-1]) >= MANY:
        if two_products(factors):
            return apply_expanded(factors.basis, expand(factors, outputs), x)
        return x @ materialise(factors, outputs).T
    (count, r, q), p = factors.basis.shape, factors.values.shape[1]
    across = count * p // outputs
    x = x.reshape(*x.shape[:-1], across, q)
    basis = factors.basis.reshape(-1, across, r, q)
    z = jnp.einsum("...cq,dcrq->...dcr", x, basis)
    indices = factors.indices.reshape(basis.shape[0], across, p, -1)
    values = factors.values.reshape(indices.shape)
    taken = jnp.take_along_axis(
        z[..., None, :], jnp.broadcast_to(indices, (*z.shape[:-1], *indices.shape[-2:])), -1
    )
    y = jnp.einsum("...dcps,dcps->...dp", taken, values)
    return y.reshape(*y.shape[:-2], outputs)


def two_products(factors: Factors) -> bool:
    """Whether x D^T S^T takes fewer multiplications than x (S D)^T, with S dense."""
    (_, r, q), p = factors.basis.shape, factors.values.shape[1]
    return r * (p + q) < p * q


def expand(factors: Factors, outputs: int) -> jax.Array:
    """S of every row of blocks as one matrix (outputs / p, inputs r / q, p), zeros and all."""
    (count, r, _), p = factors.basis.shape, factors.values.shape[1]
    dense = jnp.zeros((count, r, p), factors.values.dtype)
    for j in range(factors.values.shape[-1]):  # a scatter took four times as long on a CPU
        here = factors.indices[:, None, :, j] == jnp.arange(r)[:, None]
        dense += jnp.where(here, factors.values[:, None, :, j], 0.0)
    return dense.reshape(outputs // p, -1, p)


def apply_expanded(basis: jax.Array, expanded: jax.Array, x: jax.Array) -> jax.Array:
    """The matrix of a basis (blocks, r, q) and an expanded S times x (..., inputs).

    x is brought into slices before D: left to the product, or cut one by one, that took twice as
    long on a CPU, with the activation before it computed in pieces.
    """
    down, _, p = expanded.shape
    r, q = basis.shape[1:]
    x_CxNxQ = x.reshape(-1, x.shape[-1] // q, q).swapaxes(0, 1)
    basis = basis.reshape(down, -1, r, q)
    z = [jnp.einsum("cnq,crq->cnr", x_CxNxQ, d).swapaxes(0, 1) for d in basis]
    y = [part.reshape(part.shape[0], -1) @ s for part, s in zip(z, expanded, strict=True)]
    return jnp.concatenate(y, axis=1).reshape(*x.shape[:-1], down * p)
