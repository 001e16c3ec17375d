"""Attention on eight devices equals attention on one, for every way a call can be divided."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.kernels.attention import (
    Causal,
    DenseMask,
    Full,
    KeyPadding,
    PerHead,
    PerQ,
    Prefix,
    ProbMod,
    Scalar,
    Segments,
    Tile,
    Toeplitz,
    Window,
    attention,
)
from jaxformer.parallel.mesh import make_mesh

B, L, S, H = 4, 24, 40, 8
RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def score(s, idx, aux):
    s = s + aux["slope"] * (idx.q - idx.k) + aux["rows"] + aux["band"] + 0.1 * idx.b - 0.2 * idx.h
    return s * aux["t"]


CALLS = {
    "causal, dropout": dict(mask=Causal(3), dropout=(0.3, jax.random.key(1))),
    "window, sink": dict(mask=Window(5, 9), sink=array(H)),
    "mods": dict(
        mask=Full(),
        score_mod=score,
        prob_mod=ProbMod(lambda p, idx, aux: p * aux["c"], linear=True),
        aux={
            "slope": PerHead(array(H)),
            "rows": PerQ(array(B, 1, L)),
            "band": Toeplitz(array(H, L + S - 1)),
            "c": Tile(array(1, H, L, S)),
            "t": Scalar(jnp.float32(0.7)),
        },
    ),
    "arrays in masks": dict(
        mask=(Prefix(jnp.array([3, 9, 40, 0])) | Causal())
        & KeyPadding(jnp.array([40, 31, 7, 22]))
        & Segments(jnp.arange(L)[None].repeat(B, 0) % 3, jnp.arange(S) % 3)
        & DenseMask(jnp.asarray(RNG.random((H, L, S)) < 0.9)),
    ),
    "positions": dict(mask=Causal(), q_pos=jnp.arange(L) + 7, k_pos=jnp.arange(S)[None] * 2 % 37),
    "head map": dict(mask=Causal(), head_map=(0, 1, 1, 0, 1, 0, 0, 0)),
}


@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "tensor": 4}, pytest.param({"fsdp": 2, "sequence": 4}, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", CALLS)
def test_devices_agree_with_one(name, sizes):
    check(name, sizes, "chunked", (8, 16))


@pytest.mark.parametrize(("name", "impl"), [("mods", "mosaic_tpu"), ("causal, dropout", "triton")])
def test_kernels_are_divided_likewise(name, impl):
    check(name, {"data": 4, "tensor": 2}, impl, (16, 16))


def check(name, sizes, impl, tiles):
    call = dict(CALLS[name])
    qkv = array(B, L, H, 8), array(B, S, 2, 8), array(B, S, 2, 8)
    arrays = qkv, {x: call.pop(x) for x in ("sink", "aux") if x in call}
    weights = array(B, L, H, 8), array(B, H, L)

    def loss(arrays):
        qkv, rest = arrays
        o, lse = attention(*qkv, **rest, **call, return_lse=True, impl=impl, tiles=tiles)
        return (o * weights[0]).sum() + (jnp.where(lse == -jnp.inf, 0, lse) * weights[1]).sum(), o

    run = jax.value_and_grad(loss, has_aux=True)
    expected = jax.jit(run)(arrays)
    with jax.set_mesh(make_mesh(sizes)):
        text = jax.jit(run).lower(arrays).as_text()
        found = jax.device_get(jax.jit(run)(arrays))
    assert "shard" in text
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


def test_what_cannot_be_divided_stays_whole():
    q = array(3, 5, 3, 8)  # neither 3 rows nor 3 heads over 8 devices
    expected = attention(q, q, q)
    with jax.set_mesh(make_mesh({"data": 4, "tensor": 2})):
        found = jax.jit(attention)(q, q, q)
    np.testing.assert_allclose(jax.device_get(found), expected, rtol=1e-6, atol=1e-6)
