"""Attention on a mesh: any implementation under `jax.shard_map`.

Every device computes its batch rows, its heads and its queries. Keys and values are gathered along
the sequence axis: the keys of one device are those of all, so that every mask works as it is. A
kernel needs this because XLA cannot partition it by itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxformer.kernels.attention.masks import Mask
from jaxformer.kernels.attention.operands import Operand, Toeplitz
from jaxformer.kernels.attention.request import Request
from jaxformer.parallel.sharding import free_axes

Run = Callable[[Request], tuple[jax.Array, jax.Array | None]]
Split = Mapping[str, tuple[str, ...]]  # score axis -> the mesh axes it is divided over


def over_mesh(run: Run, request: Request) -> tuple[jax.Array, jax.Array | None]:
    """`run(request)`, each device on its own part where there is a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    split = _split(mesh, request)
    if not split:
        return run(request)
    ways = math.prod(mesh.shape[axis] for axis in split.get("h", ()))
    request = _divisible_heads(request, ways)

    def local(part: Request) -> tuple[jax.Array, jax.Array | None]:
        return run(_placed(part, request, split))

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(_specs(request, split),),
        out_specs=(_spec("blhk", None, split), _spec("bhl", None, split)),
        check_vma=False,
    )(request)


def _split(mesh: Any, request: Request) -> Split:
    """Score axes to divide: those whose mesh axes are free, more than one device and a divisor."""
    wanted = (("b", "batch"), ("h", "heads"), ("l", "length"))
    found = {a: free_axes(mesh, name, getattr(request.sizes, a)) for a, name in wanted}
    return {a: axes for a, axes in found.items() if axes is not None}


def _divisible_heads(request: Request, ways: int) -> Request:
    """Key heads that can be divided with the query heads: repeated where they could not."""
    heads = request.rules.head_map
    h, g = request.sizes.h, request.k.shape[2]
    if ways == 1 or (heads is None and g % ways == 0):
        return request
    heads = np.array(heads) if heads is not None else np.arange(h) // (h // g)
    rules = dataclasses.replace(request.rules, head_map=None)
    k, v = request.k[:, :, heads], request.v[:, :, heads]
    return dataclasses.replace(request, k=k, v=v, rules=rules)


# --------------------------------------------------------------------- which axis lies where


def _spec(letters: str, shape: Sequence[int] | None, split: Split) -> P:
    """`letters` names the axes of an array; one of size 1 is broadcast, not divided."""
    sizes = [2] * len(letters) if shape is None else shape
    return P(*(split.get(a) if n > 1 else None for a, n in zip(letters, sizes, strict=True)))


def _specs(request: Request, split: Split) -> Request:
    """The partition of every array of a call."""

    def trailing(letters: str, x: Any) -> P:
        shape = jnp.shape(x)
        return _spec(letters[len(letters) - len(shape) :], shape, split)

    def optional(letters: str, x: Any) -> P | None:
        return None if x is None else trailing(letters, x)

    return dataclasses.replace(
        request,
        q=_spec("blhk", None, split),
        k=_spec("bshk", None, split),
        v=_spec("bshk", None, split),
        mask=_mask_specs(request.mask, split),
        aux={
            name: dataclasses.replace(x, value=trailing(x.axes, x.value))
            for name, x in request.aux.items()
        },
        sink=optional("h", request.sink),
        q_pos=optional("bl", request.q_pos),
        k_pos=optional("bs", request.k_pos),
        seed=optional("", request.seed),
    )


def _mask_specs(mask: Mask, split: Split) -> Any:
    leaves, structure = jax.tree.flatten(mask)
    letters = mask.leaf_axes()
    specs = [_spec(a, jnp.shape(x), split) for a, x in zip(letters, leaves, strict=True)]
    return jax.tree.unflatten(structure, specs)


# --------------------------------------------------------------------- a part and its place


def _placed(part: Request, whole: Request, split: Split) -> Request:
    """A device's part, told where it lies in the whole."""

    def first(letter: str, n: int) -> jax.Array:
        axes = split.get(letter)
        return jnp.int32(0) if axes is None else (jax.lax.axis_index(axes) * n).astype(jnp.int32)

    sizes = part.sizes
    part = dataclasses.replace(
        part, origin=jnp.stack([first("b", sizes.b), first("h", sizes.h)]).astype(jnp.int32)
    )
    if "l" not in split:
        return part
    row = first("l", sizes.l)
    rows = row + jnp.arange(sizes.l, dtype=jnp.int32)
    length = whole.sizes.l

    def band(x: Operand) -> Operand:
        if not isinstance(x, Toeplitz):
            return x
        # Row i, column j reads i - j + S - 1: from `row` on, as many as the part has.
        value = jnp.atleast_2d(x.value)
        diagonals = value.shape[1] - length + sizes.l
        return Toeplitz(jax.lax.dynamic_slice_in_dim(value, row, diagonals, 1))

    return dataclasses.replace(
        part,
        q_pos=rows if part.q_pos is None else part.q_pos,
        aux={name: band(x) for name, x in part.aux.items()},
    )
