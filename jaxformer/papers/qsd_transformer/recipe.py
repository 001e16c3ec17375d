"""The recipe of a config: a network of floats, then the spiking network that it teaches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxformer.compress.lsq import clamped_steps
from jaxformer.data.base import Data, Deferred, Epoch, IndexedData
from jaxformer.data.sources.image import divided_digits
from jaxformer.data.sources.imagenet import imagenet
from jaxformer.data.transforms import Enlarge
from jaxformer.errors import ConfigError
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.nn.make import Make
from jaxformer.nn.spiking import IntegerLIF
from jaxformer.papers.qsd_transformer.model import (
    SpikeNetwork,
    Stage,
    floating,
    mismatch,
    quantized,
)
from jaxformer.recipe import EvalContext, Phase, Recipe, Task, TrainState
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.tasks.distill import DistillTask, as_teacher
from jaxformer.tasks.staged import StagedTask
from jaxformer.train.optim import Group
from jaxformer.train.optim import build as build_optimizer
from jaxformer.train.updates import GradientUpdate

# Steps of weights, which lie beside kernels, and all but these: gains of norms are "scale" too.
STEPS = r"(?<!norm)(?<!norm_\d)/scale$"
NO_STEPS = r"(?<!/scale)$|norm(_\d)?/scale$"


def build(config: ConfigDict) -> Recipe:
    """Train the network of floats; then, from new weights, the spiking one beside it."""
    model = network(config)
    smoothing = config.model.label_smoothing
    teacher = ClassifyTask(floating(model), smoothing)
    student = ClassifyTask(quantized(model, config.model.bits), smoothing)
    task = DistillTask(student, teacher, (("mismatch", config.model.fgd, mismatch),), label=1.0)
    train, unseen = images(config)

    groups = (Group(STEPS, config.step_rate), Group(NO_STEPS))

    def update(task: Task, steps: int) -> GradientUpdate:
        optimizer = build_optimizer(config.optim, steps, groups)
        return dataclasses.replace(GradientUpdate.of(task, config), optimizer=optimizer)

    first = config.teacher_steps
    phases = [
        Phase("teacher", first, train, update(teacher, first)),
        Phase("spikes", config.steps, train, update(task, config.steps), begin(student, train)),
    ]
    whole = StagedTask((teacher, task))
    every = config.evaluate.every or "phase_end"
    evaluators = [MeanEvaluator(whole, unseen, "test", every), ClampedSteps(every)]
    return Recipe(whole, phases, evaluators, unit="images")


def begin(student: Task, data: Data) -> Callable[[TrainState], TrainState]:
    """The trained network becomes the teacher; the student's weights, and steps, are new."""

    def enter(state: TrainState) -> TrainState:
        rows = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), data.spec())
        key = jax.random.fold_in(state.key, 2**31)  # no step is so late
        params, extra = student.init(key, rows)
        return state.replace(
            params=params, extra={**extra, **as_teacher(state.params, state.extra)}
        )

    return enter


@dataclasses.dataclass(frozen=True)
class ClampedSteps:
    """How many steps of weights have shrunk to the least that there is: they should not."""

    every: int | Literal["phase_end", "end"] = "phase_end"
    name: str = "steps"

    def __call__(self, state: TrainState, context: EvalContext) -> Mapping[str, float]:
        count = int(clamped_steps(state.params))
        if count:
            context.alive()
            print(f"warning: {count} steps of weights are at their least; lower the learning rate")
        return {"clamped": float(count)}


def network(config: ConfigDict) -> SpikeNetwork:
    """The spiking network of a config, with weights of floats.

    Raises:
        ConfigError: stages differ in number, or a field has a value that is not allowed.
    """
    model = config.model
    lists = [model[name] for name in ("widths", "kinds", "depths", "sizes", "strides")]
    if len({len(x) for x in lists}) != 1:
        raise ConfigError(
            f"model.widths={model.widths}: one for each stage, as model.kinds={model.kinds}, "
            "model.depths, model.sizes and model.strides"
        )
    stages = tuple(Stage(*fields) for fields in zip(*lists, strict=True))
    for stage in stages:
        if stage.kind == "attention" and stage.width % model.heads:
            raise ConfigError(f"model.heads={model.heads}: must divide the width {stage.width}")
    neuron = Make(IntegerLIF, levels=model.levels, leak=model.leak or None, steps=model.steps)
    return SpikeNetwork(
        stages,
        model.heads,
        config.data.classes,
        neuron,
        model.steps,
        layer_scale=model.layer_scale,
        dtype=jnp.dtype(model.dtype),
    )


def images(config: ConfigDict) -> tuple[Data, Any]:
    """Images to train and to test on: scikit-learn's digits, enlarged, or ImageNet's layout."""
    where, rows = config.data, config.batch_size
    limit = config.evaluate.batches or None
    if where.root:
        return imagenet(where.root, where.size, rows, config.seed, limit)
    if where.size % 8 or where.classes != 10:
        raise ConfigError(
            f"data.size={where.size}: the digits have 10 classes and sides of 8, enlarged to a "
            "multiple; or name a folder in data.root"
        )
    enlarge = (Enlarge(where.size),)
    row = {"image": ((where.size, where.size, 1), np.float32), "label": ((), np.int32)}
    weighed = {"weight": ((), np.float32), **row}

    def make_train() -> IndexedData:
        few, _ = divided_digits(where.images, config.seed)
        return IndexedData(few, rows, config.seed, enlarge)

    def make_test() -> Epoch:
        _, rest = divided_digits(where.images, config.seed)
        return Epoch(rest, rows, transforms=enlarge, limit=limit)

    return Deferred(make_train, rows, row), Deferred(make_test, rows, weighed)
