"""Pruning layers for a share of the FLOPs, in any plain ViT."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxformer.analyze.flops import count
from jaxformer.compress.compressor import Facts, share_of
from jaxformer.compress.intercepted import innermost, inside, interceptors
from jaxformer.compress.tokens import DropTokens
from jaxformer.errors import ConfigError
from jaxformer.models.encoder import Classifier
from jaxformer.papers.zero_tprune.methods import Layer, Options, pruned
from jaxformer.recipe import Batch, Extra, Params

SIMILAR = 0.05  # of the tokens go by the S-stage of each layer: the paper's 10 of 196
VOTES = (30, 5, 1)  # early attention is noisy and needs many, late attention one


@dataclasses.dataclass(frozen=True)
class Pruned:
    """Zero-TPrune after each quarter of the blocks, its ratio that of a `share` of the FLOPs."""

    share: float
    note: str = ""

    def find(
        self, task: Any, params: Params, extra: Extra, batch: Batch
    ) -> tuple[Params, Extra, Facts]:
        """The mildest ratio that reaches the share; nothing is changed."""
        model = innermost(task.model)
        if not isinstance(model, Classifier) or "image" not in batch:
            raise ConfigError(
                f"method: zero_tprune drops patches of images; {type(model).__name__} is no ViT"
            )
        if any(isinstance(i, DropTokens) for i in interceptors(task.model)):
            raise ConfigError("method: zero_tprune comes once in a chain; its tokens are dropped")
        encoder = dict(model.encoder.arguments)
        patch = dict(encoder["embed"].arguments)["patch"]
        depth = len(dict(encoder["stack"].arguments).get("blocks", ()))
        free = (batch["image"].shape[1] // patch) * (batch["image"].shape[2] // patch)
        key = jax.random.key(0)

        def cost(task: Any) -> int:
            return count(lambda p, e, b: task.predict(p, e, b, key=key), params, extra, batch)

        goal, low, high = (
            self.share * cost(task),
            0,
            free,
        )  # of `free` tokens `low` keep the share, `high` not
        while high - low > 1:
            middle = (low + high) // 2
            layers = rows(depth, free, middle / free)
            fits = layers is None or cost(self.task(task, {"layers": layers})) <= goal
            low, high = (middle, high) if fits else (low, middle)
        layers = rows(depth, free, low / free) if low else None
        if layers is None:
            raise ConfigError(
                f"method: zero_tprune:{self.share:g} is out of reach with {depth} blocks and "
                f"{free} tokens; give a larger share"
            )
        return params, extra, {"layers": layers}

    def task(self, task: Any, found: Facts) -> Any:
        layers = [Layer(*row) for row in found["layers"]]
        model = inside(task.model, lambda model: pruned(model, layers, Options()))
        return dataclasses.replace(task, model=model)


def rows(depth: int, free: int, keep: float) -> list[list[Any]] | None:
    """Pruning layers of one ratio after each quarter; None where no token would be left."""
    found = []
    places = sorted({max(1, round(depth * quarter / 4)) for quarter in (1, 2, 3)} - {depth})
    for place, votes in zip(places, VOTES, strict=False):
        similar = int(SIMILAR * free)
        if int(keep * (free - similar) + 1e-9) < 1:
            return None
        found.append([place, keep, similar, votes])
        free = int(keep * (free - similar) + 1e-9)
    return found


def compressor(argument: str) -> Pruned:
    """Zero-TPrune to the share of FLOPs "0.65"."""
    return Pruned(share_of(argument, "the share of FLOPs that is left, such as 0.65", 0.0, 1.0))
