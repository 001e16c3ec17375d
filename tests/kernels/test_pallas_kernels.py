"""What the Pallas kernels refuse, and what they rewrite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.kernels.attention import AttentionUnsupported, ProbMod, plan, ste_round
from jaxformer.kernels.attention.triton.lowering import lowered
from tests.kernels.test_library_kernels import on


def gelu(s, idx, aux):
    return jax.nn.gelu(s, approximate=False)


@pytest.mark.parametrize(
    ("impl", "platform", "dtype", "call", "message"),
    [
        ("mosaic_tpu", "tpu", jnp.float16, {}, "type float16: .* float32 and bfloat16; .*'xla'"),
        ("mosaic_tpu", "gpu", jnp.bfloat16, {}, "platform NVIDIA H200.*for TPUs; .*'triton'"),
        ("mosaic_tpu", "tpu", jnp.bfloat16, dict(tiles=(128, 16)), r"tiles \(128, 16\): .*of 128"),
        ("triton", "tpu", jnp.bfloat16, {}, "platform TPU v5 lite: .*for GPUs; .*'mosaic_tpu'"),
        ("triton", "gpu", jnp.bfloat16, dict(tiles=(48, 16)), r"tiles \(48, 16\): .*powers of two"),
        ("triton", "gpu", jnp.bfloat16, dict(score_mod=gelu), "erfc? in a mod: .*'chunked'"),
        (
            "triton",
            "gpu",
            jnp.bfloat16,
            dict(prob_mod=ProbMod(lambda p, i, a: gelu(p, i, a), linear=False)),
            "erfc? in a mod",
        ),
    ],
)
def test_what_cannot_run_is_named_with_who_can(impl, platform, dtype, call, message):
    x = jax.ShapeDtypeStruct((2, 256, 2, 64), dtype)
    with on(platform), pytest.raises(AttentionUnsupported, match=f"impl='{impl}'.*{message}"):
        plan(x, x, x, impl=impl, **call)


def test_what_can_run_is_not_refused():
    x = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)
    for impl, platform, tiles in (("mosaic_tpu", "tpu", (128, 256)), ("triton", "gpu", (32, 64))):
        mod = ProbMod(lambda p, i, a: ste_round(p), linear=False)
        with on(platform):
            assert plan(x, x, x, impl=impl, tiles=tiles, prob_mod=mod).impl == impl


def test_rounding_for_triton_is_exact_and_straight_through():
    halves = jnp.arange(-9.0, 9.0) / 2
    x = jnp.concatenate([halves, jnp.array([0.49999997, 8388609.0, 4194304.5, 1e9, -3.7])])
    assert np.array_equal(lowered(jnp.round)(x), jnp.round(x))
    assert "round" not in str(jax.make_jaxpr(lowered(ste_round))(x)).replace("rounding", "")
    slope = jax.grad(lambda x: (lowered(ste_round)(x) * x).sum())(x)
    assert np.array_equal(slope, jnp.round(x) + x)
