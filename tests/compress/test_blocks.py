"""Blocks of small integers: the identities of BCT, on any data."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.compress import block_arithmetic as arithmetic
from jaxformer.compress import blocks
from jaxformer.compress.blocks import PAPER_RATIO, BlockSpec, compress, decompress, quantise
from jaxformer.nn.activation import FUNCTIONS
from jaxformer.recipe import ConfigError

SPECS = [
    BlockSpec(64, 64, 4),
    BlockSpec(1, 64, 8),
    BlockSpec(16, 8, 8, 6),
    BlockSpec(None, None, 4),
    BlockSpec(1, None, 8),
    BlockSpec(5, 7, 3),
]


def heavy(shape=(70, 100), seed=0):
    """Heavy-tailed numbers with a block of zeros."""
    x = np.random.default_rng(seed).standard_t(3, shape).astype(np.float32)
    x[:16, :16] = 0
    return jnp.asarray(x)


def shift_by_search(a, largest):
    """The largest e for which a 2^e does not exceed `largest`, in float64."""
    e = 0
    while a * 2.0 ** (e + 1) <= largest:
        e += 1
    while a * 2.0**e > largest:
        e -= 1
    return e


@pytest.mark.parametrize("largest", [7.0, 127.0, 255.0, 448.0])
def test_shifts_never_clip_and_waste_no_bit(largest):
    a = np.concatenate([np.geomspace(1e-9, 1e9, 101), largest * 2.0 ** np.arange(-5, 6)])
    a = np.concatenate([a, np.nextafter(a.astype(np.float32), np.inf)]).astype(np.float32)
    found = blocks.shift_of(jnp.asarray(a), largest)
    np.testing.assert_array_equal(found, [shift_by_search(float(x), largest) for x in a])
    assert int(blocks.shift_of(jnp.zeros(()), largest)) == 0


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_and_errors_are_within_their_bounds(spec):
    x = heavy()
    found = compress(x, spec)
    assert int(jnp.abs(found.codes.astype(jnp.int32)).max()) <= spec.largest
    assert found.shifts.shape == spec.grid(x.shape) and found.codes.shape == x.shape
    e = arithmetic.spread(found.shifts, x.shape, spec)
    y = decompress(found, spec)
    assert (jnp.abs(x - y) <= 2.0 ** (-e - 1.0)).all()
    again = compress(y, spec)
    np.testing.assert_array_equal(decompress(again, spec), y)
    np.testing.assert_array_equal(quantise(x, spec), y)


@pytest.mark.parametrize("j", [-9, 1, 12])
def test_scaling_by_a_power_of_two_moves_shifts_alone(j):
    spec, x = BlockSpec(16, 8, 4), heavy()
    one, other = compress(x, spec), compress(x * 2.0**j, spec)
    np.testing.assert_array_equal(one.codes, other.codes)
    zero = np.asarray(blocks._tile(jnp.abs(x), spec).max((1, 3)) == 0)
    assert zero.any()
    moved = np.asarray(one.shifts, int) - np.asarray(other.shifts, int)
    np.testing.assert_array_equal(moved, np.where(zero, 0, j))


def test_zeros_stay_zeros():
    found = compress(jnp.zeros((5, 9)), BlockSpec(2, 4, 4))
    assert not found.codes.any() and not found.shifts.any()


def test_one_block_is_the_layer():
    x = heavy((48, 80))
    whole, layer = BlockSpec(48, 80, 4), BlockSpec(None, None, 4)
    for a, b in zip(compress(x, whole), compress(x, layer), strict=True):
        np.testing.assert_array_equal(a, b)
    larger = BlockSpec(64, 128, 4)  # ragged: the array is smaller than its block
    np.testing.assert_array_equal(quantise(x, larger), quantise(x, layer))


@pytest.mark.parametrize("bits", [4, 8])
def test_smaller_blocks_worsen_no_element(bits):
    x = heavy((128, 192), seed=3) * jnp.where(jnp.arange(192) == 7, 30.0, 1.0)
    sides = (None, 64, 32, 16, 4, 1)
    off = [jnp.abs(x - quantise(x, BlockSpec(side, side, bits))) for side in sides]
    for coarse, fine in itertools.pairwise(off):
        assert (fine <= coarse).all() and float(fine.sum()) < float(coarse.sum())


def test_off_is_off():
    x = heavy()
    assert quantise(x, BlockSpec(bits=32)) is x and quantise(x, None) is x
    with pytest.raises(ConfigError, match="has no codes"):
        compress(x, BlockSpec(bits=32))


def test_the_gradient_passes():
    spec = BlockSpec(1, 8, 4)
    gradient = jax.grad(lambda x: (quantise(x, spec) * jnp.arange(16.0)).sum())(jnp.ones((2, 16)))
    np.testing.assert_array_equal(gradient, np.tile(np.arange(16.0), (2, 1)))


def test_what_is_not_finite_is_seen():
    x = heavy().at[20, 40].set(jnp.inf).at[66, 3].set(jnp.nan)
    y = quantise(x, BlockSpec(1, 10, 8))
    assert jnp.isnan(y[20, 40:50]).all() and jnp.isnan(y[66, :10]).all()
    assert int(jnp.isnan(y).sum()) == 20


def test_small_floats_with_a_shift():
    """E4m3 has 3 bits of fraction at any size; its relative error is at most 2^-4."""
    spec, x = BlockSpec(1, 10, number="e4m3"), heavy()
    y = quantise(x, spec)
    most = jnp.abs(blocks._tile(x, spec)).max((1, 3))[:, None, :, None] * jnp.ones((1, 1, 1, 10))
    normal = jnp.abs(x) > blocks._untile(most, x.shape) * 2.0**-13
    assert (jnp.abs(x - y)[normal] <= jnp.abs(x)[normal] * 2.0**-4).all()
    np.testing.assert_array_equal(quantise(y, spec), y)
    np.testing.assert_array_equal(decompress(compress(x, spec), spec), y)


# --------------------------------------------------------------------------------------- storage


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (BlockSpec(64, 64, 4), 7.996),
        (BlockSpec(32, 32, 4), 7.984),
        (PAPER_RATIO, 7.988),
        (BlockSpec(64, 64, 8), 3.999),
    ],
    ids=str,
)
def test_ratios_are_measured_on_bytes(spec, wanted):
    x = heavy((256, 768))
    packed = blocks.pack(compress(x, spec), spec)
    measured = 4 * x.size / sum(part.nbytes for part in packed.values())
    assert round(measured, 3) == wanted == round(blocks.ratio(x.shape, spec), 3)


@pytest.mark.parametrize(
    "spec",
    [*SPECS, BlockSpec(3, 9, 8, number="e4m3"), BlockSpec(3, 9, 4, number="unsigned")],
    ids=str,
)
def test_packed_bytes_hold_everything(spec):
    x = jnp.abs(heavy()) if spec.number == "unsigned" else heavy()
    found = compress(x, spec)
    packed = blocks.pack(found, spec)
    assert sum(part.nbytes for part in packed.values()) == blocks.packed_bytes(x.shape, spec)
    back = blocks.unpack(packed, x.shape, spec)
    np.testing.assert_array_equal(decompress(back, spec), decompress(found, spec))
    for a, b in zip(found, back, strict=True):
        assert a.dtype == b.dtype
    with pytest.raises(ConfigError, match="do not hold"):
        blocks.unpack(packed, (*x.shape[:-1], x.shape[-1] + 9), spec)


def test_fewer_bits_of_shift_change_no_code_within_their_range():
    x, wide = heavy(), BlockSpec(16, 16, 4, 8)
    narrow = dataclasses.replace(wide, shift_bits=6)
    for a, b in zip(compress(x, wide), compress(x, narrow), strict=True):
        np.testing.assert_array_equal(a, b)
    for factor in (1e12, 1e-12):  # shifts beyond -32 and 31
        assert (compress(x * factor, wide).shifts != compress(x * 1.0, wide).shifts).any()
    with pytest.raises(ConfigError, match=r"shift_bits=6: the largest value .* is over"):
        compress(x * 1e12, narrow)
    small = decompress(compress(x * 1e-12, narrow), narrow)  # coarser than need be, not wrong
    assert (jnp.abs(small - x * 1e-12) <= 2.0**-32).all()


# ------------------------------------------------------------------------------------ arithmetic


def test_right_shifts_round_half_to_even():
    n = jnp.asarray([*range(-40, 41), 2**30, -(2**30), 2**31 - 1, -(2**31)], jnp.int32)
    for by in (0, 1, 2, 3, 30, 31, 32, 40):
        wanted = np.round(np.asarray(n, np.float64) / 2.0**by)
        np.testing.assert_array_equal(arithmetic.right_shift(n, jnp.asarray(by)), wanted)


def both(spec_x, spec_w, seed=0, size=100):
    keys = jax.random.split(jax.random.key(seed), 2)
    x = jax.random.normal(keys[0], (6, size)) * jnp.exp(jax.random.normal(keys[1], (6, 1)))
    w = heavy((40, size), seed)
    return compress(x, spec_x), compress(w, spec_w)


@pytest.mark.parametrize(
    ("spec_x", "spec_w"),
    [
        (BlockSpec(1, 16, 8), BlockSpec(16, 16, 4)),
        (BlockSpec(1, 32, 8), BlockSpec(16, 16, 8)),
        (BlockSpec(None, None, 8), BlockSpec(None, None, 4)),
    ],
    ids=str,
)
def test_integer_products_equal_floats_up_to_alignment(spec_x, spec_w):
    """With all of int32 they are finer than at the coarsest shift."""
    x, w = both(spec_x, spec_w)
    width = min(spec.columns or 100 for spec in (spec_x, spec_w))
    fixed = arithmetic.fixed(x, spec_x), arithmetic.fixed(w, spec_w)
    a, b = (np.asarray(f.n, np.float64) * 2.0 ** -np.asarray(f.e, np.float64) for f in fixed)
    k_blocks = -(-100 // width)
    errors = []
    for room in (0, arithmetic.headroom(100, spec_x, spec_w)):
        y = jax.jit(functools.partial(arithmetic.matmul, width=width, room=room))(*fixed)
        error = np.abs(np.asarray(y.n, np.float64) * 2.0 ** -np.asarray(y.e, np.float64) - a @ b.T)
        assert (error <= 2.0 ** -np.asarray(y.e, np.float64) * k_blocks).all()
        errors.append(error.max())
    if k_blocks == 1:
        assert errors == [0, 0]
    else:
        assert errors[0] > 100 * errors[1]


def test_integer_products_are_exact_where_all_shifts_coincide():
    rng = np.random.default_rng(0)
    spec = BlockSpec(1, 16, 8)
    x, w = (rng.integers(-127, 128, (n, 64)).astype(np.float32) for n in (5, 7))
    x[:, ::16] = w[:, ::16] = 127  # every block has the same largest value
    fixed = [arithmetic.fixed(compress(a / 8, spec), spec) for a in (x, w)]
    np.testing.assert_array_equal(arithmetic.matmul(*fixed, 16).value, x @ w.T / 64)


def test_sums_take_the_coarser_shift_where_there_is_no_room():
    spec = BlockSpec(1, 8, 8)
    a, b = (arithmetic.fixed(compress(heavy((6, 24), seed), spec), spec) for seed in (1, 2))
    wanted = a.value + b.value
    y = arithmetic.add(a, b, room=0)
    both = (a.n != 0) & (b.n != 0)  # a zero has no shift of its own and follows the other
    np.testing.assert_array_equal(y.e[both], jnp.minimum(a.e, b.e)[both])
    off = jnp.abs(y.value - wanted)
    assert (off <= 2.0 ** (-y.e.astype(float) - 1)).all() and off.any()
    np.testing.assert_array_equal(arithmetic.add(a, b).value, wanted)
    zero = arithmetic.Fixed(jnp.zeros_like(a.n), jnp.full_like(a.e, -9))
    np.testing.assert_array_equal(arithmetic.add(a, zero).value, a.value)


def test_bias_is_added_to_sums_without_loss_where_there_is_room():
    y = arithmetic.Fixed(jnp.array([1000, -5, 0, 2**30]), jnp.array([14, 20, 0, 30]))
    bias = arithmetic.Fixed(jnp.array([100, -3, 7, 1]), jnp.array([7, 9, 3, 2]))
    found = arithmetic.add_bias(y, bias)
    wanted = np.asarray(y.value, np.float64) + np.asarray(bias.value, np.float64)
    error = np.abs(np.asarray(found.value, np.float64) - wanted)
    np.testing.assert_array_equal(error[:3], 0)
    assert error[3] <= 2.0 ** -(2 + arithmetic.BIAS_ROOM)


@pytest.mark.parametrize("spec", [BlockSpec(1, 8, 8), BlockSpec(4, 8, 4), BlockSpec(None, None, 8)])
def test_integers_are_compressed_as_floats_are(spec):
    n = (heavy((12, 20), 5) * 3000).astype(jnp.int32)
    same = arithmetic.Fixed(n, jnp.full(n.shape, 9))
    for a, b in zip(arithmetic.compress_fixed(same, spec), compress(same.value, spec), strict=True):
        np.testing.assert_array_equal(a, b)
    one = jnp.asarray([[2**20 - 1, 1, -(2**20) + 1, 0], [1, 1, 0, 0]])  # shifts to both sides
    one = arithmetic.Fixed(one, jnp.full(one.shape, 3))
    for a, b in zip(arithmetic.compress_fixed(one, spec), compress(one.value, spec), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("function", ["gelu", "tanh"])
@pytest.mark.parametrize("bits", [4, 8])
def test_tables_equal_the_function_of_decompressed_codes(function, bits):
    spec, x = BlockSpec(1, 10, bits), compress(heavy() * 2, BlockSpec(1, 10, bits))
    table = quantise(arithmetic.look_up(FUNCTIONS[function], x, spec), spec)
    wanted = quantise(FUNCTIONS[function](decompress(x, spec)), spec)
    np.testing.assert_array_equal(table, wanted)


@pytest.mark.parametrize("length", [7, 64, 300])
def test_integer_softmax_sums_to_one(length):
    spec, probs = BlockSpec(1, 64, 8), BlockSpec(1, 64, 8)
    s = 3 * jax.random.normal(jax.random.key(0), (9, length))
    visible = jnp.arange(length) < jnp.asarray([length, 1, 0, *[length // 2] * 6])[:, None]
    codes = arithmetic.fixed(compress(jnp.where(visible, s, 0), spec), spec)
    p = arithmetic.softmax(codes, visible)
    total = p.value.sum(-1)
    rows = np.asarray(visible.any(-1))
    rounding = length * 2.0**-16  # of divisions
    np.testing.assert_allclose(total, rows.astype(float), atol=rounding)
    assert not p.n[~np.asarray(visible)].any()
    compressed = decompress(arithmetic.compress_fixed(p, probs), probs).sum(-1)
    np.testing.assert_allclose(compressed[rows], 1, atol=2.0**-7 * length**0.5)
    exact = jax.nn.softmax(jnp.where(visible, codes.value, -jnp.inf), -1)
    if length <= 64:  # one block: no codes are aligned
        np.testing.assert_allclose(p.value[rows], exact[rows], atol=3e-4)


def test_moments_are_of_aligned_codes():
    spec = BlockSpec(1, 16, 8)
    x = arithmetic.fixed(compress(heavy((9, 48), 2), spec), spec)
    codes, mean, variance = arithmetic.moments(x)
    n = np.asarray(codes.n, np.float64)
    np.testing.assert_allclose(mean[:, 0], n.mean(-1), atol=1e-5)
    np.testing.assert_allclose(variance[:, 0], n.var(-1), rtol=1e-4)
    np.testing.assert_allclose(codes.value, x.value, atol=2.0 ** -(float(codes.e.min()) + 1))


# -------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: BlockSpec(rows=0), r"BlockSpec\.rows=0: must be at least 1"),
        (lambda: BlockSpec(columns=-3), r"BlockSpec\.columns=-3: must be at least 1"),
        (lambda: BlockSpec(bits=9), r"BlockSpec\.bits=9: must be from 2 to 8, or 32"),
        (lambda: BlockSpec(shift_bits=9), r"BlockSpec\.shift_bits=9"),
        (lambda: BlockSpec(number="float"), r"must be int, unsigned or e4m3"),
        (lambda: BlockSpec(bits=4, number="e4m3"), r"bits=4: e4m3 has 8"),
        (lambda: arithmetic.check_integer(BlockSpec(bits=6)), r"bits=6.* integers of 4 and 8 bits"),
        (lambda: arithmetic.check_integer(BlockSpec(bits=32)), r"bits=32.* 4 and 8 bits"),
        (lambda: arithmetic.check_sums(2**18, *[BlockSpec()] * 2), "may overflow int32"),
        (lambda: compress(jnp.array([1.0, jnp.nan]), BlockSpec()), "not finite"),
        (lambda: compress(jnp.array([1.0, jnp.inf]), BlockSpec()), "not finite"),
        (lambda: compress(jnp.array([-1.0]), BlockSpec(number="unsigned")), "negative values"),
    ],
)
def test_mistakes_are_named(act, said):
    with pytest.raises(ValueError, match=said):
        act()


# ------------------------------------------------------------------------- shifts that are given


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_given_largest_values_are_of_the_least_shift_and_clip_nothing(spec):
    x = heavy()
    a = blocks.largest_across(x, spec)
    shifts = compress(x, spec).shifts
    zero = jnp.abs(blocks._tile(x, spec)).max((1, 3)) == 0
    least = jnp.where(zero, 127, shifts).min(0)
    np.testing.assert_array_equal(blocks.shift_of(a, spec.largest), least)
    error = jnp.abs(quantise(x, spec, a) - x)
    assert (blocks._tile(error, spec) <= 2.0 ** (-least[None, None, :, None] - 1.0)).all()


def test_given_shifts_are_the_blocks_own_where_all_have_the_same_largest_value():
    spec = BlockSpec(1, 16, 8)
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (20, 48)), jnp.float32)
    x = x.at[:, ::16].set(jnp.asarray([3.0, -1.2, 11.0]))
    own = quantise(x, spec)
    np.testing.assert_array_equal(quantise(x, spec, blocks.largest_across(x, spec)), own)
    smaller = x.at[0].multiply(0.01)
    a = blocks.largest_across(smaller, spec)
    assert (quantise(smaller, spec, a)[0] != quantise(smaller, spec)[0]).any()


def test_values_beyond_the_given_ones_are_clipped():
    spec = BlockSpec(1, 4, 8)
    found = quantise(jnp.asarray([[1.0, -8.0, 0.5, 100.0]]), spec, jnp.asarray([1.0]))
    top = 127 / 64  # the shift of 1 is 6
    np.testing.assert_array_equal(found, [[1.0, -top, 0.5, top]])
