"""Linear attention: the chunked sums against the quadratic ones, and decoding against both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.kernels.linear_attention import (
    causal_sum,
    key_value_state,
    linear_attention,
    linear_attention_step,
)


def arrays(l=77, s=77, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = ((2, l, 3, 5), (2, s, 3, 5), (2, s, 3, 7))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def quadratic(q, k, v, causal):
    scores = jnp.einsum("blhk,bshk->bhls", q, k)
    return jnp.einsum("bhls,bshn->blhn", jnp.tril(scores) if causal else scores, v)


@pytest.mark.parametrize(("causal", "s"), [(True, 77), (False, 50)])
def test_equals_the_quadratic_sum_with_gradients(causal, s):
    x = arrays(s=s)

    def loss(attend):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sin(attend(*x)).sum(), (0, 1, 2)))(*x)

    ours = loss(lambda q, k, v: linear_attention(q, k, v, causal=causal, chunk=16))
    want = loss(lambda q, k, v: quadratic(q, k, v, causal))
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)  # sums of 77 * 5 terms


def test_decoding_continues_any_prefix():
    q, k, v = arrays()
    parallel = linear_attention(q, k, v, causal=True, chunk=32)
    state = key_value_state(k[:, :70], v[:, :70])
    for t in range(70, 77):
        state, o = linear_attention_step(state, q[:, t], k[:, t], v[:, t])
        np.testing.assert_allclose(o, parallel[:, t], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state, key_value_state(k, v), rtol=1e-4, atol=1e-4)


def test_the_future_changes_nothing():
    q, k, v = arrays()
    changed = [x.at[:, 40:].set(9.0) for x in (q, k, v)]
    one, two = (linear_attention(*x, causal=True, chunk=16)[:, :40] for x in ((q, k, v), changed))
    assert np.array_equal(one, two)


def test_normalisers_a_column_of_ones_and_prefix_sums_agree():
    q, k, v = arrays()
    ones = jnp.ones((*v.shape[:3], 1))
    column = linear_attention(q, k, ones, causal=True, chunk=16)[..., 0]
    sums = jnp.einsum("blhk,blhk->blh", q, causal_sum(k))
    np.testing.assert_allclose(column, sums, rtol=1e-4, atol=1e-4)


def test_sums_of_bfloat16_are_float32():
    ones = jnp.ones((1, 1000, 1, 1), jnp.bfloat16)  # bfloat16 cannot count beyond 256
    assert causal_sum(ones)[0, -1, 0, 0] == 1000
    o = linear_attention(ones, ones, ones, causal=True)
    assert o.dtype == jnp.float32 and o[0, -1, 0, 0] == 1000


def test_memory_is_linear_in_length():
    def temporary(length):
        x = [jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)] * 3
        grads = jax.grad(lambda *x: linear_attention(*x, causal=True).sum(), (0, 1, 2))
        return jax.jit(grads).lower(*x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 4.2 * temporary(2048)


def test_wrong_shapes_are_named():
    q, k, v = arrays(s=50)
    with pytest.raises(ValueError, match="causal needs L = S"):
        linear_attention(q, k, v, causal=True)
    with pytest.raises(ValueError, match="batch, heads or feature size differ"):
        linear_attention(q[..., :4], k, v, causal=False)
