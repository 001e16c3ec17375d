"""Sparse times dense factors, thin factors: the identities of DSFormer."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import orthogonal_mp

from jaxformer.compress import factorize
from jaxformer.compress.factorize import (
    alternate,
    choose,
    factorise,
    low_rank,
    pursue,
    rank_for,
    refit,
)
from jaxformer.compress.factors import (
    MANY,
    Factors,
    FactorSpec,
    apply_factors,
    cut,
    materialise,
    paste,
    product,
    size_of,
    sparse,
)

KEY = jax.random.key(0)


def gaussian(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def relative(w, found):
    return float(jnp.square(w - found).sum() / jnp.square(w).sum())


# -------------------------------------------------------------------------------- sparse coding


@pytest.mark.parametrize(("r", "q", "s"), [(24, 16, 5), (12, 16, 1), (10, 20, 10)])
def test_pursuit_equals_scikit_learn(r, q, s):
    w, basis = gaussian((30, q), 1), gaussian((r, q), 2)
    values, indices = jax.jit(pursue, static_argnums=2)(w, basis, s)
    dense = np.asarray(sparse(values, indices, r))
    norm = np.linalg.norm(basis, axis=1)
    unit = np.asarray(basis, np.float64) / norm[:, None]
    wanted = orthogonal_mp(unit.T, np.asarray(w, np.float64).T, n_nonzero_coefs=s).T / norm
    np.testing.assert_array_equal(dense != 0, wanted != 0)
    np.testing.assert_allclose(dense, wanted, atol=1e-5 * np.abs(wanted).max())


def test_with_an_orthonormal_basis_pursuit_keeps_the_largest_products():
    basis = jnp.linalg.qr(gaussian((16, 16), 3))[0].T
    w = gaussian((20, 16), 4)
    values, indices = pursue(w, basis, 4)
    products = np.asarray(w @ basis.T)
    for row in range(20):
        kept = np.argsort(-np.abs(products[row]))[:4]
        assert set(np.asarray(indices[row]).tolist()) == set(kept.tolist())
        np.testing.assert_allclose(values[row], products[row][indices[row]], atol=1e-5)


@pytest.mark.parametrize("group", [None, 4])
def test_every_row_has_its_number_of_values_in_different_places(group):
    spec = FactorSpec(columns=16, atoms=24, nonzeros=6, rows=8, group=group)
    factors = factorise(gaussian((16, 32)), spec, key=KEY, rounds=2)
    assert factors.basis.shape == (4, 24, 16) and factors.values.shape == (4, 8, 6)
    indices = np.asarray(factors.indices)
    assert indices.min() >= 0 and indices.max() < 24
    assert all(len(set(row)) == 6 for block in indices for row in block)
    if group:
        counts = np.stack([(indices // 4 == g).sum(-1) for g in range(6)])
        assert (counts == 1).all()  # 6 values in 6 groups of 4


def test_least_squares_on_a_support():
    w, basis = gaussian((9, 16), 5), gaussian((12, 16), 6)
    indices = jnp.asarray(
        np.stack([np.random.default_rng(i).permutation(12)[:4] for i in range(9)])
    )
    values = refit(w, basis, indices)
    for row in range(9):
        wanted = np.linalg.lstsq(np.asarray(basis[indices[row]]).T, np.asarray(w[row]), rcond=None)
        np.testing.assert_allclose(values[row], wanted[0], atol=1e-4)


def test_an_atom_that_is_there_twice_gives_no_infinities():
    basis = jnp.tile(gaussian((2, 8), 7), (3, 1))
    values, indices = pursue(gaussian((5, 8), 8), basis, 4)
    assert np.isfinite(values).all()
    assert np.isfinite(product(Factors(basis[None], values[None], indices[None]))).all()


# --------------------------------------------------------------------------------- alternation


def test_error_does_not_grow():
    w, spec = gaussian((48, 32)), FactorSpec(columns=16, atoms=12, nonzeros=3)
    factors = factorise(w, spec, key=KEY, rounds=0)
    blocks, errors = cut(w, spec), []
    step = jax.jit(alternate, static_argnums=2)
    for _ in range(8):
        errors.append(float(jnp.square(blocks - product(factors)).sum()))
        factors = step(blocks, factors, spec)
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_a_full_basis_reconstructs_exactly():
    w = gaussian((40, 16))
    spec = FactorSpec(columns=16, atoms=16, nonzeros=16)
    found = materialise(factorise(w, spec, key=KEY, rounds=2), 40)
    np.testing.assert_allclose(found, w, atol=1e-5 * float(jnp.abs(w).max()) * 10)


def test_no_better_than_the_best_of_its_rank():
    """S = r = k in one block spans k dimensions: Eckart and Young."""
    w, k = gaussian((40, 16)), 5
    spec = FactorSpec(columns=16, atoms=k, nonzeros=k)
    found = materialise(factorise(w, spec, key=KEY, rounds=30), 40)
    best = np.square(np.linalg.svd(w, compute_uv=False)[k:]).sum() / np.square(w).sum()
    assert np.linalg.matrix_rank(found, tol=1e-3) == k
    assert best * (1 - 1e-5) <= relative(w, found) <= best * 1.1


def test_unused_rows_of_a_basis_become_the_worst_rows():
    w = gaussian((10, 8))
    values, indices = jnp.ones((10, 1)), jnp.zeros((10, 1), jnp.int32)
    basis = factorize.update_basis(w, gaussian((3, 8), 2), values, indices, jnp.ones(10))
    np.testing.assert_allclose(basis[0], w.mean(0), atol=1e-4)
    error = np.square(np.asarray(w - w.mean(0))).sum(1)
    for i, row in enumerate(np.argsort(-error)[:2]):
        np.testing.assert_array_equal(basis[1 + i], w[row])


def test_rows_that_matter_more_are_better():
    w, spec = gaussian((64, 16)), FactorSpec(columns=16, atoms=8, nonzeros=2)
    weight = jnp.where(jnp.arange(64) < 16, 50.0, 1.0)

    def error(**more):
        found = materialise(factorise(w, spec, key=KEY, rounds=10, **more), 64)
        return float(jnp.square(w - found)[:16].sum())

    assert error(weight=weight) < 0.8 * error()


def test_inputs_are_whitened():
    w, spec = gaussian((48, 32)), FactorSpec(columns=16, atoms=12, nonzeros=3)
    plain = factorise(w, spec, key=KEY)
    same = factorise(w, spec, key=KEY, gram=jnp.eye(32))
    np.testing.assert_allclose(materialise(plain, 48), materialise(same, 48), atol=2e-3)
    # Strongly different directions, s = r: the best subspace of the outputs.
    scale = jnp.exp(jnp.linspace(-3, 3, 32))
    x = (gaussian((200, 32), 5) * scale) @ jnp.linalg.qr(gaussian((32, 32), 6))[0]
    spec = FactorSpec(columns=32, atoms=6, nonzeros=6)

    def error(**more):
        found = materialise(factorise(w, spec, key=KEY, rounds=30, **more), 48)
        return float(jnp.square((w - found) @ x.T).sum())

    assert error(gram=x.T @ x) <= 1.01 * error()
    assert error(gram=x.T @ x) < 0.5 * error()


# ------------------------------------------------------------------------------ use and accounts


@pytest.mark.parametrize("rows", [None, 8])
@pytest.mark.parametrize(("count", "atoms"), [(5, 10), (MANY, 10), (MANY, 3)])
def test_factored_and_materialised_products_agree(count, atoms, rows):
    """By gathering, by one dense product, by two."""
    w, spec = gaussian((24, 32)), FactorSpec(columns=8, atoms=atoms, nonzeros=3, rows=rows)
    factors = factorise(w, spec, key=KEY, rounds=1)
    x = gaussian((2, count, 32), 9)
    wanted = x @ materialise(factors, 24).T
    np.testing.assert_allclose(apply_factors(factors, x, 24), wanted, atol=1e-5)
    np.testing.assert_array_equal(paste(cut(w, spec), 24), w)


def test_sizes_add_up():
    for (r, s), wanted in {(128, 16): 2.1, (96, 12): 2.8, (96, 8): 3.6}.items():
        spec = FactorSpec(64, r, s)
        size = size_of(spec, 768, 64)
        assert size.values == r * 64 + 768 * s and size.macs == size.values
        assert size.index_bits == 768 * s * 7
        assert size.bits == 32 * size.values + size.index_bits
        assert round(size.ratio(768, 64), 1) == wanted
    several = size_of(FactorSpec(64, 96, 8, rows=128), 256, 192)
    assert several.bits == 6 * size_of(FactorSpec(64, 96, 8), 128, 64).bits


def test_the_best_spec_of_a_ratio_is_chosen():
    w = gaussian((96, 32))
    spec = choose(w, 2.0, columns=16, rounds=1)
    assert size_of(spec, 96, 32).ratio(96, 32) >= 2.0
    more = FactorSpec(16, spec.atoms, spec.nonzeros + 1)
    assert size_of(more, 96, 32).ratio(96, 32) < 2.0


def test_thin_factors_equal_numpy():
    w = gaussian((20, 12))
    u, sigma, vt = np.linalg.svd(w, full_matrices=False)
    a, b = low_rank(w, 4)
    np.testing.assert_allclose(a @ b, (u[:, :4] * sigma[:4]) @ vt[:4], atol=1e-5)
    weight = jnp.linspace(0.1, 5, 20)
    root = np.sqrt(weight)[:, None]
    u, sigma, vt = np.linalg.svd(root * w, full_matrices=False)
    a, b = low_rank(w, 4, weight)
    np.testing.assert_allclose(root * (a @ b), (u[:, :4] * sigma[:4]) @ vt[:4], atol=1e-5)
    assert rank_for(768, 64, 2.0) == 29


# -------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (
            lambda: FactorSpec(columns=7).check(8, 16, "block_0/up"),
            "block_0/up: columns=7 must div",
        ),
        (lambda: FactorSpec(rows=3).check(8, 64, "up"), "up: rows=3 must divide its 8 outputs"),
        (lambda: FactorSpec(64, 4, 5).check(8, 64, "up"), "up: nonzeros=5 .* the atoms=4"),
        (lambda: FactorSpec(64, 2**31, 5).check(8, 64, "up"), "no indices of 32 bits"),
        (lambda: FactorSpec(64, 12, 5, group=4).check(8, 64, "up"), "up: group=4 must divide"),
        (
            lambda: choose(jnp.ones((8, 16)), 50.0, columns=16, name="up"),
            "up: a ratio of 50.0 is out",
        ),
        (lambda: rank_for(8, 8, 100.0), "ratio=100.0: is out of reach"),
    ],
)
def test_mistakes_are_named(act, said):
    with pytest.raises(ValueError, match=said):
        act()
