"""Linear attention: unnormalised sums, one chunked form for training, one step for decoding.

Axes: B batch, L length of the queries, S of the keys, H heads, K feature size, N value size. What
normalises the sums (Katharopoulos et al., arXiv:2006.16236) or scales q, k and v (flow attention)
is the caller's: a denominator is `q . causal_sum(k)`, or the output for a column of ones in v.
Padding is k = 0. Sums are float32 (float64 for float64 inputs) and are returned as such; products
of float32 follow `jax.default_matmul_precision`, as everywhere in JAX.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.errors import ConfigError
from jaxformer.kernels.dispatch import (
    Deferred,
    Implementation,
    KernelUnsupported,
    Plan,
    Refusal,
    choose,
)
from jaxformer.kernels.linear_attention.chunked import chunked
from jaxformer.kernels.linear_attention.shards import over_mesh
from jaxformer.kernels.linear_attention.sums import (
    Primitives,
    Tiles,
    bidirectional,
    causal,
    sum_type,
)
from jaxformer.kernels.target import target
from jaxformer.kernels.tuned import tuned

log = logging.getLogger(__name__)
mosaic_gpu, mosaic_tpu, triton = (
    Deferred(f"jaxformer.kernels.linear_attention.{name}")
    for name in ("mosaic_gpu", "mosaic_tpu", "triton")
)

LARGEST = 256  # features of a kernel: its state is a matrix of features squared
KERNELS = {"gpu": ("triton",), "tpu": ("mosaic_tpu",)}  # Hopper has one more
SHORT = 64  # positions that are one chunk of any kernel


class LinearAttentionUnsupported(KernelUnsupported):
    """A linear attention implementation was asked for something that it cannot do."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked call."""

    q: Any
    k: Any
    v: Any
    causal: bool
    tiles: Tiles | None


def linear_attention(
    q_BxLxHxK: jax.Array,
    k_BxSxHxK: jax.Array,
    v_BxSxHxN: jax.Array,
    *,
    causal: bool,
    impl: str = "auto",
    tiles: Tiles | None = None,
) -> jax.Array:
    """sum_j (q_i . k_j) v_j over all j, or over j <= i when `causal`: (B, L, H, N).

    impl: an implementation by name, never replaced by another; "auto" chooses, `explain` says why.
    tiles: the implementation chooses when absent; memory is linear in L for any.

    Raises ConfigError on arrays that do not fit, LinearAttentionUnsupported where `impl` cannot.
    """
    request = _request(q_BxLxHxK, k_BxSxHxK, v_BxSxHxN, causal=causal, tiles=tiles)
    chosen, why = _choose(request, impl)
    if log.isEnabledFor(logging.INFO):
        kind = "causal" if causal else "bidirectional"
        plan = _plan(request, chosen.name, why)
        log.info("%s linear attention of %s: %s", kind, request.q.shape, plan)
    return chosen.run(request)


def plan(
    q_BxLxHxK: jax.typing.ArrayLike,
    k_BxSxHxK: jax.typing.ArrayLike,
    v_BxSxHxN: jax.typing.ArrayLike,
    *,
    causal: bool,
    impl: str = "auto",
    tiles: Tiles | None = None,
) -> Plan:
    """What `linear_attention` would run for the same arguments, and the cost of its forward pass.

    `flops` counts the products with the states, and within chunks the scores that are used.
    """
    request = _request(q_BxLxHxK, k_BxSxHxK, v_BxSxHxN, causal=causal, tiles=tiles)
    chosen, why = _choose(request, impl)
    return _plan(request, chosen.name, why)


def _plan(request: Request, impl: str, why: str) -> Plan:
    (b, l, h, size), (s, n) = request.q.shape, (request.k.shape[1], request.v.shape[-1])
    used = _tiles(impl, request)
    multiplied = b * h * (l + s) * size * n
    if request.causal:
        multiplied += b * h * l * (min(used.chunk, l) + 1) // 2 * (size + n)
    reads = 1
    if request.causal and used.segments > 1:
        multiplied += b * h * s * size * n
        reads, why = 2, f"{used.segments} segments; {why}"
    item, out = request.q.dtype.itemsize, sum_type(request.q).itemsize
    moved = b * h * (item * (l * size + reads * s * (size + n)) + out * l * n)
    return Plan(impl, (used.chunk, used.columns or n), 2 * multiplied, moved, why)


def explain(*arrays: jax.typing.ArrayLike, **call: Any) -> str:
    """`plan` in one line."""
    return str(plan(*arrays, **call))


def key_value_state(k_BxSxHxK: jax.Array, v_BxSxHxN: jax.Array) -> jax.Array:
    """sum_j k_j v_j^T, (B, H, K, N): what the keys leave behind, and the state of decoding."""
    return jnp.einsum("bshk,bshn->bhkn", _sums(k_BxSxHxK), _sums(v_BxSxHxN))


