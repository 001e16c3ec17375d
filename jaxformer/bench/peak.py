"""What the device can do: the denominators of everything else."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxformer.bench.clock import Timing, program, race
from jaxformer.bench.stage import Stage


def measure(stage: Stage) -> None:
    """Square matrix products in bfloat16, and copies of arrays larger than any cache."""
    for size in (64,) if stage.tiny else (4096, 8192, 16384):
        stage.add({"what": "matmul", "size": size}, _matmul(stage, size), 2 * size**3)
    for mebibytes in (1,) if stage.tiny else (256, 2048):
        x = _random((mebibytes, 2**19), 0)
        timing = _time(stage, jnp.negative, x)
        rate = 2 * x.nbytes / timing.seconds / 1e9 if timing.seconds else None
        stage.add({"what": "copy", "size": mebibytes}, timing, **{"GB/s": rate})


def matmul_rate(stage: Stage) -> float | None:
    """FLOP/s of a large product, now: the peak beside which a training step is judged."""
    size = 64 if stage.tiny else 8192
    seconds = _matmul(stage, size).seconds
    return 2 * size**3 / seconds if seconds else None


def _matmul(stage: Stage, size: int) -> Timing:
    return _time(stage, jnp.matmul, *(_random((size, size), seed) for seed in (0, 1)))


def _time(stage: Stage, function: Callable[..., jax.Array], *arrays: jax.Array) -> Timing:
    return race({"xla": lambda: program(function, *arrays)}, stage.deadline)["xla"]


def _random(shape: tuple[int, ...], seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
