"""The recipe of a config: a trained classifier, then its attention binary, then its MLPs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxformer.compress.intercepted import Intercepted
from jaxformer.data.base import Data
from jaxformer.data.sources.imagenet import imagenet
from jaxformer.errors import ConfigError
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.models.swin import swin
from jaxformer.models.transformer import require
from jaxformer.papers.bivit.model import (
    SCALES,
    binary_attention,
    binary_mlp,
    rows_of,
)
from jaxformer.recipe import InitFrom, Phase, Recipe, Task, TrainState
from jaxformer.setups import vision
from jaxformer.setups.imported import adopt
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.tasks.distill import TEACHER, DistillTask, as_teacher
from jaxformer.tasks.staged import StagedTask
from jaxformer.train.optim import build as build_optimizer
from jaxformer.train.updates import GradientUpdate

SCHEDULES = ("cross_layer", "one_stage", "attention")
FRESH = {"attention": r"/mixer/.*/scale$", "mlp": r"/mlp/.*/scale$", "all": r"/scale$"}


def build(config: ConfigDict) -> Recipe:
    """Full precision, then one or two stages with more of the model binary, told by its teacher.

    `init_from` names a run that has been trained in full precision.
    """
    adopt(config)
    model = classifier(config)
    undropped = classifier(without_dropout(config))
    stages = binary_stages(config, undropped)
    if config.init_from and config.float_steps:
        raise ConfigError(
            f"config.float_steps={config.float_steps}: the run init_from={config.init_from!r} has "
            "been trained; give 0"
        )
    train, unseen = images(config)
    before = ClassifyTask(model)
    tasks = {name: DistillTask(ClassifyTask(stage), before) for name, stage in stages.items()}

    def update(task: Task, steps: int) -> GradientUpdate:
        """With a schedule of its own: rates start again in every stage.

        Binary stages have no weight decay, and no dropout.
        """
        optim = config.optim.copy_and_resolve_references()
        if task is not before:
            optim.update(learning_rate=config.rate_scale * optim.learning_rate, weight_decay=0.0)
        optimizer = build_optimizer(optim, steps)
        return dataclasses.replace(GradientUpdate.of(task, config), optimizer=optimizer)

    phases = [Phase("float", config.float_steps, train, update(before, config.float_steps))]
    for name, task in tasks.items():
        steps = config.steps if name == "attention" else config.mlp_steps
        steps = config.steps + config.mlp_steps if name == "all" else steps
        enter = binarise(task.student.model, train, FRESH[name])
        phases.append(Phase(name, steps, train, update(task, steps), enter))
    whole = StagedTask((before, *tasks.values()))
    evaluator = MeanEvaluator(whole, unseen, "test", config.evaluate.every or "phase_end")
    source = InitFrom(config.init_from, fresh=config.fresh) if config.init_from else None
    return Recipe(whole, phases, [evaluator], init_from=source, unit="images")


def binary_stages(config: ConfigDict, model: Any) -> dict[str, Intercepted]:
    """What trains in each stage of the schedule: {"attention": ..., "mlp": ...}, or {"all": ...}.

    Raises:
        ConfigError: a field has a value that is not allowed.
    """
    fields = config.model
    require("model.schedule", fields.schedule, SCHEDULES)
    require("model.scale", fields.scale, SCALES)
    learned = fields.scale == "learned"
    if fields.schedule == "cross_layer" and not learned:
        raise ConfigError(
            "model.scale='mean': leaves nothing in a checkpoint that tells the two stages of "
            "model.schedule='cross_layer' apart; give 'learned', 'one_stage' or 'attention'"
        )
    rows = rows_of(fields.attention, fields.beta)
    attention = binary_attention(model, rows, learned=learned)
    both = binary_mlp(attention, binary_inputs=fields.mlp_inputs == "binary", learned=learned)
    require("model.mlp_inputs", fields.mlp_inputs, ("float", "binary"))
    stages = {"cross_layer": {"attention": attention, "mlp": both}, "one_stage": {"all": both}}
    return stages.get(fields.schedule, {"attention": attention})


def binarise(model: Intercepted, data: Data, fresh: str) -> Callable[[TrainState], TrainState]:
    """Start the scales that are `fresh` from the trained weights; keep who they were as teacher.

    The teacher of a later stage is that of the first.
    """

    def enter(state: TrainState) -> TrainState:
        extra = dict(state.extra)
        teacher = {TEACHER: extra.pop(TEACHER)} if TEACHER in extra else None
        teacher = teacher or as_teacher(state.params, extra)
        image = jnp.zeros((1, *data.spec()["image"].shape[1:]))
        key = jax.random.fold_in(state.key, 2**31)  # no step is so late
        params, extra = model.complete(key, state.params, extra, image, fresh=fresh)
        return state.replace(params=params, extra={**extra, **teacher})

    return enter


def without_dropout(config: ConfigDict) -> ConfigDict:
    """The config of the same model without dropout."""
    config = config.copy_and_resolve_references()
    config.model.dropout = 0.0
    return config


def classifier(config: ConfigDict) -> Any:
    """The plain model of a config: a ViT, which a DeiT is too, or a Swin."""
    model = config.model
    require("model.kind", model.kind, ("vit", "swin"))
    if model.kind == "vit":
        return vision.classifier(config)
    return swin(
        image_size=config.data.size,
        patch=model.patch,
        width=model.width,
        depths=model.depths,
        heads=model.stage_heads,
        window=model.window,
        classes=config.data.classes,
        dropout=model.dropout,
        dtype=model.dtype,
    )


def images(config: ConfigDict) -> tuple[Data, Any]:
    """Images to train and to test on: ImageNet's layout with crops and flips, or the digits."""
    where = config.data
    if not where.root:
        return vision.images(config)
    limit = config.evaluate.batches or None
    return imagenet(where.root, where.size, config.batch_size, config.seed, limit)
