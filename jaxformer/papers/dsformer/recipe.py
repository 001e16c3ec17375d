"""The recipe of a config: a dense encoder, its factorisation, and training of the factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxformer import paths
from jaxformer.compress.factored import STATE
from jaxformer.compress.matrix import as_matrix
from jaxformer.errors import ConfigError
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.models.transformer import require
from jaxformer.papers.dsformer.model import FactorisedTask, Method, table_of
from jaxformer.recipe import Batch, Extra, InitFrom, Mean, Metrics, Phase, Recipe, Task, TrainState
from jaxformer.setups.imported import adopt
from jaxformer.setups.texts import text_data, text_model, text_task
from jaxformer.tasks.answers import AnswerTask
from jaxformer.tasks.distill import DistillTask, Softened, as_teacher, squared
from jaxformer.tasks.regress import RegressTask
from jaxformer.train.optim import build as build_optimizer
from jaxformer.train.updates import ForwardUpdate, GradientUpdate

FISHER = "fisher"  # the entry of `extra` with how much rows of kernels matter
WEIGHTINGS = ("none", "fisher")


def build(config: ConfigDict) -> Recipe:
    """Dense training, unless it is of another run; scores, if rows are weighted; factors."""
    adopt(config)
    fields = config.factor
    require("factor.weighting", fields.weighting, WEIGHTINGS)
    model = text_model(config)
    method = method_of(config)
    dense = text_task(config, model)
    factorised = text_task(config, method.model(model))
    task = FactorisedTask(dense, factorised)
    train, test, whole = text_data(config)
    if config.init_from and config.dense_steps:
        raise ConfigError(
            f"config.dense_steps={config.dense_steps}: the run init_from={config.init_from!r} has "
            "been trained; give 0"
        )

    def update(task: Task, steps: int, rate_scale: float = 1.0) -> GradientUpdate:
        optim = config.optim.copy_and_resolve_references()
        optim.learning_rate *= rate_scale
        whole = GradientUpdate.of(task, config)
        return dataclasses.replace(whole, optimizer=build_optimizer(optim, steps))

    weighted = fields.weighting == "fisher"
    phases = [Phase("dense", config.dense_steps, train, update(dense, config.dense_steps))]
    if weighted:
        collect = ForwardUpdate(fisher(dense, method))
        phases.append(Phase("score", fields.score_steps, train, collect, zeros(method)))
    last = update(taught(config, factorised, dense), config.steps, config.rate_scale)
    start = enter(method, weighted, teacher=bool(fields.distill))
    phases.append(Phase("factorise", config.steps, train, last, start))
    evaluator = MeanEvaluator(task, test, "test", config.evaluate.every or "phase_end", whole=whole)
    source = InitFrom(config.init_from, fresh=config.fresh) if config.init_from else None
    return Recipe(task, phases, [evaluator], init_from=source, unit="pairs")


def method_of(config: ConfigDict) -> Method:
    """As the section `factor` says."""
    f = config.factor
    table = table_of(f.columns, f.atoms, f.nonzeros, f.up_atoms, f.up_nonzeros, f.group or None)
    return Method(f.method, table, f.every, f.rounds, f.ratio)


def taught(config: ConfigDict, factorised: AnswerTask, dense: AnswerTask) -> Task:
    """What the factors are trained on: the labels, and if asked what the dense model says.

    Raises:
        ConfigError: a weight that is no share.
    """
    weight = config.factor.distill
    if not 0 <= weight <= 1:
        raise ConfigError(f"factor.distill={weight}: must be from 0 to 1")
    if not weight:
        return factorised
    scores = isinstance(dense, RegressTask)
    term = squared if scores else Softened(config.factor.temperature)
    return DistillTask(factorised, dense, (("distill", weight, term),), label=1 - weight)


def enter(
    method: Method, weighted: bool, *, teacher: bool = False
) -> Callable[[TrainState], TrainState]:
    """The factorisation of a trained state, beside which it may stay as the `teacher`.

    Pure, of known shapes.
    """

    def factorise(state: TrainState) -> TrainState:
        key = jax.random.fold_in(state.key, 2**31)  # no step is so late
        weights = state.extra[FISHER] if weighted else None
        weights = None if weights is None else {k: v for k, v in _flat(weights).items()}
        params, kept = method.enter(state.params, key, weights)
        extra = {name: tree for name, tree in state.extra.items() if name not in (FISHER, STATE)}
        told = as_teacher(state.params, extra) if teacher else {}
        extra = {**extra, **told, **({STATE: kept} if kept else {})}
        return state.replace(params=params, extra=extra)

    return factorise


def _flat(tree: Any) -> dict[str, jax.Array]:
    """{path of a layer: the weights of its rows}."""
    return {name.removesuffix("/rows"): x for name, x in paths.leaves(tree).items()}


def zeros(method: Method) -> Callable[[TrainState], TrainState]:
    """A sum for every row of every layer that is factorised."""

    def start(state: TrainState) -> TrainState:
        layers = method.table.chosen(state.params)
        sums = {f"{path}/rows": jnp.zeros(w.shape[0]) for path, (_, w) in layers.items()}
        return state.replace(extra={**state.extra, FISHER: paths.nest(sums)})

    return start


def fisher(
    task: Task, method: Method
) -> Callable[[TrainState, Batch, jax.Array], tuple[Extra, Metrics]]:
    """Sums of squared gradients by row: an estimate of Fisher information, from batches."""

    def collect(state: TrainState, batch: Batch, key: jax.Array) -> tuple[Extra, Metrics]:
        def loss(params: Any) -> jax.Array:
            return task.loss(params, state.extra, batch, key=key, train=False).loss

        value, gradient = jax.value_and_grad(loss)(state.params)
        named = paths.leaves(gradient)
        sums = dict(paths.leaves(state.extra[FISHER]))
        for name in sums:
            kernel = f"{name.removesuffix('/rows')}/kernel"
            sums[name] = sums[name] + jnp.square(as_matrix(kernel, named[kernel])).sum(1)
        return {**state.extra, FISHER: paths.nest(sums)}, {"loss": Mean.of(value)}

    return collect
