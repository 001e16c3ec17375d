"""Speed of the kernels: `jaxformer bench attention`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.kernels.attention import Causal, attention, plan

__all__ = ["bench_attention"]

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
    other programs use too; the times do not.
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
        impl = plan(*arrays, mask=Causal()).impl
        for name, build in (("forward", _output), ("forward + backward", _gradients)):
            programs = {
                who: jax.jit(build(attend)).lower(*arrays).compile()
                for who, attend in contenders.items()
            }
            times = _median_times(programs, arrays, runs)
            memory = {
                who: program.memory_analysis().temp_size_in_bytes / 2**20
                for who, program in programs.items()
            }
            ours, theirs = contenders
            rows.append(
                {
                    "L": length,
                    "pass": name,
                    "implementation": impl,
                    "ms": times[ours] * 1e3,
                    "jax.nn ms": times[theirs] * 1e3,
                    "speedup": times[theirs] / times[ours],
                    "temporary MiB": memory[ours],
                    "jax.nn temporary MiB": memory[theirs],
                    "memory saving": memory[theirs] / max(memory[ours], 2**-20),
                }
            )
    return rows


def _output(attend: Attend) -> Callable[..., Any]:
    return attend


def _gradients(attend: Attend) -> Callable[..., Any]:
    return jax.grad(lambda *x: jnp.square(attend(*x).astype(jnp.float32)).sum(), (0, 1, 2))


def _median_times(
    programs: Mapping[str, Callable[..., Any]], arrays: Sequence[jax.Array], runs: int
) -> dict[str, float]:
    """Seconds of one run of each program, in turns, after one run to warm up."""
    times: dict[str, list[float]] = {who: [] for who in programs}
    for turn in range(runs + 1):
        for who, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            if turn:
                times[who].append(time.perf_counter() - start)
    return {who: statistics.median(seconds) for who, seconds in times.items()}
