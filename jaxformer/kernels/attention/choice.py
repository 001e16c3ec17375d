"""The implementations of attention, and which of them `impl="auto"` takes.

The table of `auto`: what is measured or published to be the fastest that can do the whole call.
Nothing falls back to a quadratic form; a call that nobody can do raises with the reasons.
"""

from __future__ import annotations

import math

import jax

from jaxformer.kernels.attention import cudnn, mosaic_gpu, mosaic_tpu, splash, triton
from jaxformer.kernels.attention.chunked import chunked
from jaxformer.kernels.attention.request import Request
from jaxformer.kernels.attention.xla import xla
from jaxformer.kernels.dispatch import Implementation, KernelUnsupported, Refusal, choose
from jaxformer.kernels.target import target

QUADRATIC_BYTES = 2 * 2**30  # the largest score matrix that `xla` makes without being told to
SMALL = 384 * 384  # L * S below which `xla` is the faster on a CPU; at 512 it is twice as slow


class AttentionUnsupported(KernelUnsupported):
    """An attention implementation was asked for something that it cannot do."""


def _too_large(request: Request) -> Refusal | None:
    size = math.prod(request.sizes) * 4
    if request.rules.allow_quadratic or size <= QUADRATIC_BYTES:
        return None
    why = f"the scores take {size / 2**30:.1f} GiB; allow_quadratic=True allows it"
    return Refusal("this length", why)


IMPLEMENTATIONS = (
    Implementation("chunked", lambda request: None, jax.jit(chunked)),
    Implementation("xla", _too_large, jax.jit(xla)),
    Implementation("cudnn", cudnn.refuse, cudnn.cudnn),
    Implementation("splash", splash.refuse, splash.splash),
    Implementation("mosaic_tpu", mosaic_tpu.refuse, jax.jit(mosaic_tpu.mosaic_tpu)),
    Implementation("triton", triton.refuse, jax.jit(triton.triton)),
    Implementation("mosaic_gpu", mosaic_gpu.refuse, jax.jit(mosaic_gpu.mosaic_gpu)),
)

# In the order they are tried where scores are many; `chunked` does every call everywhere.
KERNELS = {
    "gpu": ("cudnn", "mosaic_gpu", "triton", "chunked"),
    "tpu": ("splash", "mosaic_tpu", "chunked"),
}


def implementation(request: Request, impl: str) -> tuple[Implementation, str]:
    """The implementation called `impl`, or the best one for "auto", and why."""
    why = "asked for"
    if impl == "auto":
        impl, why = _auto(request)
    return choose(IMPLEMENTATIONS, request, impl, AttentionUnsupported), why


def _auto(request: Request) -> tuple[str, str]:
    where = target()
    small = request.sizes.l * request.sizes.s <= SMALL and _too_large(request) is None
    if where.platform not in KERNELS:
        if small:
            return "xla", f"L * S <= {SMALL} on {where}"
        return "chunked", f"L * S > {SMALL} on {where}"
    if small:
        return "xla", f"L * S <= {SMALL}: scores this few need no kernel"
    refused = []
    by_name = {x.name: x for x in IMPLEMENTATIONS}
    for name in KERNELS[where.platform]:
        refusal = by_name[name].refuse(request)
        if refusal is None:
            reasons = "; ".join(refused)
            return name, f"first that can on {where}" + (f" ({reasons})" if reasons else "")
        refused.append(f"{name}: not {refusal.feature}")
    raise AssertionError("chunked refuses nothing")
