"""Every variant of the Mosaic GPU kernels compiles for sm_90a, and spills nothing."""

import jax.numpy as jnp
import pytest

from jaxformer.kernels.attention import Causal
from jaxformer.kernels.attention.mosaic_gpu import op
from jaxformer.kernels.target import Target
from tests.kernels.aot import compile_for
from tests.kernels.test_aot import VARIANTS, arrays, program

pytestmark = pytest.mark.aot


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(op, "target", lambda: Target("gpu", "NVIDIA H200"))


# Head size 256, backward: a sum of 128 registers, two products of 32, and the operands of the mod
# are more than a thread's 240 registers. Bytes per thread, stored and loaded, per tile at most.
SPILLS = {"prefix_capped": 16, "urpe": 32, "bias": 160, "dropout": 64}


def check(target_folder, call, kinds, x, allowed=0):
    compiled = compile_for("h200", program("mosaic_gpu", call, kinds), x, dump=target_folder)
    assert max(compiled.spills.values(), default=0) <= allowed, compiled.kernels
    return compiled


@pytest.mark.parametrize("k", [64, 128, 256])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, k, tmp_path):
    call, kinds = VARIANTS[name]
    check(tmp_path, call, kinds, arrays(kinds, k=k), SPILLS.get(name, 0) if k == 256 else 0)


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
    # The forward and two backward kernels; a third where dK and dV need launches of their own.
    assert compiled.program.as_text().count('custom_call_target="mosaic_gpu') == 3 + (k > 128)


def test_head_sizes_that_differ(tmp_path):
    x = arrays({}, 128)
    x["v"] = x["v"].update(shape=(*x["v"].shape[:3], 64))
    check(tmp_path, dict(mask=Causal()), {}, x)
