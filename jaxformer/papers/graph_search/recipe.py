"""The recipe of a config: graphs drawn as training goes, tests of every look-ahead alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from jaxformer.data.base import DeviceData
from jaxformer.errors import ConfigError
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.models.transformer import require
from jaxformer.papers.graph_search.graphs import Balanced, Graphs, Naive, Star
from jaxformer.papers.graph_search.model import SearchTask, searcher
from jaxformer.papers.graph_search.sequences import (
    DepthFirst,
    Search,
    SelectionInference,
    Tokens,
)
from jaxformer.recipe import Phase, Recipe
from jaxformer.train.updates import GradientUpdate

TASKS = ("search", "depth_first", "selection_inference")
GRAPHS = ("balanced", "naive", "star")


def build(config: ConfigDict) -> Recipe:
    """Train on fresh examples; test on others, of each look-ahead by itself."""
    data = config.data
    tokens = Tokens(data.length)
    require("data.task", data.task, TASKS)
    model = searcher(words=tokens.words, length=data.length, **config.model)
    task = SearchTask(model, data.tested)
    update = GradientUpdate.of(task, config)

    def drawn(rows: Any, part: int, size: int = config.batch_size) -> DeviceData:
        return DeviceData(rows, size, config.seed + part * 2**30)

    ahead = range(1, data.lookahead + 1) if data.curriculum else [data.lookahead]
    steps = [config.steps * (i + 1) // len(ahead) for i in range(len(ahead))]
    phases = [
        Phase(
            "train" if len(ahead) == 1 else f"lookahead_{most}",
            end - start,
            drawn(rows_of(data, most, held_out=False), 0),
            update,
        )
        for most, start, end in zip(ahead, [0, *steps], steps, strict=False)
    ]
    every, batches = config.evaluate.every or "end", config.evaluate.batches or 8
    test = MeanEvaluator(task, drawn(tests(data), 1, 128), "fresh", every, batches)
    return Recipe(task, phases, [test])


def graphs_of(data: ConfigDict, most: int) -> Graphs:
    """The distribution of graphs, of look-aheads up to `most`.

    Raises:
        ConfigError: a look-ahead that the graphs do not have, or that does not fit.
    """
    require("data.graphs", data.graphs, GRAPHS)
    vertices = Tokens(data.length).vertices
    edges = data.max_edges or None
    if data.graphs == "naive":
        if most != -1:
            raise ConfigError(
                f"data.lookahead={most}: naive graphs come with any look-ahead; give -1"
            )
        return Naive(vertices, edges)
    if data.graphs == "star":
        return Star(vertices, most)
    prefix = None if data.max_prefix < 0 else data.max_prefix
    return Balanced(vertices, most, max_edges=edges, max_prefix=prefix)


def rows_of(data: ConfigDict, most: int, held_out: bool | None = None) -> Callable[..., Any]:
    """What a batch is made of."""
    graphs = graphs_of(data, most)
    if data.task == "search":
        return Search(graphs, data.length, held_out)
    if data.graphs == "star":
        raise ConfigError(f"data.graphs='star': data.task={data.task!r} needs 'naive' graphs")
    if data.graphs == "balanced":
        raise ConfigError(
            f"data.graphs='balanced': balances look-ahead, and data.task={data.task!r} has none; "
            "give 'naive' and data.lookahead=-1"
        )
    return (DepthFirst if data.task == "depth_first" else SelectionInference)(data.length)


def tests(data: ConfigDict) -> Callable[..., Any]:
    """Searches of every look-ahead up to `data.tested` alike, whatever is trained on."""
    if data.task != "search":
        return rows_of(data, data.lookahead)
    graphs = Balanced(Tokens(data.length).vertices, data.tested)
    return Search(graphs, data.length, held_out=True)
