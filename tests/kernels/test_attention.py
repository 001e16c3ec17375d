"""The attention op: values and gradients of every implementation against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import (
    AttentionUnsupported,
    BlockSparse,
    Causal,
    DenseMask,
    Diagonal,
    Full,
    KeyPadding,
    MaskMod,
    PerHead,
    PerK,
    PerQ,
    Prefix,
    ProbMod,
    Scalar,
    Segments,
    Tile,
    Toeplitz,
    Window,
    attention,
    explain,
    merge,
    plan,
    ste_round,
)
from tests.kernels.attention_reference import Case, attend, draw, slope, toeplitz

KERNELS = ["mosaic_tpu", "triton"]  # interpreted on a CPU
BLOCKS = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 0, 1]], bool)
IDS = np.array([[0] * 15 + [1] * 20 + [2] * 2, [3] * 30 + [9] * 7])
LENGTHS = np.array([37, 0])
SHUFFLED = np.random.default_rng(1).permutation(53)
DENSE = np.random.default_rng(2).random((1, 4, 37, 53)) < 0.3

CASES = {
    "full": Case((2, 37, 53, 4, 4, 8, 8)),
    "causal_gqa_sink": Case(
        (2, 37, 53, 4, 2, 8, 12),
        lambda: Causal(offset=3),
        lambda b, i, j: j <= i + 3,
        sink=True,
        call=dict(scale=0.5),
    ),
    "window_capped": Case(
        (1, 64, 64, 2, 1, 8, 8),
        lambda: Window(20, 3),
        lambda b, i, j: (j >= i - 20) & (j <= i + 3),
        call=dict(score_mod=lambda s, i, a: a["cap"] * jnp.tanh(s / a["cap"])),
        aux={"cap": (Scalar, ())},
        score=lambda s, b, h, i, j, a: a["cap"] * np.tanh(s / a["cap"]),
    ),
    "pfn_alibi": Case(
        (2, 37, 37, 4, 4, 8, 8),
        lambda: Prefix(18) | Diagonal(),
        lambda b, i, j: (j < 18) | (i == j),
        call=dict(score_mod=lambda s, i, a: s - a["slope"] * jnp.abs(i.q - i.k)),
        aux={"slope": (PerHead, (4,))},
        score=lambda s, b, h, i, j, a: s - a["slope"][:, None, None] * np.abs(i - j),
    ),
    "prefix_per_row_head_map": Case(
        (2, 37, 53, 5, 3, 8, 4),
        lambda: Prefix(jnp.array([50, 0])),  # the second row of the batch sees nothing
        lambda b, i, j: j < np.array([50, 0])[b],
        head_map=(2, 0, 0, 1, 2),
    ),
    "segments_bias": Case(
        (2, 37, 37, 2, 2, 8, 8),
        lambda: Segments(jnp.array(IDS), jnp.array(IDS)) & Causal(),
        lambda b, i, j: (IDS[b, i] == IDS[b, j]) & (j <= i),
        call=dict(score_mod=lambda s, i, a: s + a["bias"] + a["row"] * a["column"]),
        aux={"bias": (Tile, (2, 1, 37, 37)), "row": (PerQ, (2, 37)), "column": (PerK, (2, 1, 37))},
        score=lambda s, b, h, i, j, a: (
            s + a["bias"] + (a["row"][:, :, None] * a["column"][:, :, None, :])
        ),
    ),
    "padding_urpe": Case(
        (2, 37, 53, 4, 4, 8, 8),
        lambda: KeyPadding(jnp.array(LENGTHS)),
        lambda b, i, j: j < LENGTHS[b],
        call=dict(
            score_mod=lambda s, i, a: s + a["add"],
            prob_mod=ProbMod(lambda p, i, a: p * a["times"], linear=True),
        ),
        aux={"add": (Toeplitz, (4, 89)), "times": (Toeplitz, (89,))},
        score=lambda s, b, h, i, j, a: s + toeplitz(a["add"], 37, 53),
        prob=lambda p, b, h, i, j, a: p * toeplitz(a["times"], 37, 53),
    ),
    "blocks_two_pass_sink": Case(
        (2, 37, 53, 4, 2, 8, 8),
        lambda: BlockSparse(BLOCKS, 10, 18),
        lambda b, i, j: BLOCKS[i // 10, j // 18],
        call=dict(prob_mod=ProbMod(lambda p, i, a: jnp.sqrt(p + jnp.square(a["e"])), False)),
        aux={"e": (PerHead, (4,))},
        prob=lambda p, b, h, i, j, a: np.sqrt(p + np.square(a["e"])[:, None, None]),
        sink=True,
    ),
    "positions": Case(
        (2, 1, 53, 2, 1, 8, 8),
        lambda: Causal(),
        lambda b, i, j: j <= i,
        call=dict(score_mod=lambda s, i, a: s + a["w"] * (i.q - i.k)),
        aux={"w": (Scalar, ())},
        score=lambda s, b, h, i, j, a: s + a["w"] * (i - j),
        q_pos=np.array([[30], [52]]),
        k_pos=SHUFFLED,
    ),
    "dense_and_mod": Case(
        (1, 37, 53, 4, 4, 8, 8),
        lambda: DenseMask(jnp.array(DENSE)) | MaskMod(lambda idx: (idx.q + idx.k) % 7 == 0),
        lambda b, i, j: DENSE | ((i + j) % 7 == 0),
    ),
}


def run(case, x, weights, impl, tiles=(16, 16)):
    """((output, LSE), gradients of `score_of`) of an implementation."""
    call = dict(case.call)
    if case.mask:
        call["mask"] = case.mask()
    for name in ("q_pos", "k_pos"):
        if getattr(case, name) is not None:
            call[name] = jnp.array(getattr(case, name))

    def loss(x):
        aux = {name: kind(x[f"aux_{name}"]) for name, (kind, _) in case.aux.items()}
        o, lse = attention(
            x["q"], x["k"], x["v"], aux=aux, sink=x.get("sink"), head_map=case.head_map,
            return_lse=True, impl=impl, tiles=tiles, **call,
        )  # fmt: skip
        counted = jnp.where(jnp.isinf(lse), 0.0, lse * weights[1]).sum()
        return (o * weights[0]).sum() + counted, (o, lse)

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
    return out, grads


@pytest.mark.parametrize("impl", ["chunked", "xla", *KERNELS])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, impl):
    check(CASES[name], impl)


@pytest.mark.parametrize(
    ("impl", "tiles"),
    [("mosaic_tpu", (16, 32)), ("mosaic_tpu", (64, 16)), ("triton", (32, 16))],
)
def test_bands_in_oblong_tiles(impl, tiles):
    check(CASES["padding_urpe"], impl, tiles)


def check(case, impl, tiles=(16, 16)):
    x = draw(case)
    if "aux_cap" in x:
        x["aux_cap"] = np.float32(2.0)  # a cap near 0 has no derivative worth comparing
    rng = np.random.default_rng(3)
    b, l, _, h, _, _, kv = case.sizes
    weights = rng.standard_normal((b, l, h, kv)), rng.standard_normal((b, h, l))
    (o, lse), grads = run(case, x, jax.tree.map(np.float32, weights), impl, tiles)
    want_o, want_lse = attend(case, x)
    # float32 sums of some fifty terms of size 1, through exp: about 20 units of 1.2e-7 * |score|.
    np.testing.assert_allclose(o, want_o, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
    for key, grad in grads.items():
        direction = rng.standard_normal(np.shape(x[key]))
        want = slope(case, x, weights, key, direction)
        got = (np.float64(grad) * direction).sum()
        size = np.abs(np.float64(grad) * direction).sum()  # of the terms that cancel in the sum
        assert abs(got - want) <= 2e-5 * size + 1e-6, (key, got, want)


@pytest.mark.parametrize(
    ("impl", "mask"),
    [("chunked", Prefix(32)), *((x, KeyPadding(jnp.array([32, 0]))) for x in KERNELS)],
)
def test_tiles_that_nobody_sees_are_never_read(impl, mask):
    q, k, v = qkv(l=64)
    poisoned = [x.at[:, 32:].set(jnp.nan) for x in (k, v)]

    def loss(q, k, v):
        return jnp.square(attention(q, k, v, mask=mask, impl=impl, tiles=(16, 16))).sum()

    step = jax.jit(jax.grad(loss, (0, 1, 2)))
    for got, want in zip(step(q, *poisoned), step(q, k, v), strict=True):
        assert np.array_equal(got, want) and np.any(np.asarray(got) != 0)


def test_rows_that_see_nothing_are_zero_with_zero_gradient():
    case = CASES["prefix_per_row_head_map"]
    x = draw(case)
    ones = np.ones((2, 37, 5, 4), np.float32), np.ones((2, 5, 37), np.float32)
    for impl in ("chunked", "xla", *KERNELS):
        (o, lse), grads = run(case, x, ones, impl)
        assert np.all(np.asarray(o[1]) == 0) and np.all(np.asarray(lse[1]) == -np.inf)
        for name in "qkv":
            assert np.all(np.asarray(grads[name][1]) == 0)
            assert np.any(np.asarray(grads[name][0]) != 0) and np.all(np.isfinite(grads[name]))


def qkv(b=2, l=48, h=2, k=8, seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    return [jax.random.normal(key, (b, l, h, k), dtype) for key in keys]


@pytest.mark.slow
def test_dropout_is_the_same_for_every_implementation_and_tiling():
    q, k, _ = qkv(l=96)
    v = jnp.broadcast_to(jnp.eye(96)[None, :, None], (2, 96, 2, 96))  # the output is the weights
    call = dict(dropout=(0.25, jax.random.key(7)), mask=Causal())
    ways = [("xla", None), ("chunked", (96, 96)), ("chunked", (16, 32))]
    ways += [(impl, (32, 64)) for impl in KERNELS]
    weights = [np.asarray(attention(q, k, v, impl=i, tiles=t, **call)) for i, t in ways]
    plain = np.asarray(attention(q, k, v, mask=Causal(), impl="xla"))
    for other in weights[1:]:
        assert np.array_equal(weights[0] == 0, other == 0)
    kept = weights[0] != 0
    np.testing.assert_allclose(weights[2][kept], plain[kept] / 0.75, rtol=1e-4)
    # 4 * 4656 visible draws at 0.25: one standard deviation is 0.0032.
    assert abs(1 - kept[plain > 0].mean() - 0.25) < 0.016
    # Neither batch rows nor heads share their draws.
    assert (kept[0] != kept[1]).any() and (kept[:, :, 0] != kept[:, :, 1]).any()
    other_key = attention(q, k, v, impl="xla", dropout=(0.25, jax.random.key(8)), mask=Causal())
    assert (kept != (np.asarray(other_key) != 0)).any()

    def loss(v, impl):
        return attention(q, k, v, impl=impl, tiles=(32, 32), **call)[..., :3].sum()

    theirs = jax.grad(loss)(v, "xla")
    for impl in ("chunked", *KERNELS):
        np.testing.assert_allclose(jax.grad(loss)(v, impl), theirs, rtol=1e-4, atol=1e-6)


def test_merged_parts_equal_the_whole_with_gradients():
    q, k, v = qkv()
    sees = [KeyPadding(jnp.array([20, 0])), KeyPadding(jnp.array([5, 0]))]
    weights = jax.random.normal(jax.random.key(9), (2, 48, 2, 8))

    def score(o, lse):
        return (o * weights).sum() + jnp.where(jnp.isinf(lse), 0.0, jnp.sin(lse)).sum()

    def in_parts(q, k, v):
        parts = [(slice(0, 30), sees[0]), (slice(30, 48), sees[1])]
        return score(
            *merge(
                [
                    attention(q, k[:, cut], v[:, cut], mask=mask, return_lse=True, impl="chunked")
                    for cut, mask in parts
                ]
            )
        )

    def whole(q, k, v):
        column = jnp.arange(48)
        mask = KeyPadding(
            ((column < 20) | ((column >= 30) & (column < 35)))[None] & jnp.array([[True], [False]])
        )
        return score(*attention(q, k, v, mask=mask, return_lse=True, impl="xla"))

    ours, theirs = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(q, k, v) for f in (in_parts, whole))
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("impl", ["chunked", *KERNELS])
def test_bfloat16_is_accumulated_in_float32(impl):
    case = Case((1, 200, 200, 2, 1, 16, 16), Causal, lambda b, i, j: j <= i)
    x = {name: jnp.asarray(value, jnp.bfloat16) for name, value in draw(case).items()}
    o, lse = attention(*x.values(), mask=Causal(), return_lse=True, impl=impl, tiles=(64, 64))
    want, want_lse = attend(case, x)
    assert o.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    # Rounded once; kernels round the weights before they multiply the values, too.
    np.testing.assert_allclose(np.float64(o), want, rtol=2**-7, atol=2e-3)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


@pytest.mark.parametrize("impl", ["chunked", *KERNELS])
def test_masks_pass_through_jit_and_vmap(impl):
    q, k, v = qkv(b=3)
    lengths = jnp.array([48, 11, 1])
    mask = (Causal() & KeyPadding(lengths)) | Diagonal()

    def whole(q, mask=mask):
        return attention(q, k, v, mask=mask, impl=impl, tiles=(16, 16))

    jitted = jax.jit(lambda m: whole(q, m))
    np.testing.assert_allclose(jitted(mask), whole(q), rtol=1e-6, atol=1e-6)

    def one(q, k, v, length):
        rows = (x[None] for x in (q, k, v))
        mask = (Causal() & KeyPadding(length[None])) | Diagonal()
        return attention(*rows, mask=mask, impl=impl, tiles=(16, 16))[0]

    grads = [
        jax.jit(jax.grad(lambda q, f=f: jnp.square(f(q)).sum()))(q)
        for f in (lambda q: jax.vmap(one)(q, k, v, lengths), whole)
    ]
    np.testing.assert_allclose(*grads, rtol=1e-5, atol=1e-5)


def test_sharded_over_batch_and_heads_without_moving_activations():
    mesh_of = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"))
    arrays = qkv(b=2, l=64, h=4)
    step = jax.jit(
        jax.grad(
            lambda *x: jnp.square(
                attention(*x, mask=Causal(), impl="chunked", tiles=(16, 32))
            ).sum(),
            (0, 1, 2),
        )
    )
    want = step(*arrays)
    spec = jax.sharding.NamedSharding(mesh_of, jax.sharding.PartitionSpec("data", None, "tensor"))
    program = step.lower(*(jax.device_put(x, spec) for x in arrays)).compile()
    assert "all-gather" not in program.as_text() and "all-to-all" not in program.as_text()
    for got, expected in zip(
        program(*(jax.device_put(x, spec) for x in arrays)), want, strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_memory_is_linear_in_length():
    def temporary(length):
        arrays = [jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)] * 3
        grads = jax.grad(lambda *x: attention(*x, mask=Causal()).sum(), (0, 1, 2))
        return jax.jit(grads).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    at_2k, at_8k = temporary(2048), temporary(8192)
    assert at_8k < 4.2 * at_2k  # quadratic would be 16
    assert at_8k < 2**26  # the scores alone take 2^30 bytes


def test_tiles_that_nobody_sees_cost_nothing():
    q, k, v = (jax.ShapeDtypeStruct((1, 4096, 4, 64), jnp.float32),) * 3
    open_, causal, local = (plan(q, k, v, mask=mask) for mask in (Full(), Causal(), Window(255, 0)))
    assert open_.flops == 4 * 4 * 4096 * 4096 * 64
    assert causal.flops == pytest.approx(open_.flops / 2, rel=0.01)
    assert local.flops == pytest.approx(open_.flops * 256 / 4096, rel=0.1)
    assert open_.hbm_bytes > causal.hbm_bytes > local.hbm_bytes


def test_auto_explains_and_explicit_is_never_replaced():
    def of(length, **call):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        return plan(x, x, x, **call)

    assert (of(64).impl, of(1024).impl, of(1024, impl="xla").impl) == ("xla", "chunked", "xla")
    x = jax.ShapeDtypeStruct((4, 16384, 8, 64), jnp.float32)
    assert explain(x, x, x).startswith("chunked, tiles")
    with pytest.raises(
        AttentionUnsupported, match=r"32.0 GiB; allow_quadratic.*'chunked'"
    ) as error:
        plan(x, x, x, impl="xla")
    assert error.value.who_can == ("chunked", *KERNELS)
    assert plan(x, x, x, impl="xla", allow_quadratic=True).impl == "xla"
    for name in ("mosaic_gpu",):
        with pytest.raises(AttentionUnsupported, match=f"impl='{name}'.*'chunked', 'xla'"):
            of(64, impl=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(impl="flash"), "impl='flash' is unknown; allowed: .*'chunked'"),
        (dict(mask=np.ones((4, 4), bool)), "mask: needs a Mask"),
        (dict(mask=KeyPadding(jnp.ones(2))), "mask: KeyPadding.*float32"),
        (dict(mask=DenseMask(jnp.ones((4, 4), int))), "mask: DenseMask: needs booleans, got int32"),
        (dict(mask=MaskMod(lambda i: i.q - i.k)), "mask: MaskMod gives int32, it needs booleans"),
        (dict(aux={"b": jnp.ones(2)}), r"aux\['b'\]: declare how tiles read it"),
        (dict(aux={"b": PerHead(jnp.ones(3))}), r"aux\['b'\]: PerHead: shape \(3,\) does not"),
        (dict(aux={"b": Toeplitz(jnp.ones(8))}), r"aux\['b'\]: .*must be .*\(2, 7\)"),
        (dict(score_mod=lambda s, i, a: s + a["b"]), "score_mod: reads the operand 'b'.*has \\[]"),
        (dict(score_mod=lambda s, i, a: s.sum()), r"score_mod: must return.*got float32 \(\)"),
        (dict(score_mod=lambda s, i, a: s > 0), "score_mod: must return.*got bool"),
        (dict(score_mod=2.0), "score_mod: needs a function.*got float"),
        (dict(prob_mod=lambda p, i, a: p), "prob_mod: needs ProbMod.*got function"),
        (dict(head_map=(0, 2)), r"head_map: needs 2 key heads in \[0, 2\), got \(0, 2\)"),
        (dict(head_map=(0.5, 1)), r"head_map: needs 2 key heads.*0.5"),
        (dict(sink=jnp.ones(3)), r"sink: .*per query head, \(2,\), got float32 \(3,\)"),
        (dict(sink=[1.0, 2.0]), "sink: .*got list"),
        (dict(dropout=(1.0, jax.random.key(0))), r"dropout: rate must be in \[0, 1\), got 1.0"),
        (dict(dropout=(0.1, 7)), "dropout: needs a key of jax.random.key, got 7"),
        (dict(dropout=0.1), r"dropout: needs \(rate, key\), got 0.1"),
        (dict(q_pos=jnp.ones(4)), "q_pos: positions must be integers"),
        (dict(k_pos=jnp.ones(5, int)), r"k_pos: PerK: shape \(5,\)"),
        (dict(scale=jnp.float32(1.0)), "scale: needs a Python number.*learned"),
        (dict(tiles=(0, 4)), "tiles: needs two positive sizes"),
        (dict(tiles=8), "tiles: needs two positive sizes.*got 8"),
    ],
)
def test_wrong_calls_are_named_while_tracing(change, message):
    x = jax.ShapeDtypeStruct((2, 4, 2, 3), jnp.float32)
    with pytest.raises(ConfigError, match=message):
        plan(x, x, x, **change)


def test_a_traced_block_table_is_pointed_to_the_dense_mask():
    def run(table):
        return BlockSparse(table, 2, 2)

    with pytest.raises(ConfigError, match=r"blocks is traced.*DenseMask\(table.repeat"):
        jax.eval_shape(lambda table: run(table).blocks, jnp.ones((2, 2), bool))


def test_parts_that_do_not_belong_together_are_named():
    o, lse = jnp.ones((2, 4, 3, 8)), jnp.ones((2, 3, 4))
    with pytest.raises(ConfigError, match=r"merge: .*\[\]"):
        merge([])
    with pytest.raises(ConfigError, match=r"merge: .*\(2, 4, 3\)"):
        merge([(o, lse.swapaxes(1, 2))] * 2)
    with pytest.raises(ConfigError, match=r"merge: .*\(1, 4, 3, 8\)"):
        merge([(o, lse), (o[:1], lse[:1])])


def test_wrong_shapes_are_named():
    x = jnp.ones((2, 4, 2, 3))
    with pytest.raises(ValueError, match="3 query heads over 2 key heads needs a head_map"):
        attention(jnp.ones((2, 4, 3, 3)), x, x)
    with pytest.raises(ValueError, match="head sizes of q and k differ"):
        attention(jnp.ones((2, 4, 2, 5)), x, x)
    with pytest.raises(ValueError, match="types differ"):
        attention(x, x, x.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Segments(jnp.zeros((2, 5), int), jnp.zeros((2, 4), int)), r"Segments.*\(2, 5\).*\(B, L\)"),
        (Causal() & KeyPadding(jnp.zeros(3, int)), r"And.*\(3,\).*\(B\) = \(2,\)"),
        (Prefix(jnp.zeros((2, 2), int)), r"Prefix.*\(2, 2\)"),
        (DenseMask(jnp.ones((4, 3), bool)), r"DenseMask.*\(L, S\) = \(4, 4\)"),
        (DenseMask(jnp.ones((1, 2, 2, 4, 4), bool)), r"DenseMask.*\(1, 2, 2, 4, 4\)"),
    ],
)
def test_masks_that_do_not_fit_are_named(mask, message):
    x = jax.ShapeDtypeStruct((2, 4, 2, 3), jnp.float32)
    with pytest.raises(ValueError, match=f"mask: .*{message}"):
        plan(x, x, x, mask=mask)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float8_e4m3fn, jnp.complex64])
def test_types_that_nobody_computes_in_are_refused(dtype):
    x = jax.ShapeDtypeStruct((2, 4, 2, 3), dtype)
    with pytest.raises(ConfigError, match=f"needs one of bfloat16.*got {jnp.dtype(dtype).name}"):
        plan(x, x, x)


def test_a_closed_over_array_is_refused_not_silently_constant():
    q, k, v = qkv()

    def loss(c):
        return attention(q, k, v, score_mod=lambda s, i, a: c * s, impl="chunked").sum()

    with pytest.raises(Exception, match="closed-over value"):
        jax.grad(loss)(2.0)


def test_ste_round_rounds_exactly_and_passes_the_gradient():
    x = jnp.concatenate([jnp.linspace(-5, 5, 201), jnp.array([1e6 + 0.4, 2.0**24, 0.49999997])])
    assert np.array_equal(jax.jit(ste_round)(x), np.round(x))
    assert np.array_equal(jax.grad(lambda x: (ste_round(x) * x).sum())(x), np.round(x) + x)
    assert "custom" not in str(jax.make_jaxpr(jax.grad(ste_round))(1.0))


@pytest.mark.slow
def test_quantised_probabilities_train_straight_through():
    q, k, v = qkv(l=40)
    mod = ProbMod(lambda p, i, a: ste_round(p * a["levels"]) / a["levels"], linear=False)

    def loss(arrays, impl):
        aux = {"levels": Scalar(jnp.float32(64.0))}
        o = attention(*arrays, prob_mod=mod, aux=aux, mask=Causal(), impl=impl, tiles=(16, 16))
        return jnp.square(o).sum()

    step = jax.jit(jax.grad(loss), static_argnums=1)
    theirs = step([q, k, v], "xla")
    plain = jax.grad(lambda x: jnp.square(attention(*x, mask=Causal(), impl="xla")).sum())(
        [q, k, v]
    )
    for impl in ("chunked", *KERNELS):
        for got, want, smooth in zip(step([q, k, v], impl), theirs, plain, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
            assert float(jnp.abs(got).max()) > 0.1 and not np.allclose(want, smooth, atol=1e-3)
