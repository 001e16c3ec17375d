"""The algebra of masks: a tile's state, its elements and boolean logic agree."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxformer.kernels.attention import (
    BlockSparse,
    Causal,
    DenseMask,
    Diagonal,
    Full,
    KeyPadding,
    MaskMod,
    Prefix,
    Segments,
    TileState,
    Window,
    dense,
)

B, H, L, S = 2, 2, 13, 17
rows, cols = np.indices((L, S))
bits = st.integers(0, 2**16).map(lambda n: np.random.default_rng(n))
offsets = st.integers(-20, 20)
bounds = st.none() | st.integers(-3, 20)


def odd(idx):
    return (idx.q + idx.k) % 2 == 1


def blocks(rng):
    return rng.random((3, 4)) < 0.5


def segments(rng):
    q, k = rng.integers(0, 3, (B, L)), rng.integers(0, 3, (B, S))
    seen = (q[:, :, None] == k[:, None, :])[:, None]
    return Segments(jnp.array(q), jnp.array(k)), seen


def padding(rng):
    valid = rng.random((B, S)) < 0.5
    return KeyPadding(jnp.array(valid)), valid[:, None, None, :]


def lengths(rng):
    n = rng.integers(0, S + 1, B)
    return KeyPadding(jnp.array(n)), cols < n[:, None, None, None]


def prefixes(rng):
    n = rng.integers(0, S + 1, B)
    return Prefix(jnp.array(n)), cols < n[:, None, None, None]


def dense_mask(rng):
    seen = rng.random((1, H, L, S)) < 0.5
    return DenseMask(jnp.array(seen)), seen


def window(left, right):
    low = -np.inf if left is None else -left
    high = np.inf if right is None else right
    return Window(left, right), (cols - rows >= low) & (cols - rows <= high)


def block_sparse(rng, bq, bk):
    table = blocks(rng)
    seen = np.zeros((L, S), bool)
    for i, j in np.ndindex(L, S):
        if i // bq < 3 and j // bk < 4:
            seen[i, j] = table[i // bq, j // bk]
    return BlockSparse(table, bq, bk), seen


# Every strategy gives (mask, the same set as a NumPy array).
leaves = st.one_of(
    st.just((Full(), np.ones((L, S), bool))),
    st.just((Diagonal(), rows == cols)),
    st.just((MaskMod(odd), (rows + cols) % 2 == 1)),
    offsets.map(lambda o: (Causal(o), cols <= rows + o)),
    st.builds(window, bounds, bounds),
    st.integers(0, 20).map(lambda n: (Prefix(n), cols < n)),
    st.builds(block_sparse, bits, st.integers(2, 6), st.integers(2, 6)),
    *(bits.map(f) for f in (segments, padding, lengths, prefixes, dense_mask)),
)
expressions = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: (p[0][0] & p[1][0], p[0][1] & p[1][1])),
        st.tuples(inner, inner).map(lambda p: (p[0][0] | p[1][0], p[0][1] | p[1][1])),
    ),
    max_leaves=4,
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(expressions, st.data())
def test_elements_follow_boolean_logic_and_tile_states_follow_elements(expression, data):
    mask, want = expression
    got = np.broadcast_to(dense(mask, B, H, L, S), (B, H, L, S))
    assert np.array_equal(got, np.broadcast_to(want, (B, H, L, S)))
    for _ in range(4):
        q0, k0 = data.draw(st.integers(0, L - 1)), data.draw(st.integers(0, S - 1))
        q = range(q0, data.draw(st.integers(q0 + 1, L)))
        k = range(k0, data.draw(st.integers(k0 + 1, S)))
        part = got[:, :, q.start : q.stop, k.start : k.stop]
        state = mask.tile_state(q, k)
        assert (state is not TileState.FULL) or part.all()
        assert (state is not TileState.SKIP) or not part.any()
        assert mask.tile_state(None, None) in (TileState.PARTIAL, TileState.FULL)


@pytest.mark.parametrize(
    ("mask", "full", "skip", "partial"),
    [
        (Causal(), (8, 0), (0, 8), (8, 8)),
        (Window(7, 0), (None), (16, 0), (8, 8)),
        (Prefix(8), (0, 0), (0, 8), None),
        (Prefix(8) | Diagonal(), (8, 0), (0, 8), (8, 8)),
        (BlockSparse(np.eye(3, dtype=bool), 8, 8), (8, 8), (0, 8), None),
        (Causal() & Window(100, 0), (8, 0), (0, 8), (8, 8)),
    ],
)
def test_static_masks_decide_what_can_be_decided(mask, full, skip, partial):
    """Soundness alone would allow PARTIAL everywhere."""
    for start, state in ((full, "FULL"), (skip, "SKIP"), (partial, "PARTIAL")):
        if start is not None:
            q, k = (range(x, x + 8) for x in start)
            assert mask.tile_state(q, k).name == state, (start, state)


def test_static_masks_are_values():
    table = np.eye(3, dtype=bool)
    assert BlockSparse(table, 4, 4) == BlockSparse(table.copy(), 4, 4) != BlockSparse(~table, 4, 4)
    assert Causal() & Window(3, 0) == Causal() & Window(3, 0)
    assert hash(Prefix(3) | Diagonal()) == hash(Prefix(3) | Diagonal())
    assert Prefix(3) != Prefix(4)
    assert jax.tree.leaves(Causal() & Prefix(3) & BlockSparse(table, 4, 4)) == []
    assert len(jax.tree.leaves(Causal() & KeyPadding(jnp.ones(3, int)))) == 1


def test_positions_replace_rows_and_columns():
    q_pos, k_pos = np.array([5, 0]), np.array([[5, 6, 0], [1, 0, 4]])
    got = dense(Causal(), 2, 1, 2, 3, jnp.array(q_pos), jnp.array(k_pos))
    assert np.array_equal(got[:, 0], k_pos[:, None, :] <= q_pos[None, :, None])
