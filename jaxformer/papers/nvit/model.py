"""NViT: all widths of a ViT in one ranking, by a second-order score and what time it would save.

Symbols of the paper: a unit's weights w and gradients g, its score I_S = (sum over S of g w)^2, the
latency Lat of the widths that are left, the weight eta of what a removal saves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.analyze.latency import Latency, Table, Widths
from jaxformer.compress.prune import (
    Grouped,
    Masks,
    Structures,
    evenly,
    globally,
    unit_norms,
)
from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import Mask
from jaxformer.models.encoder import Classifier
from jaxformer.nn.attention import Attention, head_sizes
from jaxformer.nn.block import Stack
from jaxformer.nn.make import Make
from jaxformer.nn.mlp import MLP
from jaxformer.nn.position import At, Position, Scheme
from jaxformer.recipe import Params

KINDS = ("embedding", "head", "qk", "value", "mlp")
CONSTANTS = {"embedding": 12.0, "head": 6.0, "qk": 2.0, "value": 2.0, "mlp": 1.0}  # of scores
LEAST = {"head": 2, "qk": 8, "value": 8, "mlp": 16}  # so few are not rewarded for becoming less

# --------------------------------------------------------------------------- models of any width


class BlockWidths(NamedTuple):
    heads: int
    qk: int  # of a head
    value: int  # of a head
    mlp: int


class ModelWidths(NamedTuple):
    embedding: int
    blocks: tuple[BlockWidths, ...]

    @classmethod
    def of(cls, counts: Mapping[str, int]) -> ModelWidths:
        """Of the units that are left of each structure."""
        depth = sum(name.endswith("/head") for name in counts)
        lists = ("head", "qk", "value", "mlp")
        blocks = (BlockWidths(*(counts[f"block_{i}/{k}"] for k in lists)) for i in range(depth))
        return cls(counts["embedding"], tuple(blocks))

    @classmethod
    def read(cls, value: Any) -> ModelWidths:
        """As it lies in a config: (embedding, ((heads, qk, value, mlp), ...)).

        Raises:
            ConfigError: it does not.
        """
        try:
            embedding, blocks = value
            found = cls(int(embedding), tuple(BlockWidths(*map(int, row)) for row in blocks))
            sizes = [found.embedding, *(x for block in found.blocks for x in block)]
        except (TypeError, ValueError):
            sizes = [0]
        if min(sizes) < 1:
            raise ConfigError(
                f"widths={value!r}: must be (embedding, ((heads, qk, value, mlp), ...)), all >= 1"
            )
        return found

    def counts(self) -> dict[str, int]:
        """The inverse of `of`."""
        found = {"embedding": self.embedding}
        for i, block in enumerate(self.blocks):
            for kind, size in zip(("head", "qk", "value", "mlp"), block, strict=True):
                found[f"block_{i}/{kind}"] = size
        return found

    def rows(self) -> list[Widths]:
        """For a latency."""
        return [Widths(self.embedding, *block) for block in self.blocks]


def widths_of(model: Classifier) -> ModelWidths:
    """Those of a model of plain blocks.

    Raises:
        ConfigError: it has others.
    """
    encoder = dict(model.encoder.arguments)
    stack = encoder["stack"]
    if stack.cls is not Stack:
        raise ConfigError("model.scan=True: blocks are pruned each for itself; set it to False")
    width = dict(encoder["embed"].arguments)["width"]
    found = []
    for block in dict(stack.arguments)["blocks"]:
        parts = dict(block.arguments)
        mixer, mlp = parts["mixer"], parts["mlp"]
        options = dict(mixer.arguments)
        plain = issubclass(mixer.cls, Attention) and issubclass(mlp.cls, MLP)
        if not plain or options.get("position", Make(Position)) != Make(Position):
            raise ConfigError(
                f"model: {mixer.cls.__name__} and {mlp.cls.__name__} cannot be pruned; take blocks "
                "of Attention, with positions added to the embeddings, and MLP"
            )
        heads, sizes = options["heads"], (options.get("kv_heads"), options.get("head_size"))
        kv_heads, qk = head_sizes(width, heads, *sizes)
        if kv_heads != heads:
            raise ConfigError(f"model.kv_heads={kv_heads}: must be the {heads} heads")
        value = options.get("value_size") or qk
        found.append(BlockWidths(heads, qk, value, dict(mlp.arguments)["hidden"]))
    return ModelWidths(width, tuple(found))


def narrowed(model: Classifier, widths: ModelWidths) -> Classifier:
    """`model` with other widths in each block; the scale of its scores stays what it was."""
    before = widths_of(model)
    if len(widths.blocks) != len(before.blocks):
        raise ConfigError(
            f"widths: of {len(widths.blocks)} blocks, the model has {len(before.blocks)}"
        )
    encoder = dict(model.encoder.arguments)
    blocks = []
    rows = zip(
        dict(encoder["stack"].arguments)["blocks"], before.blocks, widths.blocks, strict=True
    )
    for block, was, now in rows:
        parts = dict(block.arguments)
        mixer = parts["mixer"]
        scale = dict(mixer.arguments).get("scale") or was.qk**-0.5
        sizes = {"heads": now.heads, "kv_heads": None, "head_size": now.qk, "value_size": now.value}
        mixer = mixer.replace(**sizes, scale=scale)
        blocks.append(block.replace(mixer=mixer, mlp=parts["mlp"].replace(hidden=now.mlp)))
    changed = model.encoder.replace(
        embed=encoder["embed"].replace(width=widths.embedding),
        stack=encoder["stack"].replace(blocks=tuple(blocks)),
    )
    return dataclasses.replace(model, encoder=changed)


def revit(embedding: int) -> ModelWidths:
    """The rule that the pruned widths suggest (section 4.3), for 12 blocks."""
    e, u = round(0.005 * embedding), round(0.05 * embedding / 8)
    outer = BlockWidths(10, 16 * u, 64, 3 * embedding)
    near = BlockWidths(2 * e, 8 * u, 64, 3 * embedding)
    middle = BlockWidths(4 * e, 16 * u, 64, 6 * embedding)
    return ModelWidths(embedding, (outer, near, near, *[middle] * 6, near, near, outer))


class Factors(nn.Module):
    """Queries, keys and values times a trained factor of the token and, with `gates`, of the head.

    The form in which the authors keep their models; all factors are 1 at first.
    """

    gates: bool = False

    @nn.compact
    def __call__(self, *qkv: jax.Array) -> list[jax.Array]:
        ones = nn.initializers.ones
        length, heads = qkv[0].shape[1:3]
        factor = self.param("token", ones, (length, 1), jnp.float32)
        if self.gates:
            factor = factor * self.param("head", ones, (heads,), jnp.float32)
        return [x * factor[..., None].astype(x.dtype) for x in qkv]


class FactoredAttention(Attention):
    """Attention with `Factors`: as the authors' dense models have it."""

    def attend(
        self,
        q_BxLxHxK: jax.Array,
        k_BxSxGxK: jax.Array,
        v_BxSxGxK: jax.Array,
        *,
        mask: Mask,
        scheme: Scheme,
        at: At,
        **more: Any,
    ) -> jax.Array:
        qkv = Factors(name="factors")(q_BxLxHxK, k_BxSxGxK, v_BxSxGxK)
        return super().attend(*qkv, mask=mask, scheme=scheme, at=at, **more)


