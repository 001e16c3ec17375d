"""Mesa-optimisation: linear attention that learns to descend, checkably (2405.16845)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ml_collections import ConfigDict

from jaxformer.analyze.gradient_flow import FlowUpdate, adaptive
from jaxformer.data.base import DeviceData
from jaxformer.data.sources import rotations
from jaxformer.data.wrappers import Repeated
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.models.transformer import require
from jaxformer.papers.mesa_optimization.claims import CLAIMS as CLAIMS
from jaxformer.papers.mesa_optimization.model import (
    Autoregression,
    Population,
    without_off_diagonals,
)
from jaxformer.recipe import Batch, Metrics, Params, Phase, Recipe, TrainState, Update
from jaxformer.train.updates import GradientUpdate


@dataclasses.dataclass(frozen=True)
class Projected:
    """An update whose parameters are then projected: descent in a subspace."""

    update: Update
    project: Callable[[Params], Params]

    def init(self, state: TrainState) -> TrainState:
        return self.update.init(state)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        state, metrics = self.update(state, batch)
        return state.replace(params=self.project(state.params)), metrics


def build(config: ConfigDict) -> Recipe:
    """The recipe of `config.experiment`: drawn sequences, or the flow of the exact loss."""
    experiments = {"sequences": sequences, "flow": flow}
    require("experiment", config.experiment, experiments)
    return experiments[config.experiment](config)


def sequences(config: ConfigDict) -> Recipe:
    """Full-batch gradient descent on sequences drawn once."""
    data, task = config.data, Autoregression(config.model.a, config.model.b)
    law = rotations.Rotations(data.d, data.T, data.start, data.scale)
    train = Repeated(DeviceData(law, config.batch_size, config.seed))
    update: Update = GradientUpdate.of(task, config)
    if config.model.diagonal:
        update = Projected(update, without_off_diagonals)
    fresh = DeviceData(law, config.batch_size, config.seed + 2**31)
    every, batches = config.evaluate.every or "end", config.evaluate.batches or 1
    test = MeanEvaluator(task, fresh, "test", every, batches)
    return Recipe(task, [Phase("train", config.steps, train, update)], [test], unit="sequences")


def flow(config: ConfigDict) -> Recipe:
    """Gradient flow of the population loss, all entries free: no batches."""
    data, settings = config.data, config.flow
    every = rotations.quadrature(data.d, data.T, data.start, data.scale)
    task = Population(Autoregression(config.model.a, config.model.b), every)
    integrator = adaptive(settings.rtol, settings.atol)
    update = FlowUpdate(task, settings.time / max(config.steps, 1), integrator)
    return Recipe(task, [Phase("flow", config.steps, update=update)], unit="flows")
