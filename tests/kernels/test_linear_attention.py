"""Linear attention: every implementation against float64 NumPy, and decoding against both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxformer.kernels import target
from jaxformer.kernels.linear_attention import (
    LinearAttentionUnsupported,
    Tiles,
    api,
    causal_sum,
    explain,
    key_value_state,
    linear_attention,
    linear_attention_step,
    plan,
)
from jaxformer.parallel.mesh import make_mesh
from tests.kernels.mosaic_simulator import simulated

IMPLEMENTATIONS = ("chunked", "triton", "mosaic_tpu")

# (B, L, S, H, K, N), causal, type, tiles; kernels run in the interpreter here
CASES = {
    "odd": ((2, 77, 77, 3, 5, 7), True, "float32", Tiles(16)),
    "odd_segments": ((1, 131, 131, 2, 16, 40), True, "float32", Tiles(16, 16, 2)),
    "even": ((1, 64, 64, 1, 32, 16), True, "float32", None),
    "bfloat16": ((2, 70, 70, 1, 16, 16), True, "bfloat16", Tiles(32)),
    "one_query": ((2, 1, 1, 2, 8, 8), True, "float32", None),
    "cross": ((2, 77, 50, 3, 5, 7), False, "float32", Tiles(16)),
    "cross_bfloat16": ((1, 33, 90, 2, 16, 24), False, "bfloat16", None),
    "cross_one_query": ((1, 1, 40, 1, 8, 8), False, "float32", None),
}

# Chunks of 64 bfloat16 positions; the simulator plays every thread block, so few of them
HOPPER = {
    "odd": ((1, 130, 130, 1, 40, 72), True, "bfloat16", None),
    "segments": ((1, 200, 200, 1, 64, 128), True, "bfloat16", Tiles(64, 64, 2)),
    "one_query": ((2, 1, 1, 1, 64, 64), True, "bfloat16", None),
    "cross_segments": ((1, 70, 250, 1, 128, 64), False, "bfloat16", Tiles(64, None, 2)),
}
HOPPER = {f"hopper_{name}": case for name, case in HOPPER.items()}


def arrays(shape=(2, 77, 77, 3, 5, 7), dtype="float32", seed=0):
    b, l, s, h, k, n = shape
    rng = np.random.default_rng(seed)
    shapes = ((b, l, h, k), (b, s, h, k), (b, s, h, n))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def reference(q, k, v, do, causal):
    """Output and gradients from the whole matrix of scores, float64."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))

    def lower(x):
        return np.tril(x) if causal else x

    scores = lower(np.einsum("blhk,bshk->bhls", q, k))
    dscores = lower(np.einsum("blhn,bshn->bhls", do, v))
    return (
        np.einsum("bhls,bshn->blhn", scores, v),
        np.einsum("bhls,bshk->blhk", dscores, k),
        np.einsum("bhls,blhk->bshk", dscores, q),
        np.einsum("bhls,blhn->bshn", scores, do),
    )


@pytest.mark.parametrize(
    ("case", "impl"),
    [
        *((case, impl) for case in CASES for impl in IMPLEMENTATIONS),
        *((case, "mosaic_gpu") for case in ("cross_bfloat16", *HOPPER)),
    ],
)
def test_values_and_gradients_are_those_of_the_quadratic_sum(case, impl):
    shape, causal, dtype, tiles = (CASES | HOPPER)[case]
    if impl == "mosaic_tpu" and tiles is not None:
        tiles = Tiles(tiles.chunk)
    q, k, v = arrays(shape, dtype)
    do = arrays(shape, dtype, seed=1)[0]
    do = jnp.broadcast_to(do.sum(-1, keepdims=True), (*do.shape[:3], shape[-1]))
    do = do + jnp.arange(shape[-1], dtype=do.dtype)

    def both(q, k, v, do):
        o, pull = jax.vjp(
            lambda *x: linear_attention(*x, causal=causal, impl=impl, tiles=tiles), q, k, v
        )
        return o, *pull(do.astype(o.dtype))

    if impl != "mosaic_gpu":
        got = jax.jit(both)(q, k, v, do)
    else:
        with simulated():
            got = both(q, k, v, do)
    # bfloat16 keeps 8 bits: of inputs exactly, of scores and states on the way in kernels.
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    for name, x, want in zip(
        ("o", "dq", "dk", "dv"), got, reference(q, k, v, do, causal), strict=True
    ):
        error = np.abs(np.asarray(x, np.float64) - want).max() / np.abs(want).max()
        assert error < tolerance, f"{name}: {error:.1e}"


