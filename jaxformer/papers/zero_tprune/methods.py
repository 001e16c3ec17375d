"""Pruning layers as a config names them: Zero-TPrune, its parts alone, and controls."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxformer.compress.intercepted import Intercepted
from jaxformer.compress.tokens import (
    Chance,
    ClassAttention,
    KeepTop,
    Pruner,
    Seen,
    keep_best,
    kept_count,
    prune_tokens,
)
from jaxformer.errors import ConfigError
from jaxformer.models.encoder import Classifier
from jaxformer.papers.zero_tprune.model import (
    EIR,
    Aggregate,
    Importance,
    MeanOfHeads,
    SStage,
    ZeroTPrune,
)


@dataclasses.dataclass(frozen=True)
class Matched:
    """ToMe's matching, dropping as many as `ZeroTPrune` with this `keep` and this `removed`."""

    keep: float
    removed: int

    def __call__(self, seen: Seen) -> jax.Array:
        count = kept_count(self.keep, seen.free - self.removed)
        similar = SStage(seen.free - count, order=None, partition="alternate")
        return keep_best(similar(seen).astype(jnp.float32), count, seen.protected)


METHODS = ("zero_tprune", "importance", "similarity", "class_attention", "random", "none")
AGGREGATES: dict[str, Aggregate] = {
    "eir_vhf": EIR(),
    "eir": EIR(0.0, float("inf")),
    "mean": MeanOfHeads(),
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A pruning layer by numbers: after block `after`, r `removed`, rho `keep` of what is left."""

    after: int
    keep: float
    removed: int
    iterations: int


@dataclasses.dataclass(frozen=True)
class Options:
    """What all pruning layers share, as it stands in a config."""

    method: str = "zero_tprune"
    boost: bool = True
    aggregate: str = "eir_vhf"
    restrict: bool = True
    feature: str = "key"
    metric: str = "cosine"
    partition: str = "seq_u"
    seed: int = 0

    def __post_init__(self) -> None:
        for field, allowed in (("method", METHODS), ("aggregate", AGGREGATES)):
            if getattr(self, field) not in allowed:
                value, names = getattr(self, field), ", ".join(allowed)
                raise ConfigError(f"prune.{field}={value!r}: must be one of {names}")

    def pruner(self, layer: Layer) -> Pruner:
        """The pruner of a layer; every method keeps as many tokens."""
        aggregate = AGGREGATES[self.aggregate]
        importance = Importance(layer.iterations, self.boost, aggregate)
        if self.method == "zero_tprune":
            order = Importance(1, self.boost, aggregate)
            similar = SStage(layer.removed, order, self.feature, self.metric, self.partition)
            return ZeroTPrune(layer.keep, similar, importance, self.restrict)
        if self.method == "similarity":
            return Matched(layer.keep, layer.removed)
        scores = {
            "importance": importance,
            "class_attention": ClassAttention(),
            "random": Chance(self.seed + layer.after),
        }
        return KeepTop(scores[self.method], layer.keep, layer.removed)


def pruned(model: Classifier, layers: Sequence[Layer], options: Options) -> Intercepted:
    """`model` as it is, with these pruning layers."""
    if options.method == "none":
        layers = ()
    return prune_tokens(model, {layer.after: options.pruner(layer) for layer in layers})


def token_counts(tokens: int, blocks: int, layers: Sequence[Layer]) -> list[int]:
    """How many tokens each block reads, class token included."""
    counts = []
    by_block = {layer.after: layer for layer in layers}
    for number in range(1, blocks + 1):
        counts.append(tokens)
        if number in by_block:
            layer = by_block[number]
            tokens = 1 + kept_count(layer.keep, tokens - 1 - layer.removed)
    return counts
