"""The recipe of a config: a ViT, pruned while it trains on, then made dense and fine-tuned.

What pruning leaves is known when it has run. So there are two commands on one folder: the first
trains and prunes; the second, with `dense_from` naming that folder, reads the widths found there
and goes on with the third phase.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxformer.analyze.latency import Analytic, Latency, Table
from jaxformer.compress.prune import count_units, densify, vit_structures
from jaxformer.data.base import Epoch, IndexedData
from jaxformer.data.sources.image import digits
from jaxformer.data.sources.imagenet import imagenet
from jaxformer.data.transforms import RandomCrop
from jaxformer.errors import ConfigError
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.models.encoder import Classifier
from jaxformer.models.transformer import Transformer, require
from jaxformer.models.vit import vit
from jaxformer.papers.nvit.model import (
    KINDS,
    Chance,
    Hessian,
    Magnitude,
    ModelWidths,
    Plan,
    Ranking,
    check_groups,
    check_latency,
    narrowed,
    revit,
    widths_of,
)
from jaxformer.papers.nvit.phases import MASKS, SALIENCY, TEACHER, PruningUpdate, TaughtTask
from jaxformer.recipe import Data, FiniteData, InitFrom, Phase, Recipe, TrainState
from jaxformer.setups.imported import adopt
from jaxformer.setups.vision import classifier
from jaxformer.tasks.staged import StagedTask
from jaxformer.train.optim import build as build_optimizer
from jaxformer.train.states import restore
from jaxformer.train.updates import GradientUpdate

RANKINGS = ("hessian", "magnitude", "random")


def build(config: ConfigDict) -> Recipe:
    """Train and prune; with `dense_from` also fine-tune; with `widths` alone train such a model.

    `init_from` names a run with a trained model, which may be imported; its `huggingface` then
    describes the model, and is taken over into this config.
    """
    adopt(config)
    whole = trunk(config)
    if config.rule:
        require("config.rule", config.rule, ("revit",))
        with config.unlocked():
            config.widths = tuple(revit(config.model.width))
    if config.widths and not config.dense_from:
        return from_scratch(config, narrowed(whole, ModelWidths.read(config.widths)))
    phases, wide = pruning(config, whole)
    stages = [wide]
    if config.dense_from:
        if not config.widths:
            with config.unlocked():
                config.widths = tuple(found_widths(config, phases, wide))
        widths = ModelWidths.read(config.widths)
        phase = fine_tuning(config, whole, wide, widths, phases[-1].data)
        stages.append(phase.update.task)
        phases.append(phase)
    task = StagedTask(tuple(stages))
    evaluator = MeanEvaluator(task, data(config)[1], "test", config.evaluate.every or "phase_end")
    source = InitFrom(config.init_from, fresh=config.fresh) if config.init_from else None
    return Recipe(task, phases, [evaluator], init_from=source, unit="images")


def from_scratch(config: ConfigDict, model: Classifier) -> Recipe:
    """A model of given widths, trained as any other: ReViT."""
    task = TaughtTask(model, config.model.label_smoothing)
    train, test = data(config)
    phase = Phase("train", config.steps, train, GradientUpdate.of(task, config))
    evaluator = MeanEvaluator(task, test, "test", config.evaluate.every or "phase_end")
    return Recipe(task, [phase], [evaluator], unit="images")


def pruning(config: ConfigDict, model: Classifier) -> tuple[list[Phase], TaughtTask]:
    """The first two phases, and the task of both."""
    prune, train = config.prune, data(config)[0]
    widths = widths_of(model)
    structures = vit_structures(len(widths.blocks))
    task = TaughtTask(
        model,
        config.model.label_smoothing,
        teacher=model,
        coefficient=prune.coefficient,
        temperature=prune.temperature,
        structures=structures,
        norm=prune.norm,
    )
    plan = Plan(structures, tuple((k, prune.groups[k]) for k in KINDS), prune.groups_per_round)
    check_groups(plan, widths.counts())
    latency = latency_of(config)
    check_latency(latency, widths)
    base = GradientUpdate.of(task, config)
    updates = {
        "ranking": ranking_of(config, plan, latency),
        "latency": latency,
        "target": prune.target,
        "interval": prune.interval,
        "structures": structures,
    }
    fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    fields["optimizer"] = optimizer(config, prune)
    fields["ema"] = None  # of weights that are being removed
    begin = GradientUpdate.of(TaughtTask(model, config.model.label_smoothing), config)
    phases = [
        Phase("train", config.steps, train, begin),
        Phase("prune", prune.steps, train, PruningUpdate(**fields, **updates), teach),
    ]
    return phases, task


def teach(state: TrainState) -> TrainState:
    """The parameters as they are become those of the teacher."""
    teacher = jax.tree.map(jnp.copy, state.params)  # a copy: both are donated
    return state.replace(extra={**state.extra, TEACHER: teacher})


def fine_tuning(
    config: ConfigDict, whole: Classifier, wide: TaughtTask, widths: ModelWidths, train: Data | None
) -> Phase:
    """The third phase: the dense model, taught by the whole one."""
    tune = config.fine_tune
    task = TaughtTask(
        narrowed(whole, widths),
        config.model.label_smoothing,
        teacher=whole,
        coefficient=tune.coefficient,
        temperature=tune.temperature,
    )
    update = dataclasses.replace(
        GradientUpdate.of(task, config), optimizer=optimizer(config, tune), ema=tune.ema or None
    )
    return Phase("fine_tune", tune.steps, train, update, dense(wide, widths))


def dense(wide: TaughtTask, widths: ModelWidths) -> Callable[[TrainState], TrainState]:
    """Cut what is removed out of the parameters."""

    def enter(state: TrainState) -> TrainState:
        masks = state.extra[MASKS]
        params = densify(wide.structures, state.params, masks, widths.counts())
        rest = {k: v for k, v in state.extra.items() if k not in (MASKS, SALIENCY)}
        return state.replace(params=params, extra=rest)

    return enter


def found_widths(config: ConfigDict, phases: list[Phase], task: TaughtTask) -> ModelWidths:
    """What the run `dense_from` has left.

    Raises:
        ConfigError: it has not been pruned, or not to its target.
    """
    recipe = Recipe(StagedTask((task,)), phases)
    state = restore(recipe, config.dense_from)
    if MASKS not in state.extra:
        raise ConfigError(f"dense_from={config.dense_from!r}: that run has not been pruned yet")
    update = phases[-1].update
    assert isinstance(update, PruningUpdate)
    left = float(update.share(state.extra[MASKS]))
    if left > update.target:
        raise ConfigError(
            f"dense_from={config.dense_from!r}: its latency is {left:.3f} of the whole model's, "
            f"more than prune.target={update.target}; give prune.steps more, and continue it"
        )
    return ModelWidths.of(count_units(jax.device_get(state.extra[MASKS])))


def ranking_of(config: ConfigDict, plan: Plan, latency: Latency) -> Ranking:
    """The ranking of a config."""
    prune = config.prune
    require("prune.ranking", prune.ranking, RANKINGS)
    if prune.ranking == "hessian":
        return Hessian(plan, latency, prune.eta)
    return Magnitude(plan) if prune.ranking == "magnitude" else Chance(plan, config.seed)


def latency_of(config: ConfigDict) -> Latency:
    """A measured table, or the formula."""
    if config.prune.latency_table:
        return Table.load(config.prune.latency_table)
    patch = config.model.patch
    return Analytic((config.data.size // patch) ** 2 + 1)


def optimizer(config: ConfigDict, phase: ConfigDict) -> Any:
    """That of the config with the name, learning rate and schedule of a phase."""
    optim = config.optim.copy_and_resolve_references()
    optim.name, optim.warmup_steps = phase.optimizer, 0
    optim.learning_rate, optim.schedule = phase.learning_rate, phase.schedule
    return build_optimizer(optim, phase.steps)


def trunk(config: ConfigDict) -> Classifier:
    """The ViT that is pruned: of the config's sizes, or the one that was imported."""
    model, fields = config.model, config.data
    if config.huggingface:
        return classifier(config)
    names = ("width", "depth", "heads", "hidden", "dropout", "drop_path", "remat", "dtype")
    trunk = Transformer(**{name: model[name] for name in names})
    return vit(trunk, image_size=fields.size, patch=model.patch, classes=fields.classes)


def data(config: ConfigDict) -> tuple[Data, FiniteData]:
    """Images to train and to test on: the digits, or folders like ImageNet's."""
    fields, rows = config.data, config.batch_size
    limit = config.evaluate.batches or None
    require("data.task", fields.task, ("digits", "folder"))
    if fields.task == "folder":
        return imagenet(fields.root, fields.size, rows, config.seed, limit)
    if (fields.size, fields.classes) != (8, 10):
        raise ConfigError(
            f"data.size={fields.size}, classes={fields.classes}: digits have 8 and 10; "
            "data.task=folder has images of any size"
        )
    shift = [RandomCrop(8, padding=1)]
    train = IndexedData(digits("train"), rows, config.seed, shift)
    return train, Epoch(digits("test"), rows, limit=limit)
