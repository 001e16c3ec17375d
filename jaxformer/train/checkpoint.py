"""Checkpoints: a plain nested dict of arrays and a JSON page, written by orbax in the background.

`<workdir>/checkpoints/<step>/state` holds the arrays under the names of `jaxformer.paths`,
`.../meta` what else a run needs: phase, config, versions, layout; `.../digest.*` checksums. The
layout is a public contract: changing a name needs an entry in `MIGRATIONS` and a new golden
checkpoint in the tests. `workdir` is any path that etils knows, such as gs://bucket/run.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxformer import paths
from jaxformer.errors import Agreed
from jaxformer.parallel.multihost import several
from jaxformer.recipe import ConfigError, InitFrom, TrainState
from jaxformer.storage import digest
from jaxformer.storage.failures import Ear
from jaxformer.storage.places import AnyPath, place
from jaxformer.storage.writer import Writer

LAYOUT = 1
# {n: what a leaf of layout n + 1 was called in layout n}
MIGRATIONS: dict[int, Callable[[str], str]] = {}


def flatten(state: TrainState) -> dict[str, Any]:
    """{name: array} of a (concrete or abstract) state; the typed key as its uint32 data."""
    if isinstance(state.key, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, state.key)
        key: Any = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=state.key.sharding)
    else:
        key = jax.random.key_data(state.key)
    return paths.leaves(state.replace(key=key))


def unflatten(arrays: Mapping[str, jax.Array], abstract: TrainState) -> TrainState:
    """The state of `flatten`ed arrays."""
    # The key's data has one axis more than the key, so it is refilled apart.
    rest = paths.refill(abstract.replace(key=0), {**arrays, "key": 0})
    return rest.replace(key=jax.random.wrap_key_data(arrays["key"]))


def _old_name(name: str, layout: int) -> str:
    for version in range(LAYOUT - 1, layout - 1, -1):
        name = MIGRATIONS[version](name)
    return name


def versions() -> dict[str, str]:
    """The versions a checkpoint was written with."""
    names = ("jaxformer", "jax", "flax", "optax", "orbax-checkpoint")
    return {name: importlib.metadata.version(name) for name in names}


class Checkpoints:
    """The checkpoints of one run. Use as a context manager: closing waits for the last write."""

    def __init__(
        self,
        workdir: AnyPath,
        *,
        keep: int | None = None,
        keep_every: int | None = None,
    ) -> None:
        """Keep the newest `keep` checkpoints (all when None) and every `keep_every`-th step."""
        self.directory = place(workdir) / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_every)
        # Handlers are named so that a manager that has not saved yet can read metadata too.
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        ear = Ear()
        handlers = {name: ear.to(handler) for name, handler in handlers.items()}
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )
        self._writer = Writer(self._manager, self.directory, ear)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if several() and error is not None and not isinstance(error, Agreed):
            return  # what is being written waits for processes that are gone, or will not come
        self._writer.close(error)

    def steps(self) -> list[int]:
        """Saved steps, oldest first."""
        return sorted(self._manager.all_steps())

    def newest(self) -> int | None:
        """The newest step that is whole, None if nothing was saved; damaged ones are set aside.

        Raises:
            CheckpointDamaged: there are checkpoints, and all are damaged.
        """
        newest = digest.newest_whole(self.directory, self.steps())
        self._manager.reload()
        return newest

    def verify(self, step: int) -> None:
        """Compare a saved step with its checksums, where it has some.

        Raises:
            CheckpointDamaged: it is not what was written; the same in all processes.
        """
        digest.verify_together(self.directory / str(step))

    def save(self, step: int, state: TrainState, meta: Mapping[str, Any]) -> None:
        """Start writing; returns once the arrays are copied off the device.

        A phase without steps ends at the step of the one before and takes its place.

        Raises:
            CheckpointFailed: the one before could not be written.
        """
        self.wait()
        if step in self.steps():
            self._manager.delete(step)
        page = {**meta, "step": step, "layout": LAYOUT, "versions": versions()}
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(paths.nest(flatten(state))), meta=ocp.args.JsonSave(page)
        )
        self._writer.save(step, items)

    def check(self) -> None:
        """Raise `CheckpointFailed` if a write has failed by now."""
        self._writer.check()

    def wait(self) -> None:
        """Wait for the write under way; raises `CheckpointFailed` if it fails."""
        self._writer.wait()

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON page of a saved step.

        Raises:
            ConfigError: no such step.
        """
        if step not in self.steps():
            saved = ", ".join(map(str, self.steps())) or "none"
            raise ConfigError(f"step: {step} is not in {self.directory}; saved steps: {saved}")
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=items).meta

    def saved(self, step: int) -> dict[str, Any]:
        """{name: shape and dtype} of the saved arrays."""
        return paths.leaves(self._manager.item_metadata(step).state.tree)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of `step` on the shardings of `abstract`.

        Raises:
            ConfigError: the saved arrays do not fit `abstract`; names the first that does not.
        """
        return unflatten(self.restore_arrays(step, flatten(abstract), whole=True), abstract)

    def restore_arrays(
        self, step: int, wanted: Mapping[str, Any], *, whole: bool = False
    ) -> dict[str, jax.Array]:
        """The `wanted` arrays {name: abstract array}; `whole`: nothing else may be saved."""
        layout = self.meta(step)["layout"]
        if layout > LAYOUT:
            raise ConfigError(
                f"checkpoint {self.directory}/{step}: layout {layout} is newer than this version "
                f"of jaxformer reads ({LAYOUT}); upgrade jaxformer"
            )
        old = {name: _old_name(name, layout) for name in wanted}
        saved = self.saved(step)
        self._check(step, {old[name]: leaf for name, leaf in wanted.items()}, saved, whole)
        tree = paths.nest({old[name]: leaf for name, leaf in wanted.items()})
        arguments = ocp.args.PyTreeRestore(
            tree,
            restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
            partial_restore=not whole,
        )
        restored = self._manager.restore(step, args=ocp.args.Composite(state=arguments)).state
        found = paths.leaves(restored)
        return {name: found[old[name]] for name in wanted}

    def _check(
        self, step: int, wanted: Mapping[str, Any], saved: Mapping[str, Any], whole: bool
    ) -> None:
        where = f"checkpoint {self.directory}/{step}"
        remedy = "restore with the config it was trained with, or start in another workdir"
        missing = [name for name in wanted if name not in saved]
        extra = [name for name in saved if name not in wanted] if whole else []
        if missing or extra:
            what = f"lacks {missing[0]!r}" if missing else f"has {extra[0]!r}, unknown here"
            raise ConfigError(f"{where} {what} ({len(missing) + len(extra)} differ); {remedy}")
        for name, leaf in wanted.items():
            if tuple(saved[name].shape) != tuple(leaf.shape):
                raise ConfigError(
                    f"{where}: {name!r} has shape {tuple(saved[name].shape)}, this config wants "
                    f"{tuple(leaf.shape)}; {remedy}"
                )


def saved_steps(workdir: AnyPath) -> list[int]:
    """The checkpoints of a run.

    Raises:
        ConfigError: there are none.
    """
    if not (place(workdir) / "checkpoints").is_dir():
        raise ConfigError(
            f"workdir: no checkpoints in {workdir}; give the --workdir of a training run"
        )
    with Checkpoints(workdir) as checkpoints:
        steps = checkpoints.steps()
    if not steps:
        raise ConfigError(f"workdir: {workdir} has no complete checkpoint yet")
    return steps


def start_from(source: InitFrom, state: TrainState) -> TrainState:
    """`state` with the parameters of another run, mapped by `source.mapping`.

    Raises:
        ConfigError: no checkpoint, or a parameter that nothing maps to and `fresh` does not name.
    """
    with Checkpoints(source.workdir) as other:
        if not other.steps():
            raise ConfigError(f"init_from.workdir: no checkpoint in {other.directory}")
        step = other.steps()[-1] if source.step is None else source.step
        saved = {n.removeprefix("params/") for n in other.saved(step) if n.startswith("params/")}
        to_here: dict[str, str] = {}
        for name in sorted(saved):
            new = name
            for pattern, replacement in source.mapping:
                new = re.sub(pattern, replacement, new)
            if to_here.setdefault(new, name) != name:
                raise ConfigError(
                    f"init_from.mapping: {name!r} and {to_here[new]!r} both give {new!r}"
                )
        here = paths.leaves(state.params)
        lost = [n for n in here if n not in to_here and not re.search(source.fresh, n)]
        if lost:
            raise ConfigError(
                f"init_from: nothing in {other.directory}/{step} gives parameter {lost[0]!r} "
                f"({len(lost)} in all); extend init_from.mapping, or name it in init_from.fresh"
            )
        wanted = {
            f"params/{to_here[name]}": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in here.items()
            if name in to_here and not re.search(source.fresh, name)
        }
        found = other.restore_arrays(step, wanted)
    params = paths.map_named(
        lambda name, x: found.get(f"params/{to_here.get(name)}", x), state.params
    )
    return state.replace(params=params)
