"""`jaxformer bench attention`: this op beside `jax.nn`, and what it would run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.bench.clock import Deadline, Timing, program, race
from jaxformer.kernels.attention import Causal, attention, plan

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def bench_attention(
    lengths: Sequence[int] = (1024, 2048, 4096),
    *,
    batch: int = 1,
    heads: int = 4,
    head_size: int = 64,
    runs: int = 7,
) -> list[dict[str, Any]]:
    """Causal attention beside `jax.nn.dot_product_attention`: median times and temporary memory.

    Random data; float32 on a CPU, bfloat16 elsewhere. The two take turns in one process, so that
    the ratios ("speedup" and "memory saving", above 1 where ours is better) survive a machine that
    other programs use too; the times do not. The plan is that of the forward pass.
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    contenders: dict[str, Attend] = {
        "jaxformer": lambda q, k, v: attention(q, k, v, mask=Causal()),
        "jax.nn": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
    }
    rows = []
    for length in lengths:
        keys = jax.random.split(jax.random.key(length), 3)
        arrays = [jax.random.normal(key, (batch, length, heads, head_size), dtype) for key in keys]
        planned = plan(*arrays, mask=Causal())
        for name, build in (("forward", _output), ("forward + backward", _gradients)):
            builds = {
                who: functools.partial(program, build(attend), *arrays)
                for who, attend in contenders.items()
            }
            ours, theirs = race(builds, Deadline.after(60, runs)).values()
            rows.append(
                {
                    "L": length,
                    "pass": name,
                    "implementation": planned.impl,
                    "tiles": "x".join(map(str, planned.tiles or ("-",))),
                    **_compare(ours, theirs),
                    "GFLOP": planned.flops / 1e9,
                    "moved MiB": planned.hbm_bytes / 2**20,
                    "why": planned.why,
                }
            )
    return rows


def _compare(ours: Timing, theirs: Timing) -> dict[str, Any]:
    if ours.seconds is None or theirs.seconds is None:
        return {"error": ours.error or theirs.error}
    memory, their_memory = ((x.temporary or 0) / 2**20 for x in (ours, theirs))
    return {
        "ms": ours.seconds * 1e3,
        "jax.nn ms": theirs.seconds * 1e3,
        "speedup": theirs.seconds / ours.seconds,
        "temporary MiB": memory,
        "jax.nn temporary MiB": their_memory,
        "memory saving": their_memory / max(memory, 2**-20),
    }


def _output(attend: Attend) -> Callable[..., Any]:
    return attend


def _gradients(attend: Attend) -> Callable[..., Any]:
    return jax.grad(lambda *x: jnp.square(attend(*x).astype(jnp.float32)).sum(), (0, 1, 2))
