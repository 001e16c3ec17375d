"""Every variant of the kernels is compiled for the accelerators, forward and backward.

No device is needed, but the compilers are: `./launch/local test --aot` installs them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.kernels.attention import (
    BlockSparse,
    Causal,
    DenseMask,
    Diagonal,
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
    ste_round,
)
from tests.kernels.aot import compile_for

pytestmark = pytest.mark.aot

B, H, G, L = 2, 4, 2, 512
IDS = np.repeat(np.arange(4), L // 4)[None].repeat(B, 0)
CAP = dict(score_mod=lambda s, i, a: 30.0 * jnp.tanh(s / 30.0))
TIMES_BAND = ProbMod(lambda p, i, a: p * a["band"], linear=True)
QUANTISED = ProbMod(lambda p, i, a: ste_round(p * 15.0) / 15.0, linear=False)

# name -> (keywords of `attention`, operands by shape); arrays of masks are constants here.
VARIANTS = {
    "full": ({}, {}),
    "causal": (dict(mask=Causal()), {}),
    "window_sink": (dict(mask=Window(100, 0)), {"sink": (H,)}),
    "prefix_capped": (dict(mask=Prefix(200) | Diagonal(), **CAP), {}),
    "prefix_array": (dict(mask=Prefix(np.array([300, 0]))), {}),
    "segments": (dict(mask=Segments(IDS, IDS) & Causal()), {}),
    "padding": (dict(mask=KeyPadding(np.array([3, 400]))), {}),
    "dense": (dict(mask=DenseMask(np.ones((B, 1, L, L), bool))), {}),
    "mask_mod": (dict(mask=MaskMod(lambda i: (i.q * 3 + i.k) & 7 != 0)), {}),
    "blocks": (dict(mask=BlockSparse(np.eye(6, dtype=bool), 100, 100)), {}),
    "positions": (dict(mask=Causal(), q_pos=np.arange(L), k_pos=np.arange(L)), {}),
    "alibi": (
        dict(score_mod=lambda s, i, a: s - a["slope"] * jnp.abs(i.q - i.k), mask=Causal()),
        {"slope": (PerHead, (H,))},
    ),
    "urpe": (
        dict(score_mod=lambda s, i, a: s + a["add"], prob_mod=TIMES_BAND, mask=Causal()),
        {"add": (Toeplitz, (H, 2 * L - 1)), "band": (Toeplitz, (2 * L - 1,))},
    ),
    "bias": (
        dict(score_mod=lambda s, i, a: s + a["b"] + a["r"] * a["c"] * a["x"], mask=Causal()),
        {"b": (Tile, (1, H, L, L)), "r": (PerQ, (L,)), "c": (PerK, (B, 1, L)), "x": (Scalar, ())},
    ),
    "quantised": (dict(prob_mod=QUANTISED, mask=Causal()), {}),
    "dropout": (dict(dropout=(0.1, 7), mask=Causal()), {}),
    "head_map": (dict(head_map=(0, 1, 1, 0), mask=Causal()), {}),
}


def program(impl, call, kinds):
    """Output, LSE and every gradient of a variant, as one function of its arrays."""
    call = dict(call)
    if "dropout" in call:
        rate, seed = call["dropout"]
        call["dropout"] = rate, jax.random.key(seed)

    def loss(x):
        aux = {name: kind[0](x[name]) for name, kind in kinds.items() if name != "sink"}
        o, lse = attention(
            x["q"], x["k"], x["v"], aux=aux, sink=x.get("sink"), return_lse=True, impl=impl, **call
        )
        return (o.astype(jnp.float32) ** 2).sum() + lse.sum()

    return jax.value_and_grad(loss)


def arrays(kinds, k=64, l=L, s=L, dtype=jnp.bfloat16):
    shapes = {"q": (B, l, H, k), "k": (B, s, G, k), "v": (B, s, G, k)}
    x = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    for name, kind in kinds.items():
        shape = kind if name == "sink" else kind[1]
        x[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return x


def check_tpu(target, call, kinds, x):
    text = compile_for(target, program("mosaic_tpu", call, kinds), x).program.as_text()
    shared = any(kind[0] is Tile for name, kind in kinds.items() if name != "sink")
    # Forward, dQ, dK and dV; the bias of VARIANTS is shared by batch rows.
    assert text.count('custom_call_target="tpu_custom_call"') == 3 + shared


@pytest.mark.parametrize("name", VARIANTS)
def test_tpu_variants(name):
    call, kinds = VARIANTS[name]
    check_tpu("v5e", {"tiles": (128, 128), **call}, kinds, arrays(kinds))


@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("k", [64, 128, 256])
def test_tpu_head_sizes_with_tiles_of_their_own(k, target):
    call, kinds = VARIANTS["causal"]
    check_tpu(target, call, kinds, arrays(kinds, k=k))


@pytest.mark.parametrize(
    ("l", "s", "k", "dtype"),
    [(333, 700, 40, jnp.bfloat16), (1, 700, 64, jnp.bfloat16), (200, 200, 64, jnp.float32)],
)
def test_tpu_odd_shapes(l, s, k, dtype):
    check_tpu("v5e", dict(mask=Causal(s - l)), {}, arrays({}, k, l, s, dtype))


def check_triton(target, call, kinds, x, dump):
    compiled = compile_for(target, program("triton", call, kinds), x, dump=dump)
    assert len([name for name in compiled.kernels if name.startswith("kernel")]) >= 3
    assert not compiled.spills


@pytest.mark.parametrize("target", ["h200", "a100"])
@pytest.mark.parametrize("name", VARIANTS)
def test_triton_variants(name, target, tmp_path):
    call, kinds = VARIANTS[name]
    check_triton(target, call, kinds, arrays(kinds), tmp_path)


@pytest.mark.parametrize("target", ["h200", "a100"])
@pytest.mark.parametrize("k", [128, 256])
@pytest.mark.parametrize("name", ["prefix_capped", "urpe", "bias", "quantised", "dropout"])
def test_triton_mods_at_large_head_sizes(name, k, target, tmp_path):
    call, kinds = VARIANTS[name]
    check_triton(target, call, kinds, arrays(kinds, k=k), tmp_path)


@pytest.mark.parametrize("target", ["h200", "a100"])
@pytest.mark.parametrize(
    ("l", "s", "k", "dtype"),
    [
        (L, L, 128, jnp.bfloat16),
        (L, L, 256, jnp.bfloat16),
        (333, 700, 40, jnp.bfloat16),
        (1, 700, 64, jnp.bfloat16),
        (200, 200, 64, jnp.float32),
    ],
)
def test_triton_shapes(l, s, k, dtype, target, tmp_path):
    check_triton(target, dict(mask=Causal(s - l)), {}, arrays({}, k, l, s, dtype), tmp_path)
