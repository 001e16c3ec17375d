"""Grids: masks and their tiles, positions, the convolution; arguments of a stack by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import Causal, Full, attention, dense
from jaxformer.kernels.attention.masks import Grid, Sizes, TileState
from jaxformer.nn.attention import Attention
from jaxformer.nn.block import Block, PerLayer, ScannedStack, Stack
from jaxformer.nn.conv import GridConv, dirac, neighbours
from jaxformer.nn.grid import (
    SCANS,
    GridRoPE,
    GridSinusoid,
    GridTable,
    grid_sinusoid,
    layer_masks,
    mask_corner,
    mask_lower_right,
    places,
    unmask_neighborhood,
)
from jaxformer.nn.make import Make
from jaxformer.nn.mlp import MLP
from jaxformer.nn.rotary import BaseScaling, Frequencies, RIFLEx

KEY = jax.random.key(0)
GRIDS = [(4, 4), (3, 5), (8, 2)]


def rule(scan, r, c, r2, c2):
    """Whether (r2, c2) is visible from (r, c), by the words of the paper."""
    before = r2 <= r and c2 <= c
    return {
        "raster": (r2, c2) <= (r, c),
        "mask_lower_right": before,
        "unmask_neighborhood": before or (abs(r2 - r) <= 1 and abs(c2 - c) <= 1),
        "mask_corner": not (r2 > r and c2 > c),
    }[scan]


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_masks_are_their_rules(scan, grid):
    n = grid[0] * grid[1]
    found = np.asarray(dense(SCANS[scan](grid), 1, 1, n, n)).reshape(n, n)
    at = [divmod(i, grid[1]) for i in range(n)]
    expected = [[rule(scan, *q, *k) for k in at] for q in at]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_visible_counts_have_closed_forms(grid):
    (h, w), n = grid, grid[0] * grid[1]
    r, c = np.divmod(np.arange(n), w)

    def count(scan):
        return np.asarray(dense(SCANS[scan](grid), 1, 1, n, n)).reshape(n, n).sum(1)

    np.testing.assert_array_equal(count("raster"), np.arange(n) + 1)
    np.testing.assert_array_equal(count("mask_lower_right"), (r + 1) * (c + 1))
    np.testing.assert_array_equal(count("mask_corner"), n - (h - 1 - r) * (w - 1 - c))


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("tiles", [(4, 4), (3, 5), (8, 2), (16, 16)])
def test_tiles_are_judged_as_their_elements(scan, tiles):
    """SKIP and FULL only where it is so; and where a tile is one element, always."""
    grid, n = (6, 8), 48
    mask = SCANS[scan](grid)
    seen = np.asarray(dense(mask, 1, 1, n, n)).reshape(n, n)
    found = np.asarray(mask.tile_states(Grid.of(Sizes(1, 1, n, n), *tiles)))[0]
    for i, row in enumerate(found):
        for j, state in enumerate(row):
            part = seen[i * tiles[0] : (i + 1) * tiles[0], j * tiles[1] : (j + 1) * tiles[1]]
            assert state != TileState.SKIP or not part.any()
            assert state != TileState.FULL or part.all()
    single = np.asarray(mask.tile_states(Grid.of(Sizes(1, 1, n, n), 1, 1)))[0]
    np.testing.assert_array_equal(single == TileState.FULL, seen)
    np.testing.assert_array_equal(single == TileState.SKIP, ~seen)


@pytest.mark.parametrize("scan", SCANS)
def test_masks_are_values(scan):
    """So that layers share what is compiled, and may be scanned."""
    make = SCANS[scan]
    assert make((3, 4)) == make((3, 4)) and hash(make((3, 4))) == hash(make((3, 4)))
    assert scan == "raster" or make((3, 4)) != make((4, 3))


def test_a_large_grid_skips_tiles():
    """Of 32 x 32 positions in tiles of 64, what nobody sees is not computed."""
    grid = Grid.of(Sizes(1, 1, 1024, 1024), 64, 64)
    states = np.asarray(mask_lower_right((32, 32)).tile_states(grid))
    assert (states == TileState.SKIP).mean() > 0.45


@pytest.mark.parametrize("scan", ["unmask_neighborhood", "mask_corner"])
def test_attention_makes_no_square_array(scan):
    """Temporary memory grows as the number of positions, forwards and backwards."""

    def temporary(side):
        q = jnp.ones((1, side * side, 2, 8))

        def loss(q):
            return jnp.square(attention(q, q, q, mask=SCANS[scan]((side, side)))).sum()

        compiled = jax.jit(jax.grad(loss)).lower(q).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(32), temporary(64)  # 1024 and 4096 positions
    assert long < 6 * short and long < 4096**2 * 4


@pytest.mark.parametrize("make", [mask_corner, unmask_neighborhood])
def test_fused_attention_equals_the_dense_form(make):
    grid = (5, 7)
    q, k, v = jax.random.normal(KEY, (3, 2, 35, 2, 8))
    fused, plain = (
        attention(q, k, v, mask=make(grid), impl=impl, tiles=tiles)
        for impl, tiles in (("chunked", (8, 8)), ("xla", None))
    )
    np.testing.assert_allclose(fused, plain, atol=1e-5)


def test_patterns_of_layers():
    grid = (2, 3)
    masks = [mask(grid) for mask in layer_masks("fc", 4, SCANS["raster"])]
    assert masks == [Full(), Causal(), Full(), Causal()]
    assert len(layer_masks("fcffff", 6)) == 6
    for pattern, said in (("fx", "letters f and c"), ("", "letters"), ("fcf", "must divide")):
        with pytest.raises(ConfigError, match=said):
            layer_masks(pattern, 4)


def small_stack(cls=Stack, remat="none"):
    block = Make(Block, mixer=Make(Attention, heads=2), mlp=Make(MLP, hidden=16))
    if cls is ScannedStack:
        return ScannedStack(block, 2, remat)
    return Stack((block,) * 2, remat)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_have_masks_of_their_own(remat):
    """Behind a full and a causal layer, the first position has seen all; the other way, none."""
    x = jax.random.normal(KEY, (1, 6, 8))
    stack = small_stack(remat=remat)
    params = jax.jit(lambda: stack.init(KEY, x, mask=Full()))()

    def first(masks):
        def of(x):
            return stack.apply(params, x, mask=masks)[0, 0].sum()

        return np.abs(np.asarray(jax.jit(jax.grad(of))(x)))[0].sum(-1)

    assert (first(PerLayer([Causal(), Causal()]))[1:] == 0).all()
    assert (first(PerLayer([Full(), Causal()]))[1:] > 0).all()
    np.testing.assert_array_equal(first(PerLayer([Full(), Full()])), first(Full()))


def test_scanned_layers_must_be_alike():
    x = jnp.ones((1, 6, 8))
    stack = small_stack(ScannedStack)
    alike = stack.init(KEY, x, mask=PerLayer([Causal(), Causal()]))
    np.testing.assert_array_equal(
        stack.apply(alike, x, mask=PerLayer([Causal(), Causal()])),
        stack.apply(alike, x, mask=Causal()),
    )
    with pytest.raises(
        ConfigError, match=r"model\.scan=True: scanned blocks are alike, but 'mask'"
    ):
        stack.init(KEY, x, mask=PerLayer([Full(), Causal()]))


# ------------------------------------------------------------------------------- positions


def test_sinusoids_of_a_grid():
    """Half of the channels for the column, then half for the row; sines before cosines."""
    table = grid_sinusoid((3, 4), 8)
    row, column = 2, 1
    rates = np.array([1.0, 0.01])
    angles = np.concatenate([column * rates, row * rates])
    expected = [*np.sin(angles[:2]), *np.cos(angles[:2]), *np.sin(angles[2:]), *np.cos(angles[2:])]
    np.testing.assert_allclose(table[row * 4 + column], expected)


def test_squeezed_positions_are_those_of_the_same_place():
    """A grid twice as fine: the mean of two neighbours' coordinates is the coarse one."""
    x = jnp.zeros((1, 16, 8))
    same = GridSinusoid(trained=(4, 4)).apply({}, x, (4, 4))
    np.testing.assert_allclose(same[0], grid_sinusoid((4, 4), 8), atol=1e-6)
    fine = GridSinusoid(trained=(4, 4)).apply({}, jnp.zeros((1, 64, 8)), (8, 8))
    at = np.arctan2(fine[0, :8, 0], fine[0, :8, 2])  # angles of the fastest pair, by column
    np.testing.assert_allclose(at[:6], np.arange(6) / 2 - 0.25, atol=1e-5)
    beyond = GridSinusoid().apply({}, jnp.zeros((1, 64, 8)), (8, 8))
    np.testing.assert_allclose(beyond[0], grid_sinusoid((8, 8), 8), atol=1e-6)


