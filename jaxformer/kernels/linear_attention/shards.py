"""Linear attention on a mesh: a kernel under `jax.shard_map`, since XLA cannot divide it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jaxformer.parallel.sharding import ACTIVATION_AXES

Run = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def over_mesh(run: Run, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`run(q, k, v)` of (B, L, H, K) arrays, each device on its batch rows and heads.

    Lengths are whole on every device: the states of a divided length would have to travel.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = _divides(mesh, "batch", q.shape[0])
    heads = _divides(mesh, "heads", q.shape[2])
    if rows is None and heads is None:
        return run(q, k, v)
    spec = P(rows, None, heads, None)
    divided = jax.shard_map(run, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return divided(q, k, v)


def _divides(mesh: Any, logical: str, n: int) -> tuple[str, ...] | None:
    """The free mesh axes of a logical axis, if they are more than one device and divide n."""
    wanted = ACTIVATION_AXES[logical] or ()
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    axes = tuple(a for a in wanted if a in mesh.shape and a not in mesh.manual_axes)
    ways = math.prod(mesh.shape[a] for a in axes)
    return axes if ways > 1 and n % ways == 0 else None
