"""Pruning while training, and what is taught meanwhile: the task and the update of its phases."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer import paths
from jaxformer.analyze.latency import Latency
from jaxformer.compress.intercepted import Intercepted
from jaxformer.compress.prune import LiveNorms, Masks, Structures, masked, unit_sums, whole
from jaxformer.errors import ConfigError
from jaxformer.papers.nvit.model import CONSTANTS, Ranking, Standing, widths_left
from jaxformer.recipe import Batch, Extra, LossOutput, Mean, Metrics, Params, TrainState
from jaxformer.tasks import linen
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.tasks.losses import cross_entropy, is_correct
from jaxformer.train.updates import GradientUpdate

MASKS, SALIENCY, TEACHER = "masks", "saliency", "teacher"  # entries of a state's `extra`
OWN = (MASKS, SALIENCY, TEACHER)
NORMS = ("masked", "legacy")


@dataclasses.dataclass(frozen=True)
class TaughtTask(ClassifyTask):
    """Cross-entropy and, while training, coefficient x L_full of a teacher in extra["teacher"].

    L_full is KL(teacher || student) at a temperature, the mean over rows *and classes*, without its
    square. Where extra has "masks", the parameters are those of a model that is being pruned, and
    there is no teaching before the first round. `norm` "masked" averages over channels that are
    left, as the dense model will; "legacy", as the authors' code does, over all.
    """

    teacher: Any = None
    coefficient: float = 0.0
    temperature: float = 3.0
    structures: Structures = ()
    norm: str = "masked"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in NORMS:
            raise ConfigError(f"prune.norm={self.norm!r}: must be one of {', '.join(NORMS)}")

    def logits(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> tuple[jax.Array, Extra]:
        model: Any = self.model
        if MASKS in extra:
            params = masked(self.structures, params, extra[MASKS])
            if self.norm == "masked":
                model = Intercepted(model, (LiveNorms(extra[MASKS]["embedding"]),))
        rest = {name: value for name, value in extra.items() if name not in OWN}
        image = jnp.asarray(batch["image"])
        logits, rest = linen.apply(model, params, rest, image, key=key, train=train)
        return logits, {**extra, **rest}

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> LossOutput:
        logits_BxC, new = self.logits(params, extra, batch, key=key, train=train)
        label, weight = jnp.asarray(batch["label"]), jnp.asarray(batch.get("weight", 1.0))
        objective = Mean.of(cross_entropy(logits_BxC, label, self.label_smoothing), weight)
        accuracy = Mean.of(is_correct(logits_BxC, label), weight)
        metrics = {"loss": objective, "accuracy": accuracy}
        loss = objective.value()
        if train and self.coefficient and TEACHER in extra:
            image = jnp.asarray(batch["image"])
            told_BxC = linen.apply(self.teacher, extra[TEACHER], {}, image, key=key, train=False)[0]
            divergence = Mean.of(divergence_of(told_BxC, logits_BxC, self.temperature), weight)
            begun = extra[SALIENCY]["round"] > 0 if SALIENCY in extra else True
            loss = loss + jnp.where(begun, self.coefficient * divergence.value(), 0.0)
            metrics["divergence"] = divergence
        return LossOutput(loss, objective.weight, metrics, new)

    def predict(self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array) -> jax.Array:
        """Logits (B, C)."""
        return self.logits(params, extra, batch, key=key, train=False)[0]


def divergence_of(teacher_BxC: jax.Array, student_BxC: jax.Array, temperature: float) -> jax.Array:
    """KL of softened probabilities, the mean over classes: (B,)."""
    p, q = (
        jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (teacher_BxC, student_BxC)
    )
    return (jnp.exp(p) * (p - q)).mean(-1)


@dataclasses.dataclass(frozen=True)
class PruningUpdate(GradientUpdate):
    """Gradient steps that score units, and every `interval` of them a round of pruning.

    Scores are of the weights before the step, with which the gradients were made. Rounds end when
    the estimated latency is at most `target` of the whole model's; training goes on.
    """

    structures: Structures = ()
    ranking: Ranking | None = None
    latency: Latency | None = None
    target: float = 0.5
    interval: int = 100

    def __post_init__(self) -> None:
        if not 0.0 < self.target < 1.0:
            raise ConfigError(f"prune.target={self.target}: must be in (0, 1)")
        if self.interval < 1:
            raise ConfigError(f"prune.interval={self.interval}: must be at least 1")

    def init(self, state: TrainState) -> TrainState:
        masks = whole(self.structures, state.params)
        zero = jnp.zeros((), jnp.int32)
        saliency = {"sums": jax.tree.map(jnp.zeros_like, masks), "seen": zero, "round": zero + 0}
        return super().init(state.replace(extra={**state.extra, MASKS: masks, SALIENCY: saliency}))

    def _gradient(
        self, params: Params, extra: Extra, batch: Batch, key: jax.Array
    ) -> tuple[LossOutput, Params]:
        output, grads = super()._gradient(params, extra, batch, key)
        sums = unit_sums(self.structures, params, grads)
        old = output.extra[SALIENCY]
        new = {}
        for structure in self.structures:
            score = jnp.square(sums[structure.name] / CONSTANTS[structure.kind])
            new[structure.name] = old["sums"][structure.name] + jnp.nan_to_num(
                score, nan=0.0, posinf=0.0, neginf=0.0
            )
        saliency = {**old, "sums": new, "seen": old["seen"] + 1}
        return output._replace(extra={**output.extra, SALIENCY: saliency}), grads

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        state, metrics = super().__call__(state, batch)
        left = self.share(state.extra[MASKS])
        due = (state.extra[SALIENCY]["seen"] >= self.interval) & (left > self.target)
        extra = jax.lax.cond(
            due, self.round, lambda params, extra: extra, state.params, state.extra
        )
        clean = self.cleaner(state.params, extra[MASKS])
        state = state.replace(
            params=clean(state.params), opt_state=clean(state.opt_state), extra=extra
        )
        left = self.share(extra[MASKS])
        return state, {
            **metrics,
            "latency": Mean.of(left),
            "rounds": Mean.of(extra[SALIENCY]["round"]),
        }

    def round(self, params: Params, extra: Extra) -> Extra:
        """One round of pruning."""
        assert self.ranking is not None
        masks, saliency = extra[MASKS], extra[SALIENCY]
        mean = jax.tree.map(lambda x: x / saliency["seen"], saliency["sums"])
        ranked = self.ranking(Standing(params, masks, mean, saliency["round"]))
        masks = {name: mask * ranked[name] for name, mask in masks.items()}
        zeros = jax.tree.map(jnp.zeros_like, saliency["sums"])
        counters = {"seen": jnp.zeros_like(saliency["seen"]), "round": saliency["round"] + 1}
        return {**extra, MASKS: masks, SALIENCY: {"sums": zeros, **counters}}

    def share(self, masks: Masks) -> jax.Array:
        """The estimated latency, as a share of the whole model's."""
        assert self.latency is not None
        full = jax.tree.map(jnp.ones_like, dict(masks))
        now, before = (self.latency(widths_left(m)).sum() for m in (masks, full))
        return now / before

    def cleaner(self, params: Params, masks: Masks) -> Any:
        """Sets what belongs to removed units to 0, in parameters and in an optimiser's moments."""
        names = paths.leaves(params)

        def clean(tree: Any) -> Any:
            def one(name: str, leaf: Any) -> Any:
                parts = name.split("/")
                ends = ("/".join(parts[i:]) for i in range(len(parts)))
                own = next((end for end in ends if end in names), None)
                if own is None or leaf.shape != names[own].shape:
                    return leaf
                return paths.leaves(masked(self.structures, paths.nest({own: leaf}), masks))[own]

            return paths.map_named(one, tree)

        return clean