def test_learned_tables_are_interpolated():
    module = GridTable((2, 2))
    params = {"table": jnp.ones((2, 2, 8))}
    y = module.apply({"params": params}, jnp.zeros((1, 15, 8)), (3, 5))
    np.testing.assert_allclose(y, 1.0, atol=1e-6)


def test_rotary_scores_go_by_offset():
    """Moving queries and keys by the same rows and columns leaves every score."""
    q, k = jax.random.normal(KEY, (2, 1, 12, 1, 8))
    rope, at = GridRoPE(), places((3, 4))

    def scores(at):
        turned = (rope.apply({}, x, at, method="rotate") for x in (q, k))
        return jnp.einsum("blhk,bshk->bls", *turned)

    np.testing.assert_allclose(scores(at), scores(at + jnp.array([5, 2])), atol=1e-4)
    assert np.abs(scores(at) - scores(at[::-1])).max() > 0.1
    with pytest.raises(ConfigError, match=r"model\.head_size=6"):
        rope.apply({}, q[..., :6], at, method="rotate")


def test_stretched_frequencies():
    plain, size = Frequencies().of(16), 16
    base = BaseScaling(factor=4.0).of(size)
    np.testing.assert_allclose([base[0], base[-1]], [plain[0], plain[-1] / 4])
    slowed = RIFLEx(factor=2.0, length=20).of(size)
    changed = np.flatnonzero(slowed != plain)
    assert len(changed) == 1  # the period nearest to 20 is 2 pi sqrt(10)
    np.testing.assert_allclose(2 * np.pi / slowed[changed], 40.0)


