"""From a name to a recipe, and from a paper to the verdict on its claims."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from jaxformer.compress.compressor import Compressor, compressed
from jaxformer.config import baselines, load_config, papers
from jaxformer.errors import ConfigError
from jaxformer.evaluation.claims import Lab, run_claims
from jaxformer.recipe import Recipe


def paper_module(paper: str) -> ModuleType:
    """The folder of a paper, imported.

    Raises:
        ConfigError: there is no such paper.
    """
    if paper not in papers():
        raise ConfigError(f"paper: {paper!r} is unknown; allowed: {', '.join(papers())}")
    return importlib.import_module(f"jaxformer.papers.{paper}")


def build(config: ConfigDict) -> Recipe:
    """The recipe of a config, made by its paper or baseline."""
    if config.paper in baselines():
        module = importlib.import_module(f"jaxformer.baselines.{config.paper}")
    else:
        module = paper_module(config.paper)
    recipe = module.build(config)
    if "compressed" in config:  # by `jaxformer compress`
        links = [(compressor_of(x["method"]), x["found"]) for x in config.compressed.links]
        recipe = compressed(recipe, config.compressed.stage, links)
    kept = config.to_json_best_effort()  # the numbers of a sweep's members are traced
    return dataclasses.replace(recipe, config=json.loads(kept))


def compressors() -> list[str]:
    """The papers that offer a `compressor`."""
    return [paper for paper in papers() if hasattr(paper_module(paper), "compressor")]


def compressor_of(method: str) -> Compressor:
    """The method of a name and its argument, "adalog:w4a4".

    Raises:
        ConfigError: no paper offers it, or the argument is not one of its own.
    """
    name, _, argument = method.partition(":")
    found = getattr(paper_module(name), "compressor", None) if name in papers() else None
    if found is None:
        raise ConfigError(f"method: {method!r} is not one of {', '.join(compressors())}")
    return found(argument)


def load(spec: str, **overrides: Any) -> Recipe:
    """The recipe of "pfn", "pfn:tiny" or "configs/pfn.py:tiny"; overrides as `model__width=256`."""
    fields = {name.replace("__", "."): value for name, value in overrides.items()}
    return build(load_config(spec, fields))


def reproduce(paper: str, workdir: str | Path, *, seed: int = 0, progress: bool = True) -> bool:
    """Run a paper's claims at preset "small", write the report, return whether all hold."""
    lab = Lab(load, paper, Path(workdir), seed, progress=progress)
    return run_claims(paper_module(paper).CLAIMS, lab)