def test_decoding_continues_any_prefix():
    q, k, v = arrays()
    parallel = linear_attention(q, k, v, causal=True, tiles=Tiles(32))
    state = key_value_state(k[:, :70], v[:, :70])
    for t in range(70, 77):
        state, o = linear_attention_step(state, q[:, t], k[:, t], v[:, t])
        np.testing.assert_allclose(o, parallel[:, t], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state, key_value_state(k, v), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_future_changes_nothing(impl):
    q, k, v = arrays()
    changed = [x.at[:, 40:].set(9.0) for x in (q, k, v)]
    one, two = (
        linear_attention(*x, causal=True, impl=impl, tiles=Tiles(16))[:, :40]
        for x in ((q, k, v), changed)
    )
    assert np.array_equal(one, two)


def test_segments_change_nothing_but_the_order_of_sums():
    x = arrays((1, 96, 96, 2, 16, 16))
    whole, cut = (
        linear_attention(*x, causal=True, tiles=tiles) for tiles in (Tiles(16), Tiles(16, None, 3))
    )
    np.testing.assert_allclose(whole, cut, rtol=1e-4, atol=1e-4)


def test_normalisers_a_column_of_ones_and_prefix_sums_agree():
    q, k, v = arrays()
    ones = jnp.ones((*v.shape[:3], 1))
    column = linear_attention(q, k, ones, causal=True, tiles=Tiles(16))[..., 0]
    sums = jnp.einsum("blhk,blhk->blh", q, causal_sum(k))
    np.testing.assert_allclose(column, sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_sums_of_bfloat16_are_float32(impl):
    ones = jnp.ones((1, 1000, 1, 1), jnp.bfloat16)  # bfloat16 cannot count beyond 256
    assert causal_sum(ones)[0, -1, 0, 0] == 1000
    o = linear_attention(ones, ones, ones, causal=True, impl=impl)
    assert o.dtype == jnp.float32 and o[0, -1, 0, 0] == 1000


@pytest.mark.parametrize("causal", [True, False])
def test_devices_of_a_mesh_take_rows_and_heads(causal):
    x = arrays((4, 40, 40, 2, 16, 16))

    @jax.jit
    def both(*x):
        attend = functools.partial(linear_attention, causal=causal, impl="triton")
        return jax.value_and_grad(lambda *x: jnp.sin(attend(*x)).sum(), (0, 1, 2))(*x)

    alone = both(*x)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
        placed = [jax.device_put(a, sharding) for a in x]
        program = both.lower(*placed).compile()
        divided = program(*placed)
    assert "all-gather" not in program.as_text()
    assert divided[1][0].sharding.is_equivalent_to(sharding, 4)
    for one, many in zip(jax.tree.leaves(alone), jax.tree.leaves(divided), strict=True):
        np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-4)


def test_memory_is_linear_in_length():
    def temporary(length):
        x = [jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)] * 3
        grads = jax.grad(lambda *x: linear_attention(*x, causal=True).sum(), (0, 1, 2))
        return jax.jit(grads).lower(*x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 4.2 * temporary(2048)


@pytest.mark.slow
def test_second_derivatives_of_the_bidirectional_form():
    q, k, v = arrays((1, 4, 4, 1, 2, 2))
    hessian = jax.hessian(lambda k: linear_attention(q, k, v, causal=False).sum())(k)
    assert np.abs(hessian).max() == 0  # linear in k


@pytest.mark.parametrize(
    ("platform", "causal", "shape", "chosen"),
    [
        ("cpu", True, (2, 4096, 4, 64), "chunked"),
        ("tpu", True, (2, 4096, 4, 64), "mosaic_tpu"),
        ("gpu", False, (2, 4096, 4, 64), "triton"),
        ("NVIDIA H200", True, (2, 4096, 4, 64), "mosaic_gpu"),
        ("gpu", True, (2, 40, 4, 64), "chunked"),
        ("gpu", True, (2, 4096, 4, 512), "chunked"),
    ],
)
def test_the_choice_is_said(platform, causal, shape, chosen, monkeypatch):
    where = target.Target("gpu" if "NVIDIA" in platform else platform, platform)
    monkeypatch.setattr(api, "target", lambda: where)
    x = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3
    found = plan(*x, causal=causal)
    assert found.impl == chosen and found.why
    assert explain(*x, causal=causal).startswith(chosen)


def test_the_choice_is_logged_when_traced(caplog):
    x = arrays((1, 20, 20, 1, 4, 4))
    with caplog.at_level("INFO", logger="jaxformer.kernels"):
        jax.eval_shape(lambda *x: linear_attention(*x, causal=True), *x)
    assert caplog.messages == [
        f"causal linear attention of (1, 20, 1, 4): {explain(*x, causal=True)}"
    ]


def test_a_plan_counts_what_is_linear():
    def cost(length):
        x = [jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16)] * 3
        return plan(*x, causal=True, impl="chunked")

    short, long = cost(4096), cost(8192)
    assert long.flops == 2 * short.flops and long.hbm_bytes == 2 * short.hbm_bytes
    # per position 2 K N for the state, and on average 64.5 scores of K + N; 2 per multiply-add
    assert short.flops == 2 * 2 * (4096 * 2 * 64 * 64 + 4096 * 129 // 2 * 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(shape=(1, 9, 9, 1, 300, 8)), "head size 300"),
        (dict(dtype="float16"), "type float16"),
        (dict(tiles=Tiles(48)), "chunk=48"),
        (dict(impl="mosaic_tpu", tiles=Tiles(16, None, 2)), "one segment"),
        (dict(impl="mosaic_gpu"), "type float32"),
        (dict(impl="mosaic_gpu", tiles=Tiles(128)), "64 rows of the tensor cores"),
    ],
)
def test_refusals_say_who_can(changes, message):
    changes = {"shape": (1, 9, 9, 1, 8, 8), "dtype": "float32", "impl": "triton"} | changes
    x = arrays(changes.pop("shape"), changes.pop("dtype"))
    with pytest.raises(LinearAttentionUnsupported, match=f"{message}.*who can: .*chunked"):
        linear_attention(*x, causal=True, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(s=50), "causal needs L = S"),
        (dict(cut=4), "batch, heads or feature size differ"),
        (dict(dtype="bfloat16"), "types differ"),
        (dict(tiles=Tiles(0)), "positive sizes"),
        (dict(impl="cudnn"), "impl='cudnn' is unknown; allowed"),
    ],
)
def test_mistakes_are_named(changes, message):
    q, k, v = arrays((2, 77, changes.pop("s", 77), 3, 5, 7))
    q = q[..., : changes.pop("cut", None)].astype(changes.pop("dtype", q.dtype))
    with pytest.raises(ValueError, match=message):
        linear_attention(q, k, v, causal=True, **changes)
