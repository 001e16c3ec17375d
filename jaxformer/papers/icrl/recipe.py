"""The recipe of a config: trajectories of controllers on bandits, drawn anew at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxformer.data.base import DeviceData
from jaxformer.decision import controllers
from jaxformer.decision.controllers import Controller
from jaxformer.decision.environments import BernoulliBandit, LinearBandit
from jaxformer.decision.rollouts import Trajectories
from jaxformer.errors import ConfigError
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.evaluation.regret import OnlineRegret
from jaxformer.models.transformer import require
from jaxformer.papers.icrl.model import (
    Imitation,
    bandit_transformer,
    relu_trunk,
    softmax_trunk,
)
from jaxformer.recipe import Phase, Recipe
from jaxformer.train.updates import GradientUpdate

UNSEEN = 2**31  # added to a seed: problems that no training draws


def build(config: ConfigDict) -> Recipe:
    """Imitation of what `config.data.labels` names, on what `config.data.controllers` did."""
    data = config.data
    bandit = bandit_of(config.environment)
    named = tuple(controller(name, bandit) for name in data.controllers)
    rows = Trajectories(bandit, named, data.steps, tuple(data.shares))
    task = Imitation(network(config), data.labels)
    train = DeviceData(rows, config.batch_size, config.seed)
    fresh = DeviceData(rows, config.batch_size, config.seed + UNSEEN)
    every, batches = config.evaluate.every or "end", config.evaluate.batches or 4
    evaluators = [
        MeanEvaluator(task, fresh, "validation", every, batches),
        OnlineRegret(bandit, task.policy, data.problems, data.steps, config.seed, every=every),
    ]
    update = GradientUpdate.of(task, config)
    return Recipe(task, [Phase("train", config.steps, train, update)], evaluators, unit="actions")


def network(config: ConfigDict) -> Any:
    """The decoder of `config.model`."""
    model = config.model
    require("model.backbone", model.backbone, ("relu", "softmax"))
    options = {name: model[name] for name in ("scan", "remat", "dtype")}
    if model.backbone == "relu":
        trunk, mixer = relu_trunk(model.width, model.depth, **options)
    else:
        trunk, mixer = softmax_trunk(model.width, model.depth, model.heads, **options)
    if 2 * config.data.steps > model.positions:
        raise ConfigError(
            f"model.positions={model.positions}: data.steps={config.data.steps} needs at least "
            f"{2 * config.data.steps}, two tokens to a step"
        )
    return bandit_transformer(trunk, mixer, model.positions)


def bandit_of(environment: ConfigDict) -> LinearBandit | BernoulliBandit:
    """The law of problems of `config.environment`.

    Raises:
        ConfigError: an unknown kind, or features of arms without any.
    """
    require("environment.kind", environment.kind, ("linear", "bernoulli"))
    if environment.kind == "linear":
        names = ("actions", "dimension", "std", "prior")
        return LinearBandit(**{name: environment[name] for name in names})
    if environment.dimension != environment.actions:
        raise ConfigError(
            f"environment.dimension={environment.dimension}: arms of a Bernoulli bandit are unit "
            f"vectors; give environment.actions={environment.actions}"
        )
    return BernoulliBandit(environment.actions)


LINEAR: Mapping[str, Callable[[Any], Controller]] = {
    "linucb": lambda bandit: controllers.LinUCB(),
    "thompson": lambda bandit: controllers.LinearThompson(bandit.std),
    "empirical_mean": lambda bandit: controllers.EmpiricalMean(),
    "uniform": lambda bandit: controllers.UNIFORM,
}
BERNOULLI: Mapping[str, Callable[[Any], Controller]] = {
    **LINEAR,
    "linucb": lambda bandit: controllers.BernoulliUCB(),
    "thompson": lambda bandit: controllers.BernoulliThompson(),
}


def controller(name: str, bandit: Any) -> Controller:
    """The controller of that name for a bandit.

    Raises:
        ConfigError: there is none.
    """
    table = LINEAR if isinstance(bandit, LinearBandit) else BERNOULLI
    require("data.controllers", name, table)
    return table[name](bandit)
