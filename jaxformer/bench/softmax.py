"""Speed of softmax attention beside every other implementation: forward, backward, mods.

Shapes are those of FlashAttention-3's tables: 16k tokens, 2048 features of all heads together,
bfloat16. FLOPs count the scores that the mask leaves, 4 per score and feature; 2.5 times as many
backwards.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.bench import torch_side
from jaxformer.bench.clock import Run, program, race
from jaxformer.bench.stage import Stage
from jaxformer.kernels.attention import (
    Causal,
    Diagonal,
    Full,
    Mask,
    PerHead,
    Prefix,
    ProbMod,
    Scalar,
    Tile,
    Toeplitz,
    Window,
    attention,
    plan,
)

KERNELS = {
    "gpu": ("mosaic_gpu", "triton"),
    "tpu": ("mosaic_tpu", "splash"),
    "cpu": ("chunked", "xla"),
}
QUADRATIC = 4096  # the longest sequence for `jax.nn` in plain XLA: its scores are 17 GB beyond


@dataclasses.dataclass(frozen=True)
class Shape:
    """B, L, H, K of queries, keys and values."""

    batch: int
    length: int
    heads: int
    size: int

    @classmethod
    def of(cls, length: int, size: int, *, tiny: bool) -> Shape:
        if tiny:
            return cls(1, length, 2, size)
        return cls(max(1, 16384 // length), length, 2048 // size, size)

    @property
    def array(self) -> tuple[int, int, int, int]:
        return self.batch, self.length, self.heads, self.size

    def draw(self, number: int = 3) -> list[jax.Array]:
        """Random numbers, since zeros take less power and so run at higher clocks."""
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        keys = jax.random.split(jax.random.key(0), number)
        return [jax.random.normal(key, self.array, dtype) for key in keys]

    def flops(self, mask: Mask) -> int:
        x = [jax.ShapeDtypeStruct(self.array, jnp.bfloat16)] * 3
        return plan(*x, mask=mask, impl="chunked").flops


Attend = Callable[..., jax.Array]


def forward_run(attend: Attend, shape: Shape, more: tuple[jax.Array, ...] = ()) -> Run:
    """The forward pass; `more` are further operands of `attend`."""
    return program(attend, *shape.draw(), *more)


def backward_run(attend: Attend, shape: Shape, more: tuple[jax.Array, ...] = ()) -> Run:
    """The backward pass alone, gradients of `more` included: its residuals are computed before."""
    *x, do = shape.draw(4)
    o, pull = jax.jit(lambda *x: jax.vjp(attend, *x))(*x, *more)
    return program(lambda pull, do: pull(do), pull, do.astype(o.dtype))


RUNS = {"forward": forward_run, "backward": backward_run}
WORK = {"forward": 1.0, "backward": 2.5}


def measure_plain(stage: Stage, direction: str) -> None:
    """This op against cuDNN, XLA and PyTorch, full and causal."""
    for size, length, causal in _plain_cases(stage.tiny):
        shape = Shape.of(length, size, tiny=stage.tiny)
        mask = Causal() if causal else Full()
        case = {"head_size": size, "causal": causal, "L": length, "batch": shape.batch}
        if stage.leaves_out(case):
            continue
        contenders = {f"ours {impl}": ours(impl, mask=mask) for impl in kernels()}
        contenders["cudnn"] = theirs("cudnn", causal)
        if length <= QUADRATIC:
            contenders["jax.nn xla"] = theirs("xla", causal)
        builds: dict[str, Callable[[], Run]] = {
            who: functools.partial(RUNS[direction], attend, shape)
            for who, attend in contenders.items()
        }
        if torch_side.available():
            builds["torch sdpa"] = functools.partial(
                torch_side.sdpa, shape.array, causal, direction
            )
        flops = WORK[direction] * shape.flops(mask)
        timings = race(builds, stage.deadline)
        stage.add_race(case, timings, against="cudnn", work=lambda who, flops=flops: flops)


def _plain_cases(tiny: bool) -> Iterator[tuple[int, int, bool]]:
    """The ones that matter most first: a deadline may cut the rest."""
    if tiny:
        yield 8, 32, True
        return
    for length in (4096, 16384, 2048, 8192, 1024, 32768):
        for size in (128, 64, 256):
            for causal in (True, False):
                yield size, length, causal


def kernels() -> tuple[str, ...]:
    """Our implementations for this machine."""
    return KERNELS.get(jax.default_backend(), ())


def ours(impl: str, **call: Any) -> Attend:
    return lambda q, k, v: attention(q, k, v, impl=impl, **call)


def theirs(implementation: str, causal: bool) -> Attend:
    return lambda q, k, v: jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, implementation=implementation
    )


# --------------------------------------------------------------------------------- mods


@dataclasses.dataclass(frozen=True)
class Mod:
    """A mask or modification: the arguments of `attention`, and which plain mask it is judged by.

    `operand` draws what is learned; `call(operand)` gives the arguments.
    """

    name: str
    mask: Mask
    plain: Mask
    call: Callable[[Any], dict[str, Any]] = lambda _: {}
    operand: Callable[[Shape], jax.Array] | None = None


def mods(shape: Shape) -> list[Mod]:
    """Every kind of modification; the torch side has those it can express under the same name."""
    causal, n = Causal(), shape.length

    def head_slopes(s: Shape) -> jax.Array:
        return 2.0 ** -jnp.linspace(1, 8, s.heads)

    def band(s: Shape) -> jax.Array:
        return jax.random.normal(jax.random.key(1), (s.heads, 2 * s.length - 1))

    def dense(s: Shape) -> jax.Array:
        dtype = s.draw(1)[0].dtype
        return jax.random.normal(jax.random.key(1), (1, s.heads, s.length, s.length), dtype)

    def score(kind: Any, fn: Any) -> Callable[[Any], dict[str, Any]]:
        return lambda x: {"score_mod": fn, "aux": {"x": kind(x)}}

    def multiply(x: jax.Array) -> dict[str, Any]:
        return {"prob_mod": ProbMod(lambda p, i, a: p * a["x"], True), "aux": {"x": Toeplitz(x)}}

    def rounded(p: jax.Array, idx: Any, aux: Any) -> jax.Array:
        return p * p  # any nonlinear function: the price is the second pass

    return [
        Mod("soft-cap", causal, causal, lambda _: {"score_mod": _cap}),
        Mod("ALiBi", causal, causal, score(PerHead, _alibi), head_slopes),
        Mod("window 1k", Window(min(1023, n // 2), 0), causal),
        Mod("prefix", Prefix(n // 2) | Diagonal(), Full()),
        Mod("Toeplitz add", causal, causal, score(Toeplitz, lambda s, i, a: s + a["x"]), band),
        Mod("Toeplitz multiply", causal, causal, multiply, band),
        Mod("sink", causal, causal, lambda x: {"sink": x}, head_slopes),
        Mod("dropout", causal, causal, lambda _: {"dropout": (0.1, jax.random.key(2))}),
        Mod("dense bias", causal, causal, score(Tile, lambda s, i, a: s + a["x"]), dense),
        Mod("nonlinear", causal, causal, lambda _: {"prob_mod": ProbMod(rounded, False)}),
        Mod(
            "learned cap",
            causal,
            causal,
            score(Scalar, lambda s, i, a: a["x"] * jnp.tanh(s / a["x"])),
            lambda s: jnp.float32(30.0),
        ),
    ]


def _cap(s: jax.Array, idx: Any, aux: Any) -> jax.Array:
    return 30.0 * jnp.tanh(s / 30.0)


def _alibi(s: jax.Array, idx: Any, aux: Any) -> jax.Array:
    return s - aux["x"] * (idx.q - idx.k).astype(jnp.float32)


def measure_mods(stage: Stage) -> None:
    """Each mod beside this op without it, and beside compiled FlexAttention.

    A learned operand's gradient is part of the backward pass.
    """
    for shape, names in _mod_shapes(stage.tiny):
        plain: dict[Any, Run] = {}
        for mod in mods(shape):
            if names is None or mod.name in names:
                for direction in ("forward", "backward"):
                    _measure_mod(stage, mod, shape, direction, plain)


def _mod_shapes(tiny: bool) -> Iterator[tuple[Shape, tuple[str, ...] | None]]:
    """Shapes and the mods to try at each, None for all."""
    if tiny:
        yield Shape(1, 32, 2, 8), ("ALiBi", "window 1k")
        return
    yield Shape.of(4096, 128, tiny=False), None
    yield Shape.of(16384, 128, tiny=False), ("window 1k",)
    yield Shape.of(4096, 64, tiny=False), None


def _measure_mod(
    stage: Stage, mod: Mod, shape: Shape, direction: str, plain: dict[Any, Run]
) -> None:
    """`plain` keeps the programs without mods, which every mod runs against."""
    case = {
        "mod": mod.name,
        "pass": direction,
        "head_size": shape.size,
        "L": shape.length,
        "batch": shape.batch,
    }
    if stage.leaves_out(case):
        return
    more = () if mod.operand is None else (mod.operand(shape),)

    def call(impl: str, q: Any, k: Any, v: Any, *more: Any) -> jax.Array:
        return attention(q, k, v, mask=mod.mask, impl=impl, **mod.call(*more or (None,)))

    def without(impl: str) -> Run:
        key = impl, mod.plain, direction
        if key not in plain:
            plain[key] = RUNS[direction](ours(impl, mask=mod.plain), shape)
        return plain[key]

    builds: dict[str, Callable[[], Run]] = {}
    for impl in kernels():
        attend = functools.partial(call, impl)
        builds[f"ours {impl}"] = functools.partial(RUNS[direction], attend, shape, more)
        builds[f"plain {impl}"] = functools.partial(without, impl)
    if torch_side.available() and mod.name in torch_side.MODS:
        builds["torch flex"] = functools.partial(torch_side.flex, shape.array, mod.name, direction)

    def work(who: str) -> float:
        return WORK[direction] * shape.flops(mod.plain if who.startswith("plain") else mod.mask)

    stage.add_race(case, race(builds, stage.deadline), against="plain", work=work)
