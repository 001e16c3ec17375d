"""Trained transformers learn linear models in context: theory (JMLR 2024, arXiv 2306.09927)."""

from __future__ import annotations

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxformer.analyze.gradient_flow import FlowUpdate, adaptive
from jaxformer.data.base import DeviceData
from jaxformer.data.sources import regression
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.models.transformer import Transformer, require
from jaxformer.papers.linear_icl.claims import CLAIMS as CLAIMS
from jaxformer.papers.linear_icl.measure import AgainstLimit
from jaxformer.papers.linear_icl.model import InContextRegression, PopulationRegression
from jaxformer.papers.linear_icl.transformer import PrefixRegression, in_context_transformer
from jaxformer.recipe import Phase, Recipe, Task
from jaxformer.train.updates import GradientUpdate


def build(config: ConfigDict) -> Recipe:
    """The recipe of `config.experiment`: prompts, flow or transformer."""
    experiments = {"prompts": prompts, "flow": flow, "transformer": transformer}
    require("experiment", config.experiment, experiments)
    return experiments[config.experiment](config)


def prompts(config: ConfigDict) -> Recipe:
    """The linear layer, trained on fresh prompts."""
    data, sigma = config.data, config.model.sigma
    task = InContextRegression(np.diag(np.asarray(data.diagonal, np.float32)), data.N, sigma)
    exact = PopulationRegression(covariances(data, config.seed), data.N, sigma)
    fresh = held_out(config, task)
    return on_prompts(config, task, [fresh, AgainstLimit(exact, fresh.every)])


def flow(config: ConfigDict) -> Recipe:
    """Gradient flow of the population loss of the linear layer: no batches."""
    data, settings = config.data, config.flow
    task = PopulationRegression(covariances(data, config.seed), data.N, config.model.sigma)
    integrator = adaptive(settings.rtol, settings.atol)
    update = FlowUpdate(task, settings.time / max(config.steps, 1), integrator)
    evaluators = [AgainstLimit(task, config.evaluate.every or "end")]
    return Recipe(task, [Phase("flow", config.steps, update=update)], evaluators, unit="flows")


def transformer(config: ConfigDict) -> Recipe:
    """A GPT-2 decoder that answers after every prefix."""
    model = config.model
    names = ("width", "depth", "heads", "dropout", "scan", "remat", "dtype")
    trunk = Transformer(mlp="gelu_tanh", **{name: model[name] for name in names})
    task = PrefixRegression(in_context_transformer(trunk, model.positions))
    return on_prompts(config, task, [held_out(config, task)])


def on_prompts(config: ConfigDict, task: Task, evaluators: list) -> Recipe:
    data = DeviceData(law(config.data), config.batch_size, config.seed)
    update = GradientUpdate.of(task, config)
    return Recipe(task, [Phase("train", config.steps, data, update)], evaluators, unit="prompts")


def held_out(config: ConfigDict, task: Task) -> MeanEvaluator:
    fresh = DeviceData(law(config.data), config.batch_size, config.seed + 2**31)
    every, batches = config.evaluate.every or "end", config.evaluate.batches or 1
    return MeanEvaluator(task, fresh, "validation", every, batches)


def law(data: ConfigDict) -> regression.Prompts:
    """The law of the prompts in a config's `data`."""
    require("data.covariance", data.covariance, ("fixed", "exponential"))
    diagonal = np.asarray(data.diagonal, np.float32)
    if data.covariance == "fixed":
        return regression.Prompts(data.N, regression.fixed_covariance(np.diag(diagonal)))
    varying = regression.random_diagonal_covariance(
        len(diagonal), lambda key, shape: diagonal * jax.random.exponential(key, shape)
    )
    return regression.Prompts(data.N, varying)


def covariances(data: ConfigDict, seed: int) -> np.ndarray:
    """The covariances (T, d, d) that stand for that law: the one there is, or draws."""
    covariance = law(data).covariance
    count = 1 if data.covariance == "fixed" else data.covariances
    with jax.ensure_compile_time_eval():  # also where a member of a `Sweep` is built
        roots = jax.vmap(covariance)(jax.random.split(jax.random.key(seed), count))
        return np.asarray(roots @ roots.mT)