# ------------------------------------------------------------------------------ convolution


@pytest.mark.parametrize("dilation", [1, 2])
def test_the_convolution_is_that_of_xla(dilation):
    x = jax.random.normal(KEY, (2, 5, 6, 4))
    conv = GridConv(features=3)
    params = conv.init(KEY, x)
    kernel = params["params"]["weigh"]["kernel"].reshape(3, 3, 4, 3)
    expected = jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        [(dilation, dilation)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    found = GridConv(features=3, most=2).apply(params, x, dilation)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    traced = jax.jit(lambda d: GridConv(features=3, most=2).apply(params, x, d))(dilation)
    np.testing.assert_allclose(traced, expected, atol=1e-5)


@pytest.mark.parametrize("dilation", [1, 2])
def test_a_dirac_kernel_is_the_identity(dilation):
    x = jax.random.normal(KEY, (2, 5, 6, 4))
    conv = GridConv(most=2, kernel_init=dirac)
    np.testing.assert_array_equal(conv.apply(conv.init(KEY, x), x, dilation), x)


def test_the_border_sees_zeros():
    seen = neighbours(jnp.ones((1, 3, 3, 1)), 3)[0, ..., 0]
    np.testing.assert_array_equal(seen.sum(-1), [[4, 6, 4], [6, 9, 6], [4, 6, 4]])
    with pytest.raises(ConfigError, match=r"GridConv\.size=2: must be odd"):
        GridConv(size=2).init(KEY, jnp.ones((1, 3, 3, 1)))
