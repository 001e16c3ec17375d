"""The recipe of a config: a multi-head ViT, its conversion to grouped heads, and up-training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxformer.data.base import Data
from jaxformer.errors import ConfigError
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.nn.surgery import pool_key_heads
from jaxformer.papers.key_driven_gqa.model import core, grouped
from jaxformer.recipe import InitFrom, Phase, Recipe, Task, TrainState
from jaxformer.setups import vision
from jaxformer.setups.imported import adopt
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.tasks.staged import StagedTask
from jaxformer.train.optim import build as build_optimizer
from jaxformer.train.states import on_device
from jaxformer.train.updates import GradientUpdate


def build(config: ConfigDict) -> Recipe:
    """Multi-head training, unless it is of another run, then conversion and up-training.

    `init_from` names that run. If it was imported, its `huggingface` describes the model, and is
    taken over into this config.
    """
    adopt(config)
    before = ClassifyTask(vision.classifier(config))
    model = config.model
    epoch = model.epoch or None
    parts = core(model.scheme, model.window, epoch, model.by_batch)
    after = ClassifyTask(grouped(before.model, model.kv_heads, parts))
    train, _ = vision.images(config)
    # Key-driven groups follow their batch: it has as many images in evaluation as in training.
    further, test = vision.images(config, config.up_train.batch_size)

    def update(task: Task, steps: int, rate_scale: float = 1.0) -> GradientUpdate:
        optim = config.optim.copy_and_resolve_references()
        optim.learning_rate *= rate_scale
        whole = GradientUpdate.of(task, config)
        return dataclasses.replace(whole, optimizer=build_optimizer(optim, steps))

    if config.init_from and config.multi_head_steps:
        raise ConfigError(
            f"config.multi_head_steps={config.multi_head_steps}: the run init_from="
            f"{config.init_from!r} has been trained; give 0"
        )
    phases = [
        Phase(
            "multi_head", config.multi_head_steps, train, update(before, config.multi_head_steps)
        ),
        Phase(
            "up_train",
            config.steps,
            further,
            update(after, config.steps, config.up_train.rate_scale),
            convert(after, further, model.kv_heads),
        ),
    ]
    task = StagedTask((before, after))
    evaluator = MeanEvaluator(task, test, "test", config.evaluate.every or "phase_end")
    source = InitFrom(config.init_from, fresh=config.fresh) if config.init_from else None
    return Recipe(task, phases, [evaluator], init_from=source, unit="images")


def convert(task: Task, data: Data, kv_heads: int) -> Callable[[TrainState], TrainState]:
    """Pool the key heads of a multi-head state, and start what `task` keeps beside parameters."""

    def enter(state: TrainState) -> TrainState:
        rows = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), data.spec())
        key = jax.random.fold_in(state.key, 2**31)  # no step is so late
        _, extra = task.init(key, on_device(data, rows))
        return state.replace(params=pool_key_heads(state.params, kv_heads), extra=extra)

    return enter