# ------------------------------------------------------------------------------------------ scores


def widths_left(masks: Masks) -> Widths:
    """Of all blocks, (depth,) each, as masks say; traced."""
    depth = sum(name.endswith("/head") for name in masks)

    def counts(kind: str) -> jax.Array:
        return jnp.stack([masks[f"block_{i}/{kind}"].sum() for i in range(depth)])

    embedding = jnp.broadcast_to(masks["embedding"].sum(), (depth,))
    return Widths(embedding, *(counts(kind) for kind in ("head", "qk", "value", "mlp")))


def savings(latency: Latency, masks: Masks) -> dict[str, jax.Array]:
    """What one unit less of each structure saves: Lat(dims) - Lat(dims with one less)."""
    widths = widths_left(masks)
    now = latency(widths)
    found: dict[str, jax.Array] = {}
    for field, kind in zip(Widths._fields, KINDS, strict=True):
        less = widths._replace(**{field: getattr(widths, field) - 1})
        saved = now - latency(less)
        if kind == "embedding":
            found[kind] = saved.sum()
            continue
        saved = jnp.where(getattr(widths, field) > LEAST[kind], saved, 0.0)
        found |= {f"block_{i}/{kind}": x for i, x in enumerate(saved)}
    return found


class Standing(NamedTuple):
    """Where pruning is at when it ranks."""

    params: Params
    masks: Masks
    saliency: Mapping[str, jax.Array]  # the mean of (sum of g w / constant)^2
    round: jax.Array  # of pruning, from 0


