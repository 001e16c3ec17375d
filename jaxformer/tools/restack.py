"""A checkpoint whose layers run in a loop made one whose layers are unrolled, and back."""

from __future__ import annotations

from pathlib import Path

import jax
from ml_collections import ConfigDict

from jaxformer import paths
from jaxformer.catalogue import build
from jaxformer.errors import ConfigError
from jaxformer.interop.tensors import new_folder
from jaxformer.nn.block import stack_layers, unstack_layers
from jaxformer.parallel.mesh import make_mesh
from jaxformer.train.checkpoint import Checkpoints, flatten, saved_steps
from jaxformer.train.states import abstract_states, restore, saved_phase

LAYERS = ("stacked", "unrolled")


def restack(workdir: str | Path, out: str | Path, layers: str, step: int | None = None) -> Path:
    """Write the state of `step` (the last) into a new run whose layers are "stacked" or "unrolled".

    `config.model.scan` is set to match. Parameters, averages and optimiser state are all
    converted, so the run continues there.

    Raises:
        ConfigError: the config has no `model.scan`, the layers differ or are so already, or `out`
            exists.
    """
    if layers not in LAYERS:
        raise ConfigError(f"layers: {layers!r}; must be one of {', '.join(LAYERS)}")
    step = saved_steps(workdir)[-1] if step is None else step
    with Checkpoints(workdir) as checkpoints:
        page = checkpoints.meta(step)
    config = ConfigDict(page["config"])
    if "scan" not in config.get("model", {}):
        raise ConfigError(f"layers: the config of {workdir} has no field model.scan")
    if config.model.scan == (layers == "stacked"):
        raise ConfigError(f"layers: those of {workdir} are {layers} already")
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
    with new_folder(out) as folder, Checkpoints(folder) as checkpoints:
        checkpoints.save(step, found, {"phase": page["phase"], "config": dict(recipe.config)})
    return Path(out)
