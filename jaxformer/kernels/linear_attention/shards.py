"""Linear attention on a mesh: a kernel under `jax.shard_map`, since XLA cannot divide it."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P

from jaxformer.parallel.sharding import free_axes

Run = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def over_mesh(run: Run, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`run(q, k, v)` of (B, L, H, K) arrays, each device on its batch rows and heads.

    Lengths are whole on every device: the states of a divided length would have to travel.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = free_axes(mesh, "batch", q.shape[0])
    heads = free_axes(mesh, "heads", q.shape[2])
    if rows is None and heads is None:
        return run(q, k, v)
    spec = P(rows, None, heads, None)
    divided = jax.shard_map(run, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return divided(q, k, v)