class Ranking(Protocol):
    """Which units stay after a round: masks, of which removed ones are made by the caller."""

    def __call__(self, standing: Standing) -> Masks: ...


@dataclasses.dataclass(frozen=True)
class Plan:
    """Structures, the size of groups by kind, and how many groups go in each round."""

    structures: Structures
    groups: tuple[tuple[str, int], ...]
    per_round: float = 2.0

    def grouped(self, scores: Mapping[str, jax.Array], masks: Masks) -> dict[str, Grouped]:
        """Units in groups, removed ones first."""
        size = dict(self.groups)
        return {
            s.name: Grouped.of(jnp.where(masks[s.name] > 0, scores[s.name], -jnp.inf), size[s.kind])
            for s in self.structures
        }

    def index(self, round: jax.Array) -> jax.Array:
        """Of the group whose score is the threshold: max(0, floor(groups x rounds) - 1)."""
        return jnp.maximum(0, jnp.floor(self.per_round * round).astype(jnp.int32) - 1)


@dataclasses.dataclass(frozen=True)
class Hessian:
    """NViT: the second-order score less what is saved, all lists in one order.

    `eta` is for a latency of which the first block, whole, takes 1: that of the authors, 5e-4 with
    0.0808 seconds, is 4.04e-5.
    """

    plan: Plan
    latency: Latency
    eta: float = 4.04e-5

    def __call__(self, standing: Standing) -> Masks:
        scores = dict(standing.saliency)
        if self.eta:
            unit = self.latency(widths_left(jax.tree.map(jnp.ones_like, dict(standing.masks))))[0]
            saved = savings(self.latency, standing.masks)
            scores = {n: score - self.eta * saved[n] / unit for n, score in scores.items()}
        groups = self.plan.grouped(scores, standing.masks)
        return globally(groups, self.plan.index(standing.round))


@dataclasses.dataclass(frozen=True)
class Magnitude:
    """A control: the smallest weights, the same share of every list."""

    plan: Plan

    def __call__(self, standing: Standing) -> Masks:
        norms = unit_norms(self.plan.structures, standing.params)
        groups = self.plan.grouped(norms, standing.masks)
        count = sum(len(group.sizes) for group in groups.values())
        return evenly(groups, (standing.round + 1) * self.plan.per_round / count)


@dataclasses.dataclass(frozen=True)
class Chance:
    """A control: groups at random, of random units."""

    plan: Plan
    seed: int = 0

    def __call__(self, standing: Standing) -> Masks:
        groups = {}
        key = jax.random.fold_in(jax.random.key(self.seed), standing.round)
        for i, structure in enumerate(self.plan.structures):
            of_units, of_groups = jax.random.split(jax.random.fold_in(key, i))
            mask = standing.masks[structure.name]
            scores = {structure.name: jax.random.uniform(of_units, mask.shape)}
            only = dataclasses.replace(self.plan, structures=(structure,))
            group = only.grouped(scores, standing.masks)[structure.name]
            drawn = jax.random.uniform(of_groups, group.scores.shape)
            scores_G = jnp.where(jnp.isinf(group.scores), -jnp.inf, drawn)
            groups[structure.name] = Grouped(group.order, group.sizes, scores_G)
        return globally(groups, self.plan.index(standing.round))


def check_groups(plan: Plan, counts: Mapping[str, int]) -> None:
    """Raise a `ConfigError` for a kind without a size of groups; warn where one is cut short."""
    import warnings

    size = dict(plan.groups)
    for structure in plan.structures:
        if size.get(structure.kind, 0) < 1:
            raise ConfigError(f"prune.groups: needs a size of at least 1 for {structure.kind!r}")
        rest = counts[structure.name] % size[structure.kind]
        if rest:
            warnings.warn(
                f"prune.groups: {size[structure.kind]} does not divide the "
                f"{counts[structure.name]} units of {structure.name}; its last group has {rest}",
                stacklevel=2,
            )


def check_latency(latency: Latency, widths: ModelWidths) -> None:
    """Raise a `ConfigError` where a table does not reach the model's widths."""
    if isinstance(latency, Table):
        for row in widths.rows():
            latency.check(row)
