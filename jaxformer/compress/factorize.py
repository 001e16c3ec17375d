"""Finding factors: sparse coding, dictionaries, the best spec of a ratio, and two thin matrices.

DSFormer (arXiv 2312.13211), in the form of `jaxformer.compress.factors`. All functions are batched
over blocks and have fixed shapes.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxformer.compress.factors import Factors, FactorSpec, cut, materialise, size_of, sparse
from jaxformer.errors import ConfigError

RIDGE = 1e-6  # of the least squares for a basis, in units of its mean diagonal
TINY = 1e-12


# ------------------------------------------------------------------------------- sparse coding


def pursue(
    w: jax.Array, basis: jax.Array, nonzeros: int, group: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Orthogonal matching pursuit (Pati et al. 1993) of every row of w (p, q).

    Values and indices (p, s): s times the row of the basis (r, q), normalised, that the rest is
    most correlated with, and least squares on all of those taken, by Gram-Schmidt.
    """
    return _pursue(w, basis, nonzeros, None, group)


def refit(w: jax.Array, basis: jax.Array, indices: jax.Array) -> jax.Array:
    """Values (p, s) of least squares on rows of the basis that are given."""
    return _pursue(w, basis, indices.shape[-1], indices, None)[0]


def _pursue(
    w: jax.Array, basis: jax.Array, nonzeros: int, given: jax.Array | None, group: int | None
) -> tuple[jax.Array, jax.Array]:
    (p, q), r, s = w.shape, basis.shape[0], nonzeros
    norm = jnp.linalg.norm(basis, axis=1)
    unit = basis / jnp.maximum(norm, TINY)[:, None]
    rows = jnp.arange(p)

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rest, directions, triangle, amount, indices, open_ = carry
        if given is None:
            score = jnp.where(open_, jnp.abs(rest @ unit.T), -1.0)
            chosen = score.argmax(1)
        else:
            chosen = given[:, i]
        atom = unit[chosen]
        # Twice, so that directions stay orthogonal in float32.
        along = jnp.einsum("pq,psq->ps", atom, directions)
        new = atom - jnp.einsum("ps,psq->pq", along, directions)
        again = jnp.einsum("pq,psq->ps", new, directions)
        new, along = new - jnp.einsum("ps,psq->pq", again, directions), along + again
        length = jnp.linalg.norm(new, axis=1)
        free = length > 1e-5  # the atom is no combination of those taken before
        new = jnp.where(free[:, None], new / jnp.maximum(length, TINY)[:, None], 0.0)
        share = (rest * new).sum(1)
        triangle = triangle.at[:, i, :].set(along.at[:, i].set(jnp.where(free, length, 1.0)))
        open_ = open_.at[rows, chosen].set(False)
        if group is not None:
            m, each = group, s * group // r
            taken = (~open_).reshape(p, -1, m).sum(-1) >= each
            open_ = open_ & ~jnp.repeat(taken, m, axis=1)
        return (
            rest - share[:, None] * new,
            directions.at[:, i].set(new),
            triangle,
            amount.at[:, i].set(share),
            indices.at[:, i].set(chosen),
            open_,
        )

    start = (
        w,
        jnp.zeros((p, s, q), w.dtype),
        jnp.zeros((p, s, s), w.dtype),
        jnp.zeros((p, s), w.dtype),
        jnp.zeros((p, s), jnp.int32),
        jnp.ones((p, r), bool),
    )
    _, _, triangle, amount, indices, _ = jax.lax.fori_loop(0, s, step, start)

    def back(j: jax.Array, values: jax.Array) -> jax.Array:
        i = s - 1 - j
        known = jnp.einsum("ps,ps->p", values, triangle[:, :, i])
        return values.at[:, i].set((amount[:, i] - known) / triangle[:, i, i])

    values = jax.lax.fori_loop(0, s, back, jnp.zeros_like(amount))
    return values / jnp.maximum(norm, TINY)[indices], indices


