"""A checkpoint whose layers run in a loop made one whose layers are unrolled, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jaxformer import paths
from jaxformer.errors import ConfigError
from jaxformer.nn.block import stack_layers, unstack_layers
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import Recipe
from jaxformer.train.checkpoint import Checkpoints, flatten, saved_steps
from jaxformer.train.states import abstract_states, restore, saved_phase


def restack(
    workdir: str | Path,
    to: str | Path,
    build: Callable[[ConfigDict], Recipe],
    step: int | None = None,
) -> tuple[int, bool]:
    """Write the state of `step` (the last) into the folder `to`, `config.model.scan` turned over.

    Parameters, averages and optimiser state are all converted, so the run continues there. Returns
    the step, and whether the layers now run in a loop.

    Raises:
        ConfigError: the config has no `model.scan`, the layers differ, or `to` holds a run.
    """
    if (Path(to) / "checkpoints").exists():
        raise ConfigError(f"to: {to} holds checkpoints already; give another folder")
    step = saved_steps(workdir)[-1] if step is None else step
    with Checkpoints(workdir) as checkpoints:
        page = checkpoints.meta(step)
    config = ConfigDict(page["config"])
    if "scan" not in config.get("model", {}):
        raise ConfigError(f"workdir: the config of {workdir} has no field model.scan to turn over")
    mesh = make_mesh(config.mesh.to_dict())
    state = restore(build(config), workdir, step=step, mesh=mesh)
    config.model.scan = scan = not config.model.scan
    recipe = build(config)
    named = paths.leaves((stack_layers if scan else unstack_layers)(paths.nest(flatten(state))))
    abstract = abstract_states(recipe, mesh)[saved_phase(recipe, page) + 1]
    differ = sorted(named.keys() ^ flatten(abstract).keys())
    if differ:
        raise ConfigError(f"workdir: {differ[0]!r} of {workdir} has no place in the other form")

    def put(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(named[name], leaf.sharding)

    found = paths.map_named(put, abstract.replace(key=None)).replace(key=state.key)
    with Checkpoints(to) as checkpoints:
        checkpoints.save(step, found, {"phase": page["phase"], "config": dict(recipe.config)})
    return step, scan
