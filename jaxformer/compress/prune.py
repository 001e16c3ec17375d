"""Structured pruning: units of a trained model's widths, their saliency, masks and surgery.

A `Structure` is a list of units of one kind, such as the heads of a block, and says where in the
parameters each unit lies. While a model is pruned its parameters keep their shapes and masks, one
number for each unit, say what is left (`masked`); at the end `densify` cuts the rest away.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxformer import paths
from jaxformer.errors import ConfigError
from jaxformer.nn.norm import LayerNorm
from jaxformer.recipe import Params

Masks = Mapping[str, jax.Array]  # {structure: (units,) float32, 1 or 0}


@dataclasses.dataclass(frozen=True)
class Part:
    """The parameters whose whole names match `pattern`: unit u is slice u of their axis `axis`.

    What is not `scored` goes with a unit, but says nothing about its worth.
    """

    pattern: str
    axis: int
    scored: bool = True


@dataclasses.dataclass(frozen=True)
class Structure:
    """A list of units; `kind` is what is alike in all blocks, such as "head"."""

    name: str
    kind: str
    parts: tuple[Part, ...]


Structures = Sequence[Structure]


def vit_structures(depth: int) -> tuple[Structure, ...]:
    """Those of a ViT of `Attention` and `MLP`: one list of channels, and four for each block.

    "embedding", then for each block "head", "qk" (the same components in all heads), "value" and
    "mlp" (Yang et al. 2021, arXiv 2110.04869, section 3.1).
    """
    block, stack = r"encoder/stack/block_\d+", "encoder/stack"
    embedding = Structure(
        "embedding",
        "embedding",
        (
            Part("encoder/embed/projection/(kernel|bias)", -1),
            Part(rf"{block}/mixer/(query|key|value)/kernel", -3),
            Part(rf"{block}/mixer/out/(kernel|bias)", -1),
            Part(rf"{block}/mlp/up/kernel", -2),
            Part(rf"{block}/mlp/down/(kernel|bias)", -1),
            Part("encoder/(class_tokens|position/table)", -1, scored=False),
            Part("encoder/(.*/)?norm/(scale|bias)", -1, scored=False),
            Part("head/(head/)?kernel", -2, scored=False),
        ),
    )
    found = [embedding]
    for i in range(depth):
        mixer, mlp = f"{stack}/block_{i}/mixer", f"{stack}/block_{i}/mlp"
        lists = {
            "head": (
                Part(f"{mixer}/(query|key|value)/(kernel|bias)", -2),
                Part(f"{mixer}/out/kernel", -3, scored=False),
            ),
            "qk": (
                Part(f"{mixer}/query/(kernel|bias)", -1),
                Part(f"{mixer}/key/(kernel|bias)", -1, scored=False),
            ),
            "value": (
                Part(f"{mixer}/value/(kernel|bias)", -1),
                Part(f"{mixer}/out/kernel", -2, scored=False),
            ),
            "mlp": (
                Part(f"{mlp}/up/(kernel|bias)", -1),
                Part(f"{mlp}/down/kernel", -2, scored=False),
            ),
        }
        found += [Structure(f"block_{i}/{kind}", kind, parts) for kind, parts in lists.items()]
    return tuple(found)


def sizes(structures: Structures, params: Params) -> dict[str, int]:
    """How many units each structure has.

    Raises:
        ConfigError: a part is of no parameter, or two of one structure differ in length.
    """
    leaves = paths.leaves(params)
    found: dict[str, int] = {}
    for structure in structures:
        for part in structure.parts:
            names = [name for name in leaves if re.fullmatch(part.pattern, name)]
            if not names:
                raise ConfigError(
                    f"structure {structure.name!r}: no parameter is named {part.pattern!r}; these "
                    "are parameters of another model than the structures are of"
                )
            for name in names:
                shape = leaves[name].shape
                length = shape[part.axis] if len(shape) >= -part.axis else None
                if found.setdefault(structure.name, length) != length or length is None:
                    raise ConfigError(
                        f"structure {structure.name!r}: {name!r} has the shape {shape}, of which "
                        f"axis {part.axis} should be the {found[structure.name]} units"
                    )
    return found


def whole(structures: Structures, params: Params) -> dict[str, jax.Array]:
    """Masks that leave everything."""
    return {name: jnp.ones(size) for name, size in sizes(structures, params).items()}


def masked(structures: Structures, params: Params, masks: Masks) -> Params:
    """The parameters with all that belongs to removed units 0."""

    def one(name: str, leaf: jax.Array) -> jax.Array:
        for structure, part in _parts(structures, name):
            mask = masks[structure.name]
            leaf = leaf * mask.reshape(mask.shape + (1,) * (-part.axis - 1)).astype(leaf.dtype)
        return leaf

    return paths.map_named(one, params)


def unit_sums(structures: Structures, params: Params, gradient: Params) -> dict[str, jax.Array]:
    """Sum of g w over all scored parameters of each unit: (units,) for each structure.

    That is the derivative of the loss by a factor on these parameters, at 1.
    """
    found: dict[str, jax.Array] = {}
    gradients = paths.leaves(gradient)
    for name, leaf in paths.leaves(params).items():
        product = leaf * gradients[name]
        for structure, part in _parts(structures, name):
            if part.scored:
                others = tuple(i for i in range(leaf.ndim) if i != leaf.ndim + part.axis)
                total = found.get(structure.name, 0.0) + product.sum(others)
                found[structure.name] = total
    return found


def unit_norms(structures: Structures, params: Params) -> dict[str, jax.Array]:
    """The root mean square of all scored parameters of each unit: magnitude."""
    ones = jax.tree.map(jnp.ones_like, params)
    squares = unit_sums(structures, jax.tree.map(jnp.square, params), ones)
    counts = unit_sums(structures, ones, ones)
    return {name: jnp.sqrt(squares[name] / counts[name]) for name in squares}


def alive(structures: Structures, params: Params) -> dict[str, jax.Array]:
    """The masks that parameters tell: a unit is removed if all of its scored parameters are 0."""
    return {
        name: (norm > 0).astype(jnp.float32)
        for name, norm in unit_norms(structures, params).items()
    }


def densify(
    structures: Structures, params: Params, masks: Masks, widths: Mapping[str, int]
) -> Params:
    """The parameters of the units that are left: slices, nothing else.

    `widths` says how many units of each structure that is: shapes follow from it alone.
    """

    def one(name: str, leaf: jax.Array) -> jax.Array:
        for structure, part in _parts(structures, name):
            kept = jnp.nonzero(masks[structure.name], size=widths[structure.name])[0]
            leaf = jnp.take(leaf, kept, axis=part.axis)
        return leaf

    return paths.map_named(one, params)


def count_units(masks: Masks) -> dict[str, int]:
    """How many units are left, of concrete masks."""
    return {name: int(np.count_nonzero(mask)) for name, mask in masks.items()}


def _parts(structures: Structures, name: str) -> list[tuple[Structure, Part]]:
    """The structures that a parameter has an axis of."""
    return [
        (structure, part)
        for structure in structures
        for part in structure.parts
        if re.fullmatch(part.pattern, name)
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class LiveNorms:
    """An interceptor: layer norms average over channels that are left, as they will when dense.

    A removed channel is 0, which would otherwise count.
    """

    mask: jax.Array

    def __call__(
        self, method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        module, x = context.module, args[0] if args else None
        if not isinstance(module, LayerNorm) or context.method_name != "moments":
            return method(*args, **kwargs)
        if x.shape[-1:] != self.mask.shape:
            return method(*args, **kwargs)  # of something else than the residual stream
        count = self.mask.sum()
        mean = (x * self.mask).sum(-1, keepdims=True) / count
        return mean, (jnp.square(x - mean) * self.mask).sum(-1, keepdims=True) / count


# --------------------------------------------------------------------------------------- ranking


@dataclasses.dataclass(frozen=True, eq=False)
class Grouped:
    """Units of a list, ascending in score, cut into groups of one size; the last may be smaller."""

    order: jax.Array  # (units,)
    sizes: np.ndarray  # (groups,)
    scores: jax.Array  # (groups,), the sum of each

    @classmethod
    def of(cls, scores: jax.Array, size: int) -> Grouped:
        count = len(scores)
        order = jnp.argsort(scores, stable=True)
        starts = np.arange(0, count, size)
        lengths = np.minimum(size, count - starts)
        member = np.repeat(np.arange(len(starts)), lengths)
        total = jax.ops.segment_sum(scores[order], member, len(starts))
        return cls(order, lengths, total)

    def without(self, dead: jax.Array) -> jax.Array:
        """The mask (units,) that removes groups which are `dead`, but never the last."""
        dead = jnp.asarray(dead).at[-1].set(False)
        units = jnp.repeat(dead, self.sizes, total_repeat_length=len(self.order))
        return jnp.ones(len(self.order)).at[self.order].set(1.0 - units)


def globally(groups: Mapping[str, Grouped], index: jax.Array) -> dict[str, jax.Array]:
    """Masks without the groups that score at most what group `index` of all, ascending, scores."""
    everyone = jnp.sort(jnp.concatenate([group.scores for group in groups.values()]))
    threshold = everyone[jnp.clip(index, 0, len(everyone) - 1)]
    return {name: group.without(group.scores <= threshold) for name, group in groups.items()}


def evenly(groups: Mapping[str, Grouped], share: jax.Array) -> dict[str, jax.Array]:
    """Masks without the same share of the groups of each list, the lowest.

    Lists round it at different places, so that a little more of it takes few groups, and not one
    of each.
    """

    def one(group: Grouped, start: float) -> jax.Array:
        count = len(group.sizes)
        return group.without(jnp.arange(count) < jnp.floor(share * count + start))

    return {name: one(group, i / len(groups)) for i, (name, group) in enumerate(groups.items())}