def linear_attention_step(
    state_BxHxKxN: jax.Array, q_BxHxK: jax.Array, k_BxHxK: jax.Array, v_BxHxN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Causal linear attention of the next position: (new state, output (B, H, N))."""
    state = state_BxHxKxN + jnp.einsum("bhk,bhn->bhkn", _sums(k_BxHxK), _sums(v_BxHxN))
    return state, jnp.einsum("bhk,bhkn->bhn", _sums(q_BxHxK), state)


def causal_sum(x: jax.Array, axis: int = 1) -> jax.Array:
    """Sums of all entries up to and including each, along `axis`."""
    return jnp.cumsum(_sums(x), axis)


def _sums(x: jax.Array) -> jax.Array:
    return x.astype(sum_type(x))


# ----------------------------------------------------------------------------- the request


def _request(q: Any, k: Any, v: Any, *, causal: bool, tiles: Tiles | None) -> Request:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not (len(q.shape) == len(k.shape) == len(v.shape) == 4 and k.shape[:3] == v.shape[:3]):
        raise ConfigError(f"linear_attention: needs (batch, length, heads, size) arrays: {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ConfigError(f"linear_attention: batch, heads or feature size differ: {shapes}")
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise ConfigError(f"linear_attention: every axis needs an element: {shapes}")
    if causal and q.shape[1] != k.shape[1]:
        raise ConfigError(f"linear_attention: causal needs L = S: {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ConfigError(f"linear_attention: types differ: {q.dtype}, {k.dtype}, {v.dtype}")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ConfigError(f"linear_attention: needs floating-point arrays, got {q.dtype}")
    if tiles is not None and min(x for x in tiles if x is not None) < 1:
        raise ConfigError(f"tiles: needs positive sizes, got {tiles}")
    return Request(q, k, v, causal, tiles)


# ----------------------------------------------------------------------------- the choice


def _choose(request: Request, impl: str) -> tuple[Implementation, str]:
    why = "asked for"
    if impl == "auto":
        impl, why = _auto(request)
    return choose(IMPLEMENTATIONS, request, impl, LinearAttentionUnsupported), why


def _auto(request: Request) -> tuple[str, str]:
    where = target()
    names = ("mosaic_gpu", "triton") if where.hopper else KERNELS.get(where.platform, ())
    if names and request.q.shape[1] <= SHORT and request.causal:
        return "chunked", f"L <= {SHORT} is one chunk"
    refused = []
    for implementation in IMPLEMENTATIONS:
        if implementation.name in names:
            refusal = implementation.refuse(request)
            if refusal is None:
                return implementation.name, "; ".join([f"the kernel for {where}", *refused])
            refused.append(f"{implementation.name}: not {refusal.feature}, {refusal.why}")
    return "chunked", "; ".join(refused) or f"no kernel for {where}"


def _tiles(impl: str, request: Request) -> Tiles:
    if request.tiles is not None:
        return request.tiles
    b, l, h, _ = request.q.shape
    l = max(l, request.k.shape[1])
    measured = tuned("linear_attention", impl, l, head_size=_size(request), causal=request.causal)
    if measured is not None and request.q.dtype == jnp.bfloat16:
        return Tiles(*measured)
    if impl == "mosaic_tpu":
        return mosaic_tpu.tiles_of(l)
    if impl == "mosaic_gpu":
        return mosaic_gpu.tiles_of(b, l, h, _size(request))
    if impl == "triton":
        return triton.tiles_of(b, l, h, _size(request), request.q.dtype)
    return Tiles(min(128, l))


def _size(request: Request) -> int:
    return max(request.q.shape[-1], request.v.shape[-1])


def _kernel_refuses(request: Request, largest: int = LARGEST) -> Refusal | None:
    dtype, size = request.q.dtype, _size(request)
    if dtype not in (jnp.bfloat16, jnp.float32):
        return Refusal(f"type {dtype}", "allowed are bfloat16 and float32")
    if size > largest:
        return Refusal(f"head size {size}", f"the largest is {largest} in {dtype}")
    return None


def _tpu_refuses(request: Request) -> Refusal | None:
    tiles = _tiles("mosaic_tpu", request)
    if tiles.chunk % 16 or tiles.segments > 1 or tiles.columns is not None:
        return Refusal(f"{tiles}", "it takes chunks of a multiple of 16, whole values, one segment")
    return _kernel_refuses(request)


def _hopper_refuses(request: Request) -> Refusal | None:
    tiles = _tiles("mosaic_gpu", request)
    if tiles.chunk != mosaic_gpu.CHUNK or tiles.columns not in (None, mosaic_gpu.COLUMNS):
        return Refusal(f"{tiles}", "its chunks and columns are the 64 rows of the tensor cores")
    if request.q.dtype != jnp.bfloat16:
        return Refusal(f"type {request.q.dtype}", "its tensor core products are of bfloat16")
    return _kernel_refuses(request)


def _triton_refuses(request: Request) -> Refusal | None:
    tiles = _tiles("triton", request)
    for name, size in (("chunk", tiles.chunk), ("columns", tiles.columns or 16)):
        if size < 16 or size & (size - 1):
            return Refusal(f"{name}={size}", "it takes powers of two from 16 on")
    return _kernel_refuses(request, triton.largest(request.q.dtype))


def _run_chunked(request: Request) -> jax.Array:
    tiles = _tiles("chunked", request)
    return chunked(request.q, request.k, request.v, is_causal=request.causal, tiles=tiles)


def _run(name: str, kernels: Callable[[], Primitives]) -> Any:
    def run(request: Request) -> jax.Array:
        attend = causal if request.causal else bidirectional

        def local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            part = dataclasses.replace(request, q=q, k=k, v=v)  # whose tiles may be others
            return attend(kernels(), _tiles(name, part), q, k, v)

        return over_mesh(local, request.q, request.k, request.v)

    return run


IMPLEMENTATIONS = (
    Implementation("chunked", lambda request: None, _run_chunked),
    Implementation(
        "mosaic_gpu", _hopper_refuses, _run("mosaic_gpu", lambda: mosaic_gpu.MosaicGPU())
    ),
    Implementation("triton", _triton_refuses, _run("triton", lambda: triton.Triton())),
    Implementation("mosaic_tpu", _tpu_refuses, _run("mosaic_tpu", lambda: mosaic_tpu.MosaicTPU())),
)
