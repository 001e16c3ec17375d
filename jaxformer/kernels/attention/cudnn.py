"""cuDNN's fused attention, as `jax.nn.dot_product_attention` calls it: the plain cases on NVIDIA.

Routed around: its LSE has no gradient (jax-ml/jax#32484); mask and bias tensors give NaN gradients
at some lengths (pytorch/pytorch#196678), and so does one query (NVIDIA/cudnn-frontend#1072);
sequences without keys are NaN before cuDNN 9.25 (NVIDIA/cudnn-frontend#943).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.kernels.attention.array_masks import KeyPadding
from jaxformer.kernels.attention.masks import And, Causal, Full, Mask, Window
from jaxformer.kernels.attention.request import Request
from jaxformer.kernels.dispatch import Refusal
from jaxformer.kernels.target import target


def refuse(request: Request) -> Refusal | None:
    """What cuDNN, or jax's binding of it, cannot do."""
    where = target()
    if where.platform != "gpu":
        return Refusal(str(where), "it needs an NVIDIA GPU")
    if request.q.dtype not in (jnp.bfloat16, jnp.float16):
        return Refusal(f"{request.q.dtype} inputs", "it computes in bfloat16 or float16")
    size, length = request.q.shape[-1], request.sizes.l
    if size != request.v.shape[-1] or size > 256 or size % 8:
        return Refusal(f"head sizes {size}, {request.v.shape[-1]}", "equal multiples of 8 to 256")
    if length == 1:
        return Refusal("one query", "its gradients can be NaN")
    if _mask(request) is None:
        return Refusal(
            f"mask {type(request.mask).__name__}",
            "causal (with as many keys as queries), a window to the left, and key lengths are built"
            " in; mask tensors can give NaN gradients",
        )
    return request.beyond_plain()


def _mask(request: Request) -> dict[str, Any] | None:
    """Arguments of `dot_product_attention` for the mask, None if there are none."""
    mask, lengths = split_padding(request.mask)
    found: dict[str, Any] = {}
    if lengths is not None:
        if not jnp.issubdtype(lengths.dtype, jnp.integer):
            return None
        found["key_value_seq_lengths"] = jnp.maximum(lengths, 1).astype(jnp.int32)
    if mask == Full():
        return found
    if request.sizes.l != request.sizes.s:  # its diagonals are not documented then
        return None
    if mask == Causal():
        return {**found, "is_causal": True}
    if isinstance(mask, Window) and mask.right == 0 and mask.left is not None and not found:
        return {"is_causal": True, "local_window_size": (mask.left, 0)}
    return None


def split_padding(mask: Mask) -> tuple[Mask, jax.Array | None]:
    """(the rest, lengths or booleans of the keys) of a mask that may be padding & something."""
    if isinstance(mask, KeyPadding):
        return Full(), jnp.asarray(mask.valid)
    if isinstance(mask, And):
        for one, other in ((mask.a, mask.b), (mask.b, mask.a)):
            if isinstance(one, KeyPadding):
                return other, jnp.asarray(one.valid)
    return mask, None


def cudnn(request: Request) -> tuple[jax.Array, None]:
    """Output (B, L, H, K)."""
    arguments = _mask(request)
    assert arguments is not None  # `refuse` has seen to it
    o = jax.nn.dot_product_attention(
        request.q,
        request.k,
        request.v,
        scale=request.rules.scale,
        implementation="cudnn",
        **arguments,
    )
    _, lengths = split_padding(request.mask)
    if lengths is not None:  # a row without keys is 0 and has no gradient
        o = jnp.where((lengths > 0)[:, None, None, None], o, 0)
    return o, None
