"""What a recipe is: its phases, parameters, work and memory, as text."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from jaxformer import paths
from jaxformer.analyze.flops import count
from jaxformer.evaluation.report import text_table
from jaxformer.parallel.sharding import HOST, LARGE, axes_of, rule_report, rules_of, spec_for
from jaxformer.recipe import Recipe
from jaxformer.train.states import abstract_states, lower, on_device


def parameter_count(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def local_bytes(tree: Any, *, on_host: bool = False) -> int:
    """Bytes of a placed tree on one device, or those of it that wait in the host's memory."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if jax.dtypes.issubdtype(leaf.dtype, jax.numpy.number)
        and (leaf.sharding.memory_kind == HOST) == on_host
    )


def describe(recipe: Recipe, mesh: Mesh | AbstractMesh) -> str:
    """Phases, parameters with their shardings, FLOPs per step and a memory estimate."""
    states = abstract_states(recipe, mesh)
    params = states[0].params
    phases, work = [], []
    for index, (phase, state) in enumerate(zip(recipe.phases, states[1:], strict=True)):
        phases.append(
            {
                "phase": phase.name,
                "steps": phase.steps,
                "update": type(phase.update).__name__ if phase.update else "-",
                "data": type(phase.data).__name__ if phase.data is not None else "-",
                "batch": phase.data.batch_size if phase.data is not None else "-",
            }
        )
        work.append(_work(recipe, index, state, mesh))
    rows = [
        {
            "parameter": name,
            "shape": "x".join(map(str, leaf.shape)) or "scalar",
            "axes": _axes(name, leaf, recipe),
            "sharding": str(spec_for(name, leaf, mesh, rules_of(recipe))),
        }
        for name, leaf in paths.leaves(params).items()
    ]
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    return "\n".join(
        [
            text_table(phases),
            "",
            text_table(rows),
            "",
            f"{parameter_count(params):,} parameters, {_bytes(params) / 2**20:.1f} MiB; "
            f"mesh {sizes or 'one device'}",
            *unruled(recipe, params),
            "",
            text_table(work),
        ]
    )


def unruled(recipe: Recipe, params: Any) -> list[str]:
    """A line that names the large parameters no sharding rule fits, if there are any."""
    leaves = paths.leaves(params)
    found = rule_report(leaves, rules_of(recipe)).unmatched
    names = [name for name in found if _bytes(leaves[name]) >= LARGE]
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return [f"no sharding rule fits {len(names)} large parameters: {shown}"] if names else []


def _axes(name: str, leaf: Any, recipe: Recipe) -> str:
    axes = axes_of(name, leaf.ndim, rules_of(recipe))
    if axes is None:
        return "(no rule)"
    contracted, produced = axes
    return " ".join([*contracted, *(["->"] if contracted else []), *produced])


def _work(recipe: Recipe, index: int, state: Any, mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """FLOPs per step of a phase and its memory per device.

    State and gradients are exact. What the step needs besides, activations above all, is XLA's
    figure for the step compiled on the mesh's own devices; an abstract mesh has none.
    """
    phase = recipe.phases[index]
    row: dict[str, Any] = {"phase": phase.name}
    if phase.update is not None and phase.steps:
        batch = phase.data.spec() if phase.data is not None else {}
        flops = count(lambda s, b: phase.update(s, on_device(phase.data, b)), state, batch)
        row["GFLOP/step"] = flops / 1e9
    row["state MiB/device"] = local_bytes(state) / 2**20
    row["gradients MiB/device"] = local_bytes(state.params) / 2**20
    if phase.steps and isinstance(mesh, Mesh):
        compiled = lower(recipe, mesh, mesh.devices.flat[0].platform, index).compile()
        row["temporary MiB/device"] = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return row
