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
from jaxformer.kernels.attention.blocks import BlockList, blocks, static_states
from jaxformer.kernels.attention.masks import Grid
from jaxformer.kernels.attention.operands import Sizes
from jaxformer.kernels.attention.request import Request, Rules

B, H, L, S = 2, 2, 13, 17
rows, cols = np.indices((L, S))
bits = st.integers(0, 2**16).map(lambda n: np.random.default_rng(n))
offsets = st.integers(-20, 20)
bounds = st.none() | st.integers(-3, 20)


def odd(idx):
    return (idx.q + idx.k) % 2 == 1


def table_of(rng):
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
    table = table_of(rng)
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


def request_of(mask, q_pos=None, k_pos=None):
    x = [np.zeros((B, n, H, 1), np.float32) for n in (L, S, S)]
    return Request(*x, mask, {}, None, q_pos, k_pos, None, Rules(scale=1.0))


def check_list(visits, seen, tiles):
    """Every list names each tile at most once, all that is visible, and FULL only where all is."""
    visits = BlockList(*map(np.asarray, visits))
    assert visits.index.min() >= 0
    for b, i in np.ndindex(B, visits.index.shape[1]):
        of_b = b if len(visits.count) > 1 else 0
        count, full = visits.count[of_b, i], visits.full[of_b, i]
        index = visits.index[of_b, i]
        assert 0 <= full <= count <= len(index) and len(set(index[:count])) == count
        assert (index[count:] == index[max(count - 1, 0)]).all()  # nothing new behind the end
        rows = seen[b, :, i * tiles[0] : (i + 1) * tiles[0]]
        for j in range(-(-seen.shape[3] // tiles[1])):
            part = rows[:, :, j * tiles[1] : (j + 1) * tiles[1]]
            assert j in index[:count] or not part.any()
            # A tile that reaches into padding is smaller here, and never FULL.
            whole = part.shape[1:] == tiles and part.all()
            assert j not in index[:full] or whole


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(expressions, st.sampled_from([(4, 5), (13, 3)]))  # few sizes: each is compiled anew
def test_block_lists_follow_elements(expression, tiles):
    mask, want = expression
    want = np.broadcast_to(want, (B, H, L, S))
    lists = blocks(request_of(mask), *tiles)
    check_list(lists.by_q, want, tiles)
    check_list(lists.by_k, want.swapaxes(2, 3), tiles[::-1])
    static = static_states(request_of(mask), *tiles)
    assert lists.by_q.static == (not jax.tree.leaves(mask))
    if lists.by_q.static:
        assert int((static > 0).sum()) == int(lists.by_q.count.sum())
    else:  # what is known while tracing is known when running, too
        assert int((static > 0).sum()) * B >= int(lists.by_q.count.sum())


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True)
@given(expressions, bits)
def test_block_lists_follow_positions(expression, rng):
    mask, _ = expression
    q_pos, k_pos = rng.integers(0, 30, L), np.sort(rng.integers(0, 30, (B, S)))
    want = dense(mask, B, H, L, S, q_pos, k_pos)
    lists = blocks(request_of(mask, q_pos, k_pos), 4, 5)
    check_list(lists.by_q, np.broadcast_to(want, (B, H, L, S)), (4, 5))


def test_arrays_decide_tiles_while_running():
    """Soundness alone would allow PARTIAL everywhere."""
    ids = jnp.repeat(jnp.arange(3), 8)[None]
    states = jax.jit(lambda mask: mask.tile_states(Grid.of(Sizes(1, 1, 24, 24), 8, 8)))
    assert np.array_equal(states(Segments(ids, ids))[0], 2 * np.eye(3))
    assert np.array_equal(states(Segments(ids, ids) & Causal())[0], np.eye(3))
    want = np.array([2, 1, 0]) * np.ones((3, 1))
    for mask in (KeyPadding(jnp.array([9])), Prefix(jnp.array(9)), DenseMask(jnp.arange(24) < 9)):
        assert np.array_equal(states(mask)[0], want), mask
    shifted = Grid.of(Sizes(1, 1, 8, 24), 8, 8, jnp.arange(8) + 8)  # the second of three shards
    assert np.array_equal(Causal().tile_states(shifted)[0], [[2, 1, 0]])


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
