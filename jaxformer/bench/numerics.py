"""Is every kernel right on this device? Values and gradients against float64 on the CPU.

The reference is the plainest implementation, `xla`, which the tests hold against NumPy, run in
float64 on the CPU device with the same (rounded) inputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.bench.clock import first_line
from jaxformer.bench.softmax import kernels
from jaxformer.bench.stage import Stage
from jaxformer.kernels.attention import (
    BlockSparse,
    Causal,
    DenseMask,
    Diagonal,
    KeyPadding,
    PerHead,
    Prefix,
    ProbMod,
    Segments,
    Tile,
    Toeplitz,
    Window,
    attention,
)
from jaxformer.kernels.linear_attention import linear_attention

REFERENCES = {"softmax": "xla", "linear": "chunked"}
# Of the largest element of each result. bfloat16 keeps 8 bits: 2^-8 is 0.4 %, and a gradient
# passes three roundings (P, dS, and itself). float32 products may run in TF32 (10 bits) on a GPU
# unless the highest precision is asked for, as here.
TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}


@dataclasses.dataclass(frozen=True)
class Case:
    """B, L, S, H, G, K, Kv; `call(operands)` gives the arguments, from what `operands` draws."""

    name: str
    shape: tuple[int, int, int, int, int, int, int]
    call: Callable[..., dict[str, Any]] = lambda: {}
    operands: tuple[tuple[int, ...], ...] = ()
    dtype: str = "bfloat16"


def _score(kind: Any, fn: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    return lambda x: {"mask": Causal(), "score_mod": fn, "aux": {"x": kind(x)}}


def _cases() -> list[Case]:
    l, h = 320, 4
    square = (2, l, l, h, h, 64, 64)
    band = ((h, 2 * l - 1),)
    blocks = np.random.default_rng(0).random((5, 5)) < 0.5
    blocks[2] = False  # 64 queries that see nothing
    segments = np.repeat(np.arange(5), 64)[None].repeat(2, 0)
    visible = np.random.default_rng(1).random((1, 1, l, l)) < 0.3

    def cap(s: Any, idx: Any, aux: Any) -> Any:
        return 30.0 * jnp.tanh(s / 30.0)

    def multiply(x: Any) -> dict[str, Any]:
        mod = ProbMod(lambda p, i, a: p * a["x"], True)
        return {"mask": Causal(), "prob_mod": mod, "aux": {"x": Toeplitz(x)}}

    def square_of(p: Any, idx: Any, aux: Any) -> Any:
        return p * p

    return [
        *(Case(f"full {k}", (2, l, l, h, h, k, k)) for k in (64, 128, 256)),
        *(
            Case(f"causal {k}", (2, l, l, h, h, k, k), lambda: {"mask": Causal()})
            for k in (64, 128, 256)
        ),
        Case("odd lengths", (1, 197, 301, h, h, 64, 64)),
        Case("one query", (2, 1, l, h, h, 64, 64)),
        Case("grouped heads", (2, l, l, 8, 2, 64, 64), lambda: {"mask": Causal()}),
        Case("head map", (1, l, l, 5, 3, 64, 64), lambda: {"head_map": (2, 0, 0, 1, 2)}),
        Case("two head sizes", (1, l, l, h, h, 128, 64), lambda: {"mask": Causal()}),
        Case("window", square, lambda: {"mask": Window(100, 0)}),
        Case("prefix", square, lambda: {"mask": Prefix(100) | Diagonal()}),
        Case("segments", square, lambda: {"mask": Segments(segments, segments) & Causal()}),
        Case("padding", square, lambda: {"mask": KeyPadding(jnp.array([l, 70]))}),
        Case("blocks", square, lambda: {"mask": BlockSparse(blocks, 64, 64)}),
        Case("dense mask", square, lambda: {"mask": DenseMask(visible)}),
        Case("soft-cap", square, lambda: {"score_mod": cap}),
        Case("ALiBi", square, _score(PerHead, lambda s, i, a: s - a["x"] * (i.q - i.k)), ((h,),)),
        Case("Toeplitz add", square, _score(Toeplitz, lambda s, i, a: s + a["x"]), band),
        Case("Toeplitz multiply", square, multiply, band),
        Case("bias", square, _score(Tile, lambda s, i, a: s + a["x"]), ((1, h, l, l),)),
        Case("nonlinear", square, lambda: {"prob_mod": ProbMod(square_of, False)}),
        Case("sink", square, lambda x: {"mask": Causal(), "sink": x}, ((h,),)),
        Case("dropout", square, lambda: {"dropout": (0.2, jax.random.key(3))}),
        Case("float32", square, lambda: {"mask": Causal()}, dtype="float32"),
    ]


def measure(stage: Stage) -> None:
    """A row per case and implementation: the largest error of each result, relative to it."""
    cases = _cases()
    if stage.tiny:
        cases = [dataclasses.replace(c, shape=_shrink(c.shape)) for c in (cases[3], cases[8])]
    for case in cases:
        _judge(stage, "softmax", case, kernels(), functools.partial(_softmax, case))
    linear = [
        Case(f"linear {name} {k} {dtype}", (2, l, s, 2, 2, k, n), dtype=dtype)
        for dtype in ("bfloat16", "float32")
        for name, l, s in (("causal", 1000, 1000), ("cross", 333, 500))
        for k, n in ((64, 64), (128, 128), (256, 256), (40, 72))
    ]
    if stage.tiny:
        linear = [dataclasses.replace(c, shape=(1, 40, 40, 1, 1, 8, 8)) for c in linear[::12]]
    for case in linear:
        impls = (*linear_kernels(), *(("triton",) if stage.tiny else ()))  # tiny: interpreted
        _judge(stage, "linear", case, impls, functools.partial(_linear, case))


def linear_kernels() -> tuple[str, ...]:
    """Our implementations for this machine."""
    return {"gpu": ("mosaic_gpu", "triton"), "tpu": ("mosaic_tpu",)}.get(
        jax.default_backend(), ("chunked",)
    )


def _shrink(shape: tuple[int, ...]) -> Any:
    return (1, 40, 40, 4, 2, 8, 8)


def _judge(
    stage: Stage, op: str, case: Case, impls: Sequence[str], compute: Callable[..., Any]
) -> None:
    """A row for each implementation; whatever a compiler or a device raises is one too."""
    row: dict[str, Any] = {"op": op, "case": case.name, "type": case.dtype}
    if stage.leaves_out(row):
        return
    try:
        wanted = compute(REFERENCES[op], reference=True)
    except Exception as error:
        stage.add(row | {"who": "reference"}, error=first_line(error))
        return
    for impl in impls:
        who = row | {"who": f"ours {impl}"}
        try:
            errors = {name: _error(got, wanted[name]) for name, got in compute(impl).items()}
        except Exception as error:
            stage.add(who, error=first_line(error))
            continue
        worst = max(errors.values())
        right = bool(worst <= TOLERANCE[case.dtype])  # a NaN is not
        stage.add(who, right=right, worst=worst, **errors)


def _error(got: np.ndarray, wanted: np.ndarray) -> float:
    unseen = np.isneginf(wanted)
    if not np.array_equal(np.isneginf(got), unseen):
        return float("inf")
    got, wanted = (np.where(unseen, 0.0, x) for x in (got, wanted))
    error = np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-30)
    return float(error) if np.isfinite(error) else float("inf")


@contextlib.contextmanager
def _where(reference: bool) -> Iterator[None]:
    """The reference in float64 on the CPU, the kernels on the device at full precision."""
    if not reference:
        with jax.default_matmul_precision("highest"):
            yield
        return
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


def _random(shapes: Any, dtype: str, reference: bool) -> list[jax.Array]:
    """The same numbers, rounded to `dtype`, in every precision."""
    rng = np.random.default_rng(0)
    drawn = [np.asarray(rng.standard_normal(shape), jnp.dtype(dtype)) for shape in shapes]
    return [jnp.asarray(x, np.float64 if reference else x.dtype) for x in drawn]


def _softmax(case: Case, impl: str, *, reference: bool = False) -> dict[str, np.ndarray]:
    b, l, s, h, g, k, n = case.shape
    with _where(reference):
        shapes = ((b, l, h, k), (b, s, g, k), (b, s, g, n), (b, l, h, n))
        q, key, v, do = _random(shapes, case.dtype, reference)
        dlse, *operands = _random([(b, h, l), *case.operands], "float32", reference)

        def attend(q: Any, k: Any, v: Any, *x: Any) -> Any:
            call = case.call(*x)
            return attention(q, k, v, return_lse=True, impl=impl, **call)

        def both(*x: Any) -> Any:
            (o, lse), pull = jax.vjp(attend, *x)
            seen = jnp.isfinite(lse)
            return o, lse, *pull((do, jnp.where(seen, dlse, 0.0).astype(lse.dtype)))

        names = ("o", "lse", "dq", "dk", "dv", "dx")
        results = jax.jit(both)(q, key, v, *operands)
        return dict(zip(names, (np.asarray(x, np.float64) for x in results), strict=False))


def _linear(case: Case, impl: str, *, reference: bool = False) -> dict[str, np.ndarray]:
    b, l, s, h, _, k, n = case.shape
    with _where(reference):
        shapes = ((b, l, h, k), (b, s, h, k), (b, s, h, n), (b, l, h, n))
        q, key, v, do = _random(shapes, case.dtype, reference)

        def both(*x: Any) -> Any:
            causal = "causal" in case.name
            o, pull = jax.vjp(lambda *x: linear_attention(*x, causal=causal, impl=impl), *x)
            return o, *pull(do.astype(o.dtype))

        names = ("o", "dq", "dk", "dv")
        results = jax.jit(both)(q, key, v)
        return dict(zip(names, (np.asarray(x, np.float64) for x in results), strict=True))