def row_errors(w: jax.Array, basis: jax.Array, values: jax.Array, indices: jax.Array) -> jax.Array:
    """Squared errors (p,)."""
    return jnp.square(w - sparse(values, indices, basis.shape[0]) @ basis).sum(1)


def update_basis(
    w: jax.Array, basis: jax.Array, values: jax.Array, indices: jax.Array, weight: jax.Array
) -> jax.Array:
    """The basis of least squares for these values, rows of w (p, q) weighted by `weight` (p,).

    Rows of the basis that nothing uses become the worst reconstructed rows of w.
    """
    r = basis.shape[0]
    s = sparse(values, indices, r)
    gram = (s * weight[:, None]).T @ s
    used = jnp.diagonal(gram) > 0
    ridge = RIDGE * jnp.maximum(jnp.trace(gram) / r, TINY)
    solved = jax.scipy.linalg.solve(
        gram + ridge * jnp.eye(r, dtype=w.dtype), (s * weight[:, None]).T @ w, assume_a="pos"
    )
    better = jnp.square(w - s @ solved).sum(1) * weight
    before = jnp.square(w - s @ basis).sum(1) * weight
    solved = jnp.where(better.sum() <= before.sum(), solved, basis)
    worst = jnp.argsort(-row_errors(w, solved, values, indices) * weight)
    seed = w[worst[jnp.mod(jnp.cumsum(~used) - 1, w.shape[0])]]
    return jnp.where(used[:, None], solved, seed)


def alternate(
    w: jax.Array, factors: Factors, spec: FactorSpec, weight: jax.Array | None = None
) -> Factors:
    """One round on blocks w (blocks, p, q): codes, the old ones where better, then the basis."""
    weight = jnp.ones(w.shape[:2], w.dtype) if weight is None else weight

    def one(w: jax.Array, factors: Factors, weight: jax.Array) -> Factors:
        basis, values, indices = factors
        old = refit(w, basis, indices)
        new_values, new_indices = pursue(w, basis, spec.nonzeros, spec.group)
        errors = (
            row_errors(w, basis, v, i) for v, i in ((new_values, new_indices), (old, indices))
        )
        better = jnp.less(*errors)[:, None]
        values = jnp.where(better, new_values, old)
        indices = jnp.where(better, new_indices, indices)
        return Factors(update_basis(w, basis, values, indices, weight), values, indices)

    return jax.vmap(one)(w, factors, weight)


