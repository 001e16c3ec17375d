"""The recipe of a config: a prior, a criterion, a set transformer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxformer.data.base import DeviceData
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.models.transformer import Transformer, require
from jaxformer.nn.bar_distribution import BarDistribution
from jaxformer.papers.pfn import classification, priors
from jaxformer.papers.pfn.criteria import Bars, Binary, Categorical, Criterion, Gaussian
from jaxformer.papers.pfn.model import set_transformer
from jaxformer.papers.pfn.task import PFNTask
from jaxformer.recipe import ConfigError, Phase, Recipe
from jaxformer.train.states import on_device
from jaxformer.train.updates import GradientUpdate

SHAPES = {"rbf": priors.rbf, "matern52": priors.matern52}
PRIORS: Mapping[str, Callable[..., priors.Prior]] = {
    "ridge": priors.Ridge,
    "gp": priors.GP,
    "hyper_gp": priors.HyperGP,
    "bnn": classification.BNN,
    "tabular_bnn": classification.tabular_bnn,
    "tabular_gp": classification.tabular_gp,
    "strokes": classification.Strokes,
}
CONTEXTS: Mapping[str, Callable[[int], priors.ContextLaw]] = {
    "weighted": priors.weighted,
    "uniform": priors.uniform,
    "fixed": priors.fixed,
}


def build(config: ConfigDict) -> Recipe:
    """Train on data sets drawn from `config.data.prior`; evaluate on others."""
    prior = prior_of(config.data)
    criterion = criterion_of(config.criterion, prior)
    task = PFNTask(model_of(config.model, criterion), criterion)
    rows = data_sets(config.data, prior)
    data = DeviceData(rows, config.batch_size, config.seed)
    if not config.optim.learning_rate:
        config = ConfigDict(config)
        config.optim.learning_rate = scaling_law_rate(task, data)
    update = GradientUpdate.of(task, config)
    fresh = DeviceData(rows, config.batch_size, config.seed + 2**31)
    every, batches = config.evaluate.every or "end", config.evaluate.batches or 1
    evaluator = MeanEvaluator(task, fresh, "fresh", every, batches)
    return Recipe(task, [Phase("train", config.steps, data, update)], [evaluator], unit="queries")


def prior_of(data: ConfigDict) -> priors.Prior:
    """The prior named by `data.prior` with `data.arguments`."""
    require("data.prior", data.prior, PRIORS)
    arguments: dict[str, Any] = dict(data.arguments)
    if "shape" in arguments:
        require("data.arguments.shape", arguments["shape"], SHAPES)
        arguments["shape"] = SHAPES[arguments["shape"]]
    try:
        return PRIORS[data.prior](**arguments)
    except TypeError as error:
        raise ConfigError(
            f"data.arguments: do not fit data.prior={data.prior!r}: {error}"
        ) from None


def data_sets(data: ConfigDict, prior: priors.Prior) -> priors.DataSets:
    """Data sets of `data.T` rows whose context is smaller."""
    require("data.context", data.context, CONTEXTS)
    most = data.limit if data.context == "fixed" else data.limit - 1
    if most >= data.T:
        raise ConfigError(
            f"data.limit: {data.limit} lets {most} of data.T={data.T} rows be context; "
            "leave at least one query"
        )
    return priors.DataSets(prior, data.T, CONTEXTS[data.context](data.limit))


def criterion_of(config: ConfigDict, prior: priors.Prior) -> Criterion:
    """The criterion named by `criterion.name`."""
    criteria: dict[str, Callable[[], Criterion]] = {
        "bars": lambda: Bars(config.bars, prior, config.samples),
        "bounded_bars": lambda: Bars(config.bars, prior, config.samples, law=BarDistribution),
        "gaussian": Gaussian,
        "binary": Binary,
        "categorical": lambda: Categorical(config.classes),
    }
    require("criterion.name", config.name, criteria)
    return criteria[config.name]()


def model_of(model: ConfigDict, criterion: Criterion) -> Any:
    """The set transformer of `model`; labels are embedded where the criterion is categorical."""
    names = ("width", "depth", "heads", "hidden", "dropout", "scan", "remat", "dtype")
    trunk = Transformer(**{n: model[n] for n in names}, order="post", position="none")
    return set_transformer(
        trunk,
        outputs=criterion.outputs,
        classes=criterion.outputs if isinstance(criterion, Categorical) else None,
        unit_inputs=model.unit_inputs,
        query_attends_self=model.query_attends_self,
    )


def scaling_law_rate(task: PFNTask, data: DeviceData) -> float:
    """The authors' learning rate where none is given: 0.003239 - 0.0001395 ln(parameters)."""
    spec = data.spec()
    shapes = jax.eval_shape(lambda b: task.init(jax.random.key(0), on_device(data, b))[0], spec)
    return 0.003239 - 0.0001395 * math.log(sum(leaf.size for leaf in jax.tree.leaves(shapes)))
