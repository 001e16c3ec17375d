"""One-shot pruning of all widths of a plain ViT, to a share of the blocks' FLOPs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.analyze.latency import Widths, multiply_adds
from jaxformer.compress.compressor import Facts, check_unpacked, share_of
from jaxformer.compress.intercepted import Intercepted, innermost, inside
from jaxformer.compress.prune import (
    LiveNorms,
    Masks,
    Structures,
    count_units,
    densify,
    masked,
    unit_sums,
    vit_structures,
    whole,
)
from jaxformer.errors import ConfigError
from jaxformer.models.encoder import Classifier
from jaxformer.papers.nvit.model import (
    CONSTANTS,
    Hessian,
    ModelWidths,
    Plan,
    Standing,
    narrowed,
    widths_left,
    widths_of,
)
from jaxformer.recipe import Batch, Extra, Params

GROUPS = {"embedding": 16, "head": 2, "qk": 8, "value": 8, "mlp": 16}  # of DeiT-B, section 4
FEWEST = 8  # groups of a list; smaller models have smaller groups
ROUNDS = 4  # of scoring, each on what the one before has left
BATCH = 8  # examples whose gradient is one


@dataclasses.dataclass(frozen=True)
class MultiplyAdds:
    """The latency that FLOPs are."""

    tokens: int

    def __call__(self, widths: Widths) -> jax.Array:
        return multiply_adds(widths, self.tokens)


@dataclasses.dataclass(frozen=True)
class Narrowed:
    """NViT's ranking on the gradients of labelled examples, without the training between rounds."""

    share: float
    note: str = "pruned in one shot, without training after it"

    def find(
        self, task: Any, params: Params, extra: Extra, batch: Batch
    ) -> tuple[Params, Extra, Facts]:
        check_unpacked(params)
        model = innermost(task.model)
        if not isinstance(model, Classifier) or not {"image", "label"} <= set(batch):
            raise ConfigError("method: nvit prunes ViTs by labelled images; this reads others")
        counts = widths_of(model).counts()
        structures = vit_structures(len(widths_of(model).blocks))
        groups = {s.kind: group_size(s.kind, counts[s.name]) for s in structures}
        tokens = len(params["encoder"]["position"]["table"])
        plan = Plan(structures, tuple(groups.items()), per_round=1.0)
        ranking = Hessian(plan, MultiplyAdds(tokens))
        masks = whole(structures, params)
        saliency = jax.jit(lambda p, e, m, b: scores(task, structures, p, e, m, b))
        for i in range(ROUNDS):
            sums = [saliency(params, extra, masks, rows) for rows in parts(batch)]
            mean = jax.tree.map(lambda *x: jnp.stack(x).mean(0), *sums)
            goal = 1 - (1 - self.share) * (i + 1) / ROUNDS
            masks = fewest(ranking, Standing(params, masks, mean, jnp.zeros(())), goal)
        kept = count_units(jax.device_get(masks))
        small = densify(structures, params, masks, kept)
        embedding, blocks = ModelWidths.of(kept)
        return small, extra, {"widths": [embedding, [list(block) for block in blocks]]}

    def task(self, task: Any, found: Facts) -> Any:
        widths = ModelWidths.read(found["widths"])
        model = inside(task.model, lambda model: narrowed(model, widths))
        return dataclasses.replace(task, model=model)


def group_size(kind: str, units: int) -> int:
    """Of a list of so many units."""
    size = GROUPS[kind]
    while size > 1 and units < FEWEST * size:
        size //= 2
    return size


def parts(batch: Batch) -> list[Batch]:
    """Batches of `BATCH` examples, or the whole where there are fewer; what is over is left out."""
    rows = len(batch["label"])
    size = min(BATCH, rows)
    starts = range(0, rows - size + 1, size)
    return [{name: x[k : k + size] for name, x in batch.items()} for k in starts]


def scores(
    task: Any, structures: Structures, params: Params, extra: Extra, masks: Masks, batch: Batch
) -> dict[str, jax.Array]:
    """((sum of g w) / constant)^2 of every unit, of what the masks leave."""
    norms = LiveNorms(masks["embedding"])
    live = dataclasses.replace(task, model=Intercepted(task.model, (norms,)))

    def loss(params: Params) -> jax.Array:
        left = masked(structures, params, masks)
        return live.loss(left, extra, batch, key=jax.random.key(0), train=False).loss

    sums = unit_sums(structures, params, jax.grad(loss)(params))
    kinds = {s.name: CONSTANTS[s.kind] for s in structures}
    return {name: jnp.square(x / kinds[name]) for name, x in sums.items()}


def share_left(ranking: Hessian, masks: Masks) -> float:
    """Of the whole model's cost."""
    full = jax.tree.map(jnp.ones_like, dict(masks))
    now, before = (ranking.latency(widths_left(m)).sum() for m in (masks, full))
    return float(now / before)


def fewest(ranking: Hessian, standing: Standing, goal: float) -> Mapping[str, jax.Array]:
    """The masks that remove the fewest groups, lowest first, and cost at most the goal.

    Raises:
        ConfigError: with one group of each list left it is still dearer.
    """

    def without(index: int) -> dict[str, jax.Array]:
        ranked = ranking(standing._replace(round=jnp.asarray(index + 1.0)))
        return {name: mask * ranked[name] for name, mask in standing.masks.items()}

    low, high = -1, sum(len(mask) for mask in standing.masks.values())
    while high - low > 1:
        middle = (low + high) // 2
        enough = share_left(ranking, without(middle)) <= goal
        low, high = (low, middle) if enough else (middle, high)
    found = without(high)
    if share_left(ranking, found) > goal:
        raise ConfigError(f"method: nvit cannot leave {goal:.3g} of the FLOPs; give a larger share")
    return found


def compressor(argument: str) -> Narrowed:
    """NViT to the share of FLOPs "0.5"."""
    return Narrowed(share_of(argument, "the share of FLOPs that is left, such as 0.5", 0.0, 1.0))
