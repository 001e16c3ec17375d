"""Every variant of the Mosaic GPU kernels compiles for sm_90a, and spills nothing."""

import jax.numpy as jnp
import pytest

from jaxformer.kernels.attention import Causal
from tests.kernels.aot import compile_for
from tests.kernels.test_aot import VARIANTS, arrays, program

pytestmark = pytest.mark.aot


def check(target_folder, call, kinds, x):
    compiled = compile_for("h200", program("mosaic_gpu", call, kinds), x, dump=target_folder)
    assert not compiled.spills
    return compiled


@pytest.mark.parametrize("k", [64, 128, 256])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, k, tmp_path):
    call, kinds = VARIANTS[name]
    check(tmp_path, call, kinds, arrays(kinds, k=k))


@pytest.mark.parametrize("name", ["urpe", "bias", "dropout"])  # what takes the most registers
def test_head_size_192(name, tmp_path):
    call, kinds = VARIANTS[name]
    check(tmp_path, call, kinds, arrays(kinds, k=192))


@pytest.mark.parametrize(
    ("l", "s", "k", "dtype", "tiles"),
    [
        (333, 700, 40, jnp.bfloat16, None),
        (1, 700, 64, jnp.float16, None),
        (197, 197, 72, jnp.bfloat16, (128, 64)),
        (512, 512, 192, jnp.bfloat16, None),
    ],
)
def test_odd_shapes(l, s, k, dtype, tiles, tmp_path):
    call = dict(mask=Causal(s - l), tiles=tiles)
    compiled = check(tmp_path, call, {}, arrays({}, k, l, s, dtype))
    # Shapes of no other test: a kernel that was compiled before leaves no report.
    assert any("mosaic_gpu" in name for name in compiled.kernels)
    # The forward and two backward kernels; a third where dK and dV need launches of their own.
    assert compiled.program.as_text().count('custom_call_target="mosaic_gpu') == 3 + (k > 128)


def test_head_sizes_that_differ(tmp_path):
    x = arrays({}, 128)
    x["v"] = x["v"].update(shape=(*x["v"].shape[:3], 64))
    check(tmp_path, dict(mask=Causal()), {}, x)
