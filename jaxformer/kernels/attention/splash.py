"""JAX's Splash attention: the plain cases on TPU.

Its mask is fixed while tracing, and a row without keys is undefined: masks that may have one are
refused, padding is put right here.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.kernels.attention.array_masks import KeyPadding
from jaxformer.kernels.attention.cudnn import split_padding
from jaxformer.kernels.attention.masks import Causal, Full, Mask, Window
from jaxformer.kernels.attention.operands import PerK, Sizes
from jaxformer.kernels.attention.request import Request
from jaxformer.kernels.dispatch import Refusal
from jaxformer.kernels.target import target

LANES = 128  # lengths are padded to multiples of it
BLOCK = 512  # 2048 exceeds the vector memory of a v5e (compiled ahead of time)


def refuse(request: Request) -> Refusal | None:
    """What Splash, or its wrapping here, cannot do."""
    where = target()
    if where.platform != "tpu":
        return Refusal(str(where), "it needs a TPU")
    if request.q.dtype not in (jnp.bfloat16, jnp.float32):
        return Refusal(f"{request.q.dtype} inputs", "it computes in bfloat16 or float32")
    mask, _ = split_padding(request.mask)
    if not _every_row_sees(mask, request.sizes):
        why = "full, causal and window masks without empty rows, and padding, are wrapped"
        return Refusal(f"mask {type(request.mask).__name__}", why)
    return request.beyond_plain()


def _every_row_sees(mask: Mask, sizes: Sizes) -> bool:
    """Whether the mask is one of Splash's own and leaves every row a key."""
    if isinstance(mask, Window):
        last_row_starts_at = 0 if mask.left is None else sizes.l - 1 - mask.left
        return last_row_starts_at < sizes.s and (mask.right is None or mask.right >= 0)
    return mask == Full() or (isinstance(mask, Causal) and mask.offset >= 0)


def splash(request: Request, interpret: bool = False) -> tuple[jax.Array, None]:
    """Output (B, L, H, Kv)."""
    mask, padding = split_padding(request.mask)
    sizes = request.sizes
    length, keys = (-(-n // LANES) * LANES for n in sizes[2:])
    kernel, segment_ids = _library(mask, sizes.h, length, keys, interpret)
    valid = jnp.broadcast_to(jnp.arange(keys) < sizes.s, (sizes.b, keys))
    if padding is not None:
        known = KeyPadding(padding).operands(sizes)
        assert isinstance(known, PerK)
        known = jnp.broadcast_to(known.value[:, 0], (sizes.b, sizes.s))
        valid = valid & jnp.pad(known, ((0, 0), (0, keys - sizes.s)))
    segments = None
    if padding is not None or keys > sizes.s:
        ones = jnp.ones((sizes.b, length), jnp.int32)
        segments = segment_ids(q=ones, kv=valid.astype(jnp.int32))

    def rows(x: jax.Array, n: int) -> jax.Array:  # (B, L, H, K) -> (B, H, n, K)
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, n - x.shape[1]), (0, 0)))

    q = (request.q * request.rules.scale).astype(request.q.dtype)
    o = jax.vmap(kernel)(rows(q, length), rows(request.k, keys), rows(request.v, keys), segments)
    o = o.swapaxes(1, 2)[:, : sizes.l]
    if padding is not None:
        o = jnp.where(_sees_valid(mask, valid, sizes)[..., None, None], o, 0)
    return o.astype(request.q.dtype), None


def _library(mask: Mask, heads: int, length: int, keys: int, interpret: bool) -> tuple[Any, Any]:
    """Splash's kernel for a mask of ours, and its class of segment ids."""
    # Imported here because it takes 0.4 s, which every user of a CPU or GPU would pay.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if isinstance(mask, Causal):
        own = masks.CausalMask((length, keys), mask.offset)
    elif isinstance(mask, Window):
        own = masks.LocalMask((length, keys), (mask.left, mask.right), 0)
    else:
        own = masks.FullMask((length, keys))
    q, k = (max(b for b in (LANES, 2 * LANES, BLOCK) if n % b == 0) for n in (length, keys))
    blocks = kernels.BlockSizes(
        block_q=q,
        block_kv=k,
        block_q_dkv=q,
        block_kv_dkv=k,
        block_q_dq=q,
        block_kv_dq=k,
    )
    kernel = kernels.make_splash_mha(
        mask=masks.MultiHeadMask([own] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    return kernel, kernels.SegmentIds


def _sees_valid(mask: Mask, valid: jax.Array, sizes: Sizes) -> jax.Array:
    """(B, L): whether any key that is not padding is visible, from sums of the valid ones."""
    total = jnp.cumsum(valid.astype(jnp.int32), 1)
    total = jnp.pad(total, ((0, 0), (1, 0)))  # keys before each
    rows = np.arange(sizes.l)
    low, high = np.zeros_like(rows), np.full_like(rows, sizes.s)
    if isinstance(mask, Causal):
        high = np.clip(rows + mask.offset + 1, 0, sizes.s)
    elif isinstance(mask, Window):
        low = low if mask.left is None else np.clip(rows - mask.left, 0, sizes.s)
        high = high if mask.right is None else np.clip(rows + mask.right + 1, 0, sizes.s)
    return total[:, high] > total[:, low]
