"""The recipe of a config: a multi-head ViT, its conversion to grouped heads, and up-training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxformer.data.base import Data, Deferred, Epoch, Example, IndexedData, Source
from jaxformer.data.sources.image import ImageFolder, digits
from jaxformer.data.transforms import Normalize
from jaxformer.errors import ConfigError
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.interop.huggingface import port_of
from jaxformer.models.transformer import Transformer
from jaxformer.models.vit import vit
from jaxformer.nn.surgery import pool_key_heads
from jaxformer.papers.key_driven_gqa.model import core, grouped
from jaxformer.recipe import FiniteData, InitFrom, Phase, Recipe, Task, TrainState
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.tasks.staged import StagedTask
from jaxformer.train.checkpoint import Checkpoints, saved_steps
from jaxformer.train.optim import build as build_optimizer
from jaxformer.train.states import on_device
from jaxformer.train.updates import GradientUpdate


def build(config: ConfigDict) -> Recipe:
    """Multi-head training, unless it is of another run, then conversion and up-training.

    `init_from` names that run. If it was imported, its `huggingface` describes the model, and is
    taken over into this config.
    """
    if config.init_from and not config.huggingface:
        with config.unlocked():
            config.huggingface = ConfigDict(imported(config.init_from))
    before = ClassifyTask(multi_head(config))
    model = config.model
    epoch = model.epoch or None
    parts = core(model.scheme, model.window, epoch, model.by_batch)
    after = ClassifyTask(grouped(before.model, model.kv_heads, parts))
    train, test = data(config)

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
            train,
            update(after, config.steps, config.rate_scale),
            convert(after, train, model.kv_heads),
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


def imported(workdir: str) -> dict[str, Any]:
    """The `config.json` of an imported run; empty for others, or where there is none."""
    try:
        step = saved_steps(workdir)[-1]
    except ConfigError:
        return {}  # `fit` says so, unless it continues a run that began there
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.meta(step)["config"].get("huggingface", {})


def multi_head(config: ConfigDict) -> Any:
    """The ViT that is converted: of the config's sizes, or the one that was imported."""
    model = config.model
    if config.huggingface:
        port = port_of(config.huggingface.to_dict(), "config.huggingface", model.dtype)
        if port.task is not ClassifyTask or "image" not in port.batch:
            raise ConfigError(
                f"config.huggingface.model_type={config.huggingface.get('model_type')!r}: must be "
                "a classifier of images, such as vit"
            )
        size = port.batch["image"].shape[1]
        if config.data.size != size:
            raise ConfigError(f"data.size={config.data.size}: the imported model reads {size}")
        model = port.model
        return model if model.head else dataclasses.replace(model, classes=config.data.classes)
    names = ("width", "depth", "heads", "hidden", "dropout", "scan", "remat", "dtype")
    trunk = Transformer(**{name: model[name] for name in names})
    size, patch = config.data.size, model.patch
    return vit(trunk, image_size=size, patch=patch, classes=config.data.classes)


def data(config: ConfigDict) -> tuple[Data, FiniteData]:
    """Images to train and to test on: the digits, enlarged, or folders of one's own."""
    fields, rows = config.data, config.batch_size
    limit = config.evaluate.batches or None
    if not fields.train:
        if fields.size % 8 or fields.classes != 10:
            raise ConfigError(
                f"data.size={fields.size}: the digits have 10 classes and sides of 8, enlarged to "
                "a multiple; or name folders in data.train and data.test"
            )
        enlarge = Enlarge(fields.size // 8)
        train = IndexedData(digits("train"), rows, config.seed, (enlarge,))
        return train, Epoch(digits("test"), rows, transforms=(enlarge,), limit=limit)
    shape = (fields.size, fields.size, 3)
    row = {"image": (shape, np.float32), "label": ((), np.int32)}
    normalize = (Normalize(0.5, 0.5),)

    def source(name: str) -> Source:
        if not fields[name]:
            raise ConfigError(f"data.{name}: names no folder of images")
        return ImageFolder(fields[name], fields.size)

    def make_train() -> IndexedData:
        return IndexedData(source("train"), rows, config.seed, normalize)

    def make_test() -> Epoch:
        return Epoch(source("test"), rows, transforms=normalize, limit=limit)

    weighed = {"weight": ((), np.float32), **row}
    return Deferred(make_train, rows, row), Deferred(make_test, rows, weighed)


@dataclasses.dataclass(frozen=True)
class Enlarge:
    """A transform that makes every pixel a square of `times` by `times`."""

    times: int

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        del rng
        image = example["image"].repeat(self.times, 0).repeat(self.times, 1)
        return {**example, "image": image}
