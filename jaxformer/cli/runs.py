"""Verbs that run, show, plan and place a config."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from jaxformer import launchers
from jaxformer.errors import ConfigError


def _on_mesh(options: argparse.Namespace, overrides: dict[str, str]) -> tuple[dict, str | None]:
    """The overrides with those of --mesh before them, and its topology."""
    from jaxformer.config import load_mesh

    sizes, topology = load_mesh(options.mesh) if options.mesh else ({}, None)
    return {**sizes, **overrides}, topology


def train(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from jaxformer.config import load_config

    config = load_config(options.config, _on_mesh(options, overrides)[0])
    import jax

    from jaxformer.analyze.summary import parameter_count
    from jaxformer.catalogue import build
    from jaxformer.evaluation.goodput import goodput
    from jaxformer.evaluation.report import training_report
    from jaxformer.observe.trace import traced_steps
    from jaxformer.parallel import multihost
    from jaxformer.parallel.mesh import make_mesh
    from jaxformer.recipe import Denoises, Generates
    from jaxformer.storage.places import place
    from jaxformer.train.fit import FitOptions, fit
    from jaxformer.train.states import restore_averaged

    how = {"profile": traced_steps(options.profile) if options.profile else None}
    workdir = options.workdir or f"runs/{_label(options.config)}"
    multihost.start()
    recipe = build(config)
    mesh = make_mesh(config.mesh.to_dict())
    settings = FitOptions(seed=config.seed, stop_after=options.stop_after, **how, **config.fit)
    fit(recipe, workdir=workdir, mesh=mesh, options=settings)
    if jax.process_index() == 0:
        print(f"goodput: {goodput(workdir)}", file=sys.stderr)
    _, state = restore_averaged(recipe, workdir, mesh=mesh)
    samples: list[str] = []
    if isinstance(recipe.task, Generates) and "sample" in config:
        from jaxformer.sampling.autoregressive import generate

        prompt = config.sample.prompt
        with jax.set_mesh(mesh):  # all processes draw together, each with its part of the weights
            (text,) = generate(
                recipe.task,
                state.params,
                state.extra,
                [prompt],
                length=config.sample.length,
                temperature=config.sample.temperature,
                key=state.key,
            )
        samples = [prompt + text]
    pictures = []
    if isinstance(recipe.task, Denoises) and "sample" in config:
        from jaxformer.tools.draw import FILE, draw

        with jax.set_mesh(mesh):
            pictures = [draw(recipe, state, place(workdir) / FILE, key=state.key)]
    count = parameter_count(state.params)
    if jax.process_index() == 0:
        how = {"parameters": count, "samples": samples, "pictures": pictures}
        print(training_report(recipe, workdir, **how))
    multihost.finish()


def multihost(options: argparse.Namespace, _: Any) -> int:
    from jaxformer.parallel.loopback import run

    command = [word for word in options.command if word != "--"]
    if not command or options.processes < 1:
        raise ConfigError("multihost: give --processes N -- VERB ..., such as -- train")
    return run(command, options.processes, options.devices, options.restarts)


def launch(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    launchers.launch(options, overrides)


def soak(options: argparse.Namespace, _: Any) -> int:
    from jaxformer.soak import soak

    output = Path(options.output)
    return 0 if soak(options.minutes, options.seed, output, options.kills_only) else 1


def _label(spec: str) -> str:
    name, _, preset = spec.partition(":")
    return f"{Path(name).stem}-{preset or 'small'}"


def show(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from jaxformer.config import load_config

    config = load_config(options.config, overrides)
    from jaxformer.analyze.summary import describe
    from jaxformer.catalogue import build
    from jaxformer.parallel.mesh import make_mesh

    print(describe(build(config), make_mesh(config.mesh.to_dict())))


def plan(options: argparse.Namespace, overrides: Any) -> int:
    from jaxformer.config import load_config

    overrides, topology = _on_mesh(options, overrides)
    topology = options.topology or topology
    if topology is None:
        raise ConfigError("plan: give --topology, or a --mesh that is for one")
    load_config(options.config, overrides)  # mistakes show before jax is imported
    from jaxformer.analyze.plan import plan
    from jaxformer.catalogue import build

    def load(spec: str, **changes: Any) -> Any:
        return build(load_config(spec, {**overrides, **changes}))

    found = plan(options.config, load, topology, options.search)
    print(json.dumps(found.json(), indent=1) if options.json else found.text())
    return 0 if found.fits else 1
