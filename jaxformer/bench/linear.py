"""Speed of linear attention beside softmax attention and a scan that XLA compiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.bench.clock import Run, program, race
from jaxformer.bench.numerics import linear_kernels
from jaxformer.bench.softmax import Shape, forward_run, theirs
from jaxformer.bench.stage import Stage
from jaxformer.kernels.linear_attention import Tiles, linear_attention, plan
from jaxformer.kernels.linear_attention.chunked import Chunked
from jaxformer.kernels.linear_attention.sums import causal

SHAPES = (
    Shape(2, 16384, 16, 128),
    Shape(4, 4096, 16, 128),
    Shape(1, 8192, 96, 128),
    Shape(8, 1024, 8, 64),
    Shape(1, 65536, 16, 64),
)


def measure(stage: Stage) -> None:
    """Causal and bidirectional, forward and with backward; flow attention; softmax by cuDNN."""
    shapes = (Shape(1, 48, 1, 8),) if stage.tiny else SHAPES
    for shape in shapes:
        for direction in ("both",) if stage.tiny else ("forward", "both"):
            case = {"pass": direction, "shape": list(shape.array), "L": shape.length}
            if stage.leaves_out(case):
                continue
            builds = {
                who: functools.partial(RUNS[direction], attend, shape)
                for who, attend in _contenders().items()
            }
            timings = race(builds, stage.deadline)
            stage.add_race(case, timings, against="cudnn softmax", bytes=plan_bytes(shape))


def _contenders() -> dict[str, Callable[..., jax.Array]]:
    found: dict[str, Callable[..., jax.Array]] = {}
    for impl in linear_kernels():

        def attend(*x: jax.Array, impl: str = impl) -> jax.Array:
            return linear_attention(*x, causal=True, impl=impl)

        def both_ways(*x: jax.Array, impl: str = impl) -> jax.Array:
            return linear_attention(*x, causal=False, impl=impl)

        found |= {f"ours {impl}": attend, f"ours {impl} bidirectional": both_ways}
    return found | {
        "xla scan": lambda *x: causal(Chunked(), Tiles(min(128, x[0].shape[1])), *x),
        "cudnn softmax": theirs("cudnn", True),
        "flow": _flow,
    }


def _flow(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal flow attention on the features of the paper."""
    from jaxformer.papers.flowformer.model import attend_causally

    return attend_causally(jax.nn.sigmoid(q), jax.nn.sigmoid(k), v)[0]


def both_run(attend: Callable[..., jax.Array], shape: Shape) -> Run:
    """Forward and backward pass."""

    def both(q: Any, k: Any, v: Any, do: Any) -> Any:
        o, pull = jax.vjp(attend, q, k, v)
        return o, pull(do.astype(o.dtype))

    return program(both, *shape.draw(4))


RUNS = {"forward": forward_run, "both": both_run}


def plan_bytes(shape: Shape) -> int:
    """Bytes that the forward pass has to move: the floor of its time."""
    x = [jax.ShapeDtypeStruct(shape.array, jnp.bfloat16)] * 3
    return plan(*x, causal=True, impl="chunked").hbm_bytes
