"""Linear self-attention against the definition, token by token, real and complex."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.nn.linear_self_attention import (
    causal_linear_self_attention,
    linear_self_attention,
)

B, D, P = 2, 4, 3
LONG = D**2 + 1  # by running sums; shorter ones by scores


@pytest.fixture(
    scope="module",
    params=[(np.float64, 7), (np.complex128, 7), (np.complex128, LONG)],
    ids=["real", "complex", "long"],
)
def problem(request):
    rng = np.random.default_rng(0)
    dtype, length = request.param

    def draw(*shape):
        z = rng.normal(size=shape)
        return z + 1j * rng.normal(size=shape) if dtype is np.complex128 else z

    return draw(B, D, length), draw(P, D), draw(D, D)


def naive(e, w_pv, w_kq, query, keys, rho):
    """W^PV sum_i e_i (e_i^* W^KQ e_q) / rho, the definition with explicit scores."""
    scores = [np.vdot(e[:, i], w_kq @ e[:, query]) for i in keys]
    return w_pv @ sum(s * e[:, i] for s, i in zip(scores, keys, strict=True)) / rho


def test_every_token_reads_all(problem):
    e, w_pv, w_kq = problem
    with jax.enable_x64(True):
        out = jax.jit(linear_self_attention)(e, w_pv, w_kq, 5.0)
    L = e.shape[-1]
    for b, t in np.ndindex(B, L):
        expected = naive(e[b], w_pv, w_kq, t, range(L), 5.0)
        np.testing.assert_allclose(out[b, :, t], expected, rtol=1e-10)


def test_causal_reads_its_prefix(problem):
    e, w_pv, w_kq = problem
    L = e.shape[-1]
    rho = np.arange(1.0, L + 1)
    with jax.enable_x64(True):
        out = jax.jit(causal_linear_self_attention)(e, w_pv, w_kq, rho)
    for b, t in np.ndindex(B, L):
        expected = naive(e[b], w_pv, w_kq, t, range(t + 1), t + 1)
        np.testing.assert_allclose(out[b, :, t], expected, rtol=1e-10)


def test_causal_ignores_what_comes_later_to_the_bit(problem):
    e, w_pv, w_kq = (jnp.asarray(a) for a in problem)
    attend = jax.jit(causal_linear_self_attention)
    before = attend(e, w_pv, w_kq, 1.0)
    after = attend(e.at[..., 4:].set(1e6), w_pv, w_kq, 1.0)
    np.testing.assert_array_equal(before[..., :4], after[..., :4])
    assert not np.array_equal(before[..., 4:], after[..., 4:])
