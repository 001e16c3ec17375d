"""States of a recipe: new ones, those at the start of a phase, and those read from disk."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxformer import paths
from jaxformer.parallel.mesh import make_mesh
from jaxformer.parallel.sharding import abstract_batch, check_rules, place, rules_of
from jaxformer.recipe import (
    Batch,
    ConfigError,
    Data,
    DrawsOnDevice,
    Metrics,
    Phase,
    Recipe,
    TrainState,
    Update,
)
from jaxformer.storage.places import AnyPath
from jaxformer.train.checkpoint import Checkpoints, saved_steps, start_from
from jaxformer.train.updates import Averages, Eager, KeepsOnHost

INITIAL = "initial"  # the phase of a checkpoint from before the first one: imported parameters


def on_device(data: Data | None, batch: Batch) -> Batch:
    """The arrays of a batch, drawn here if its data draws on device."""
    return data.draw(batch) if isinstance(data, DrawsOnDevice) else batch


def first_data(recipe: Recipe) -> Data | None:
    """The data of the first phase that has any."""
    return next((phase.data for phase in recipe.phases if phase.data is not None), None)


def new_state(recipe: Recipe, key: jax.Array) -> TrainState:
    """Freshly initialised parameters, before any phase is entered."""
    data = first_data(recipe)
    # Parameters depend on the shapes of a batch, not on its values.
    rows = {} if data is None else jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), data.spec())
    params, extra = recipe.task.init(jax.random.fold_in(key, 0), on_device(data, rows))
    return TrainState(jnp.zeros((), jnp.int32), params, extra, {}, key)


def enter(phase: Phase, state: TrainState) -> TrainState:
    """The state at the start of a phase."""
    state = phase.enter(state)
    return phase.update.init(state) if phase.update else state.replace(opt_state={})


@functools.lru_cache(maxsize=1)  # for the recipe at hand: to trace a large one takes seconds
def shapes_of(recipe: Recipe) -> list[TrainState]:
    """Shapes and dtypes of the state: at initialisation, then in each phase."""
    shapes = [jax.eval_shape(lambda: new_state(recipe, jax.random.key(0)))]
    for phase in recipe.phases:
        shapes.append(jax.eval_shape(functools.partial(enter, phase), shapes[-1]))
    return shapes


def abstract_states(recipe: Recipe, mesh: Any) -> list[TrainState]:
    """`shapes_of` the state, placed on a mesh: at initialisation, then in each phase."""
    shapes = shapes_of(recipe)
    check_rules(recipe, {name: x for shape in shapes for name, x in paths.leaves(shape).items()})
    updates = [None, *(phase.update for phase in recipe.phases)]
    hosts = [update.on_host if isinstance(update, KeepsOnHost) else None for update in updates]
    rules = rules_of(recipe)
    return [place(shape, mesh, rules, host) for shape, host in zip(shapes, hosts, strict=True)]


def shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def step_function(phase: Phase, abstract: TrainState, mesh: Any) -> Any:
    """The step of a phase, draw and update: jitted, and the state donated, unless it is `Eager`."""
    assert phase.update is not None

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return phase.update(state, on_device(phase.data, batch))  # type: ignore[misc]

    out = (shardings(abstract), NamedSharding(mesh, P()))
    if isinstance(phase.update, Eager):
        return lambda state, batch: jax.device_put(step(state, batch), out)
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def lower(
    recipe: Recipe, mesh: Mesh | AbstractMesh, platform: str, phase: int = 0
) -> jax.stages.Lowered:
    """The step of a phase lowered for `mesh` on "tpu", "cuda" or "cpu": no device is needed.

    Raises:
        ConfigError: a phase that runs layer by layer, by an `Eager` update.
    """
    what = recipe.phases[phase]
    if isinstance(what.update, Eager):
        raise ConfigError(f"phase {what.name!r}: goes layer by layer and is no program to lower")
    abstract = abstract_states(recipe, mesh)[phase + 1]
    batch = {} if what.data is None else abstract_batch(what.data, mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = step_function(what, abstract, mesh).trace(abstract, batch)
        return traced.lower(lowering_platforms=(platform,))


def averaged(update: Update | None, state: TrainState) -> TrainState:
    """The state whose parameters are to be evaluated (EMA, schedule-free average, or as is)."""
    return state.replace(params=update.averaged(state)) if isinstance(update, Averages) else state


def initialise(recipe: Recipe, mesh: Mesh, seed: int) -> TrainState:
    """A new state on the mesh, with parameters of another run where the recipe says so."""
    abstract = abstract_states(recipe, mesh)[0]
    make = jax.jit(lambda key: new_state(recipe, key), out_shardings=shardings(abstract))
    # Programs outside the loop run one at a time: those with collectives dead-lock when two are in
    # flight on more simulated devices than cores, just as unbounded steps do.
    state = jax.block_until_ready(make(jax.random.key(seed)))
    return start_from(recipe.init_from, state) if recipe.init_from else state


def restore(
    recipe: Recipe, workdir: AnyPath, *, step: int | None = None, mesh: Mesh | None = None
) -> TrainState:
    """The state of a run at `step` (the newest by default), on `mesh`.

    Raises:
        ConfigError: no such checkpoint, or one that this recipe does not fit.
    """
    return _restore(recipe, workdir, step, mesh)[1]


def restore_averaged(
    recipe: Recipe, workdir: AnyPath, *, step: int | None = None, mesh: Mesh | None = None
) -> tuple[Phase, TrainState]:
    """The phase of a saved step, and its state with the weights that are to be evaluated."""
    phase, state = _restore(recipe, workdir, step, mesh)
    return phase, averaged(phase.update, state)


def _restore(
    recipe: Recipe, workdir: AnyPath, step: int | None, mesh: Mesh | None
) -> tuple[Phase, TrainState]:
    step = saved_steps(workdir)[-1] if step is None else step
    mesh = mesh or make_mesh()
    with Checkpoints(workdir) as checkpoints, jax.set_mesh(mesh):
        page = checkpoints.meta(step)
        checkpoints.verify(step)
        index = saved_phase(recipe, page)
        abstract = abstract_states(recipe, mesh)[index + 1]
        phase = recipe.phases[index] if index >= 0 else Phase(INITIAL)
        return phase, checkpoints.restore(step, abstract)


def start_run(recipe: Recipe, workdir: AnyPath, state: TrainState) -> None:
    """Save `state` as the beginning of a run in a new `workdir`: what `fit` then starts from.

    Raises:
        ConfigError: `workdir` holds a run already.
    """
    with Checkpoints(workdir) as checkpoints:
        if checkpoints.steps():
            raise ConfigError(f"workdir: {workdir} holds a run already; give a new folder")
        checkpoints.save(0, state, {"phase": INITIAL, "config": dict(recipe.config)})


def saved_phase(recipe: Recipe, meta: Mapping[str, Any]) -> int:
    """The number of the phase a checkpoint was saved in; -1 before the first."""
    if meta["phase"] == INITIAL:
        return -1
    names = [phase.name for phase in recipe.phases]
    if meta["phase"] not in names:
        raise ConfigError(
            f"checkpoint: was saved in phase {meta['phase']!r}, this recipe has {', '.join(names)}"
        )
    return names.index(meta["phase"])
