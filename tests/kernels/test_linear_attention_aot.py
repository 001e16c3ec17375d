"""Linear attention compiled for accelerators that are not here: every type and size, no spills."""

import jax
import jax.numpy as jnp
import pytest

from jaxformer.kernels.linear_attention import linear_attention
from jaxformer.papers.flowformer.model import attend_causally
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


@pytest.mark.parametrize(
    ("sizes", "dtype", "causal", "target"),
    [
        ((64, 64), "bfloat16", True, "v5e"),
        ((128, 128), "bfloat16", False, "v5e"),
        ((256, 256), "float32", True, "v5e"),
        ((256, 256), "float32", False, "v5e"),
        ((40, 72), "bfloat16", True, "v5e"),
        ((128, 128), "bfloat16", True, "v5p"),
        ((128, 128), "bfloat16", True, "v6e"),
    ],
)
def test_tpu(sizes, dtype, causal, target):
    both, arrays = program((2, 4000, 4, *sizes), jnp.dtype(dtype), causal, "mosaic_tpu")
    text = compile_for(target, both, *arrays).program.as_text()
    assert "tpu_custom_call" in text


@pytest.mark.parametrize("target", ["h200", "a100"])
@pytest.mark.parametrize(
    ("sizes", "dtype", "causal"),
    [
        ((64, 64), "bfloat16", True),
        ((128, 128), "bfloat16", True),
        ((128, 128), "bfloat16", False),
        ((256, 256), "bfloat16", True),
        ((64, 64), "float32", True),
        ((128, 128), "float32", True),
        ((128, 128), "float32", False),
    ],
)
def test_triton(sizes, dtype, causal, target, tmp_path):
    both, arrays = program((2, 4096, 4, *sizes), jnp.dtype(dtype), causal, "triton")
    compiled = compile_for(target, both, *arrays, dump=tmp_path)
    assert compiled.kernels and not compiled.spills


@pytest.mark.parametrize(
    ("sizes", "causal"),
    [
        ((64, 64), True),
        ((128, 128), True),
        ((128, 128), False),
        ((256, 256), True),
        ((64, 256), True),
        ((40, 72), True),
        ((40, 72), False),
    ],
)
def test_mosaic_gpu(sizes, causal, tmp_path):
    # Another length for each: a kernel that was compiled before leaves no report.
    both, arrays = program((2, 4096 + sum(sizes), 4, *sizes), jnp.bfloat16, causal, "mosaic_gpu")
    compiled = compile_for("h200", both, *arrays, dump=tmp_path)
    assert any("mosaic_gpu" in name for name in compiled.kernels) and not compiled.spills


def test_flow_attention_gets_the_kernel():
    """Without a change: it calls the op, whose choice is by target, in the model's own type."""
    x = [jax.ShapeDtypeStruct((1, 1000, 2, 64), jnp.bfloat16)] * 3

    def flow(q, k, v):
        return attend_causally(jax.nn.sigmoid(q), jax.nn.sigmoid(k), v)[0]

    text = compile_for("h200", flow, *x).program.as_text()
    assert "mosaic_gpu" in text
