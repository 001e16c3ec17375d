"""Linear attention compiled for accelerators that are not here: every type and size, no spills."""

import jax
import jax.numpy as jnp
import pytest

from jaxformer.kernels.linear_attention import linear_attention
from tests.kernels.aot import compile_for

pytestmark = pytest.mark.aot


def program(shape, dtype, causal, impl):
    """Forward and backward pass, and its arguments."""
    b, l, h, k, n = shape
    arrays = [jax.ShapeDtypeStruct((b, l, h, size), dtype) for size in (k, k, n)]

    def both(*x):
        return jax.value_and_grad(
            lambda *x: linear_attention(*x, causal=causal, impl=impl).sum(), (0, 1, 2)
        )(*x)

    return both, arrays


@pytest.mark.parametrize("target", ["v5e", "v5p"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((64, 64), "bfloat16"),
        ((128, 128), "bfloat16"),
        ((256, 256), "float32"),
        ((40, 72), "bfloat16"),
    ],
)
def test_tpu(sizes, dtype, causal, target):
    both, arrays = program((2, 4000, 4, *sizes), jnp.dtype(dtype), causal, "mosaic_tpu")
    text = compile_for(target, both, *arrays).program.as_text()
    assert "tpu_custom_call" in text


@pytest.mark.parametrize("target", ["h200", "a100"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((64, 64), "bfloat16"),
        ((128, 128), "bfloat16"),
        ((256, 256), "bfloat16"),
        ((64, 256), "bfloat16"),
        ((64, 64), "float32"),
        ((128, 128), "float32"),
    ],
)
def test_triton(sizes, dtype, causal, target, tmp_path):
    both, arrays = program((2, 4096, 4, *sizes), jnp.dtype(dtype), causal, "triton")
    compiled = compile_for(target, both, *arrays, dump=tmp_path)
    assert compiled.kernels and not compiled.spills


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (256, 256), (64, 256), (40, 72)])
def test_mosaic_gpu(sizes, causal, tmp_path):
    # Another length for each: a kernel that was compiled before leaves no report.
    both, arrays = program((2, 4096 + sum(sizes), 4, *sizes), jnp.bfloat16, causal, "mosaic_gpu")
    compiled = compile_for("h200", both, *arrays, dump=tmp_path)
    assert any("mosaic_gpu" in name for name in compiled.kernels) and not compiled.spills