@functools.partial(jax.jit, static_argnames=("spec", "rounds"))
def factorise(
    w: jax.Array,
    spec: FactorSpec,
    *,
    key: jax.Array,
    rounds: int = 10,
    weight: jax.Array | None = None,
    gram: jax.Array | None = None,
) -> Factors:
    """Factors of a matrix (outputs, inputs), by alternation from random rows of it.

    Indices are in order in each row.

    `weight` (outputs,) is how much each row's error matters, such as its Fisher information.
    `gram` (inputs, inputs), of the layer's inputs, minimises the error of outputs instead of that
    of weights: blocks W_b L of its diagonal blocks L L^T are factorised, and the basis is taken
    back by L^-1.
    """
    spec.check(*w.shape)
    blocks, outputs = cut(w, spec), w.shape[0]
    count, p, q = blocks.shape
    root = None
    if gram is not None:
        across = w.shape[1] // q
        parts = gram.reshape(across, q, across, q)[jnp.arange(across), :, jnp.arange(across), :]
        ridge = 1e-4 * jnp.trace(parts, axis1=1, axis2=2)[:, None, None] / q * jnp.eye(q)
        root = jnp.tile(jnp.linalg.cholesky(parts + ridge), (outputs // p, 1, 1))
        blocks = blocks @ root
    # Blocks of very different size are alike for what follows.
    size = jnp.sqrt(jnp.square(blocks).mean((1, 2), keepdims=True))
    size = jnp.where(size == 0, 1.0, size)
    blocks = blocks / size
    weights = None
    if weight is not None:
        weight = weight / jnp.maximum(weight.mean(), TINY)
        weights = jnp.repeat(weight.reshape(outputs // p, 1, p), count * p // outputs, 1)
        weights = weights.reshape(count, p)

    def rows(key: jax.Array) -> jax.Array:
        """Random rows of a block, with some noise where there are too few."""
        order = jax.random.permutation(key, max(p, spec.atoms))[: spec.atoms]
        return order % p, 0.1 * (order >= p)

    keys = jax.random.split(key, (count, 2))
    order, noise = jax.vmap(rows)(keys[:, 0])
    drawn = jax.vmap(lambda k: jax.random.normal(k, (spec.atoms, q)))(keys[:, 1])
    basis = jnp.take_along_axis(blocks, order[..., None], 1) + noise[..., None] * drawn
    pursued = jax.vmap(lambda w, d: pursue(w, d, spec.nonzeros, spec.group))(blocks, basis)
    start = Factors(basis, *pursued)
    factors = jax.lax.fori_loop(0, rounds, lambda _, f: alternate(blocks, f, spec, weights), start)
    indices = jnp.sort(factors.indices, -1)
    values = jax.vmap(refit)(blocks, factors.basis, indices)
    basis, values = factors.basis, values * size
    if root is not None:
        basis = jnp.linalg.solve(root.swapaxes(1, 2), basis.swapaxes(1, 2)).swapaxes(1, 2)
    return Factors(basis, values, indices)


def choose(
    w: jax.Array, ratio: float, *, columns: int = 64, name: str = "matrix", rounds: int = 3
) -> FactorSpec:
    """Of the specs that make a matrix so many times smaller, the one with the least error.

    r is one of q / 2, q, 3 q / 2, 2 q, and s the largest that the ratio allows.

    Raises:
        ConfigError: none does.
    """
    outputs, inputs = w.shape
    found = []
    for atoms in (columns // 2, columns, 3 * columns // 2, 2 * columns):
        spec = FactorSpec(columns, max(atoms, 1), 1)
        spec.check(outputs, inputs, name)
        budget = outputs * inputs * 32 / ratio
        one, none = size_of(spec, outputs, inputs), spec.atoms * inputs * 32
        nonzeros = min(spec.atoms, int((budget - none) / (one.bits - none)))
        if nonzeros >= 1:
            spec = dataclasses.replace(spec, nonzeros=nonzeros)
            factors = factorise(w, spec, key=jax.random.key(0), rounds=rounds)
            error = jnp.square(w - materialise(factors, outputs)).sum()
            found.append((float(error), spec))
    if not found:
        raise ConfigError(
            f"{name}: a ratio of {ratio} is out of reach with columns={columns}; give a smaller one"
        )
    return min(found, key=lambda pair: pair[0])[1]


# ------------------------------------------------------------------------------ two thin matrices


def rank_for(outputs: int, inputs: int, ratio: float) -> int:
    """The rank at which two thin matrices are so many times smaller.

    Raises:
        ConfigError: not even rank 1 is.
    """
    rank = int(outputs * inputs / (ratio * (outputs + inputs)))
    if rank < 1:
        raise ConfigError(f"ratio={ratio}: is out of reach for a matrix {outputs} x {inputs}")
    return rank


def low_rank(
    w: jax.Array, rank: int, weight: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(outputs, rank) and (rank, inputs) by the singular values of w.

    With `weight` (outputs,), how much each row matters, those of sqrt(weight) w: the
    Fisher-weighted SVD (Hsu et al. 2022, arXiv 2207.00112, eq. 7).
    """
    scale = jnp.ones(w.shape[0]) if weight is None else jnp.sqrt(jnp.maximum(weight, TINY))
    u, sigma, vt = jnp.linalg.svd(w * scale[:, None], full_matrices=False)
    root = jnp.sqrt(sigma[:rank])
    return u[:, :rank] * root / scale[:, None], root[:, None] * vt[:rank]
