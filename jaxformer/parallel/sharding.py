"""Where arrays live: leaf name -> logical axes -> mesh axes. Modules know nothing of it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxformer import paths
from jaxformer.recipe import Batch, ConfigError, Data, Recipe

MeshAxes = str | tuple[str, ...] | None
Rule = tuple[str, str]  # (regex over the end of a leaf's name, logical axes)

# "a b -> c" reads: a map that contracts axes a, b and produces c. Optimiser state and averaged
# parameters follow, because their names end with the parameter's name.
PARAMETER_RULES: tuple[Rule, ...] = (
    (r"(query|key|value)/kernel$", "embed -> heads head"),
    (r"(^|/)out/kernel$", "heads head -> embed"),
    (r"(up|gate)/kernel$", "embed -> mlp"),
    (r"down/kernel$", "mlp -> embed"),
    (r"embed/table$", "vocab embed"),
    (r"head/kernel$", "embed -> vocab"),
)
PARAMETER_AXES: dict[str, MeshAxes] = {
    "embed": "fsdp",
    "heads": "tensor",
    "head": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    "expert": "expert",
}
ACTIVATION_AXES: dict[str, MeshAxes] = {
    "batch": ("data", "fsdp"),
    "length": "sequence",
    "embed": None,
    "heads": "tensor",
    "head": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "expert": "expert",
}
BATCH = P(("data", "fsdp"))
LARGE = 4 * 2**20  # bytes; an unknown leaf of this size is split along its largest divisible axis


def axes_of(name: str, ndim: int, rules: Sequence[Rule]) -> tuple[list[str], list[str]] | None:
    """(contracted, produced) logical axes of a leaf, or None if no rule fits.

    A leaf with one axis more than its rule is a stack of layers: its first axis is "layers".
    """
    for pattern, axes in rules:
        if re.search(pattern, name):
            before, arrow, after = axes.partition("->")
            contracted, produced = (before.split(), after.split()) if arrow else ([], axes.split())
            size = len(contracted) + len(produced)
            if ndim == size:
                return contracted, produced
            if ndim == size + 1:
                return ["layers", *contracted], produced
    return None


def _fit(axes: Sequence[MeshAxes], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """A spec without the mesh axes that do not divide their dimension."""

    def size(axis: MeshAxes) -> int:
        return math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ()))

    return P(*(axis if n % size(axis) == 0 else None for axis, n in zip(axes, shape, strict=True)))


def spec_for(
    name: str, leaf: Any, mesh: Mesh | AbstractMesh, rules: Sequence[Rule] = PARAMETER_RULES
) -> P:
    """The partition of one leaf of a train state."""
    axes = axes_of(name, leaf.ndim, rules)
    if axes is not None:
        contracted, produced = axes
        mesh_axes = [PARAMETER_AXES[axis] for axis in (*contracted, *produced)]
        return _fit(mesh_axes, leaf.shape, mesh)
    fsdp = mesh.shape["fsdp"]
    if fsdp > 1 and leaf.size * leaf.dtype.itemsize >= LARGE:
        for i in np.argsort(leaf.shape)[::-1]:
            if leaf.shape[i] % fsdp == 0:
                return P(*("fsdp" if j == i else None for j in range(leaf.ndim)))
    return P()


def rules_of(recipe: Recipe) -> tuple[Rule, ...]:
    """The recipe's own rules first, then the library's."""
    return (*recipe.sharding, *PARAMETER_RULES)


class RuleReport(NamedTuple):
    """How a table of rules fits the leaves of a state."""

    unmatched: tuple[str, ...]  # leaves with two axes or more that no rule fits
    doubled: Mapping[str, tuple[str, ...]]  # leaf: patterns of one table that all fit it
    idle: tuple[str, ...]  # patterns that fit no leaf


def rule_report(named: Mapping[str, Any], rules: Sequence[Rule]) -> RuleReport:
    """The report of one table of rules on leaves {name: array}."""
    fitting = {
        name: tuple(r[0] for r in rules if axes_of(name, leaf.ndim, [r]) is not None)
        for name, leaf in named.items()
    }
    used = {pattern for patterns in fitting.values() for pattern in patterns}
    return RuleReport(
        tuple(name for name, found in fitting.items() if not found and named[name].ndim > 1),
        {name: found for name, found in fitting.items() if len(found) > 1},
        tuple(pattern for pattern, _ in rules if pattern not in used),
    )


def check_rules(recipe: Recipe, named: Mapping[str, Any]) -> None:
    """Hold the recipe's own rules to the leaves {name: array} of all its states.

    Raises:
        ConfigError: a rule has an unknown axis or fits no leaf, or a leaf fits two rules.
    """
    for pattern, axes in recipe.sharding:
        for axis in axes.replace("->", " ").split():
            if axis not in PARAMETER_AXES:
                raise ConfigError(
                    f"sharding: rule {pattern!r} has axis {axis!r}; "
                    f"allowed: {', '.join(PARAMETER_AXES)}"
                )
    report = rule_report(named, recipe.sharding)
    if report.idle:
        last = report.idle[0].rstrip("$").rpartition("/")[2]
        near = difflib.get_close_matches(last, {n.rpartition("/")[2] for n in named}, 1, 0.5)
        raise ConfigError(
            f"sharding: rule {report.idle[0]!r} fits no leaf of the state by name and number of "
            f"axes{f'; there are leaves called {near[0]!r}' if near else ''}; "
            "see `jaxformer show`"
        )
    for name, patterns in report.doubled.items():
        raise ConfigError(
            f"sharding: {name!r} fits the rules {' and '.join(map(repr, patterns))}; "
            "make the patterns exclude each other"
        )


HOST = "pinned_host"  # JAX's name of the host's memory that devices copy from


def place(
    abstract: Any, mesh: Mesh | AbstractMesh, rules: Sequence[Rule], on_host: str | None = None
) -> Any:
    """Abstract arrays with their shardings on `mesh`; in the host's memory if `on_host` fits."""

    def one(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, spec_for(name, leaf, mesh, rules))
        if on_host is not None and leaf.ndim and re.search(on_host, name):
            sharding = sharding.with_memory_kind(HOST)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return paths.map_named(one, abstract)


def one_device() -> bool:
    """Whether the program being traced is for a single device: no axis can be divided."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Fix the layout of an activation by logical axes, e.g. ("batch", "length", "embed").

    Does nothing outside a mesh. Without it on the residual stream and the logits, a 7B model on
    a pod runs out of memory (measured by ahead-of-time compilation).
    """
    if one_device():
        return x
    mesh = jax.sharding.get_abstract_mesh()
    spec = _fit([ACTIVATION_AXES[axis] if axis else None for axis in axes], x.shape, mesh)
    return jax.lax.with_sharding_constraint(x, spec)


def free_axes(mesh: Any, axis: str, n: int) -> tuple[str, ...] | None:
    """The mesh axes to divide n elements of a logical axis over, for a `jax.shard_map`.

    None where they are one device, do not divide n, or are divided by hand already.
    """
    wanted = ACTIVATION_AXES[axis] or ()
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    axes = tuple(a for a in wanted if a in mesh.shape and a not in mesh.manual_axes)
    ways = math.prod(mesh.shape[a] for a in axes)
    return axes if ways > 1 and n % ways == 0 else None


def batch_sharding(mesh: Mesh | AbstractMesh, batch_size: int) -> NamedSharding:
    """Rows over the data and fsdp axes.

    Raises:
        ConfigError: the rows cannot be shared out evenly.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise ConfigError(
            f"batch_size: {batch_size} rows cannot be shared by {ways} devices "
            f"(mesh data={mesh.shape['data']}, fsdp={mesh.shape['fsdp']}); use a multiple of {ways}"
        )
    return NamedSharding(mesh, BATCH)


def host_rows(data: Data, mesh: Mesh) -> slice:
    """The contiguous rows of a global batch that this process must read."""
    sharding = batch_sharding(mesh, data.batch_size)
    indices = sharding.addressable_devices_indices_map((data.batch_size,)).values()
    bounds = [index[0].indices(data.batch_size) for index in indices if index]
    return slice(min(b[0] for b in bounds), max(b[1] for b in bounds))


def abstract_batch(data: Data, mesh: Mesh | AbstractMesh) -> Batch:
    """Shapes, dtypes and shardings of the batches of `data`."""
    sharding = batch_sharding(mesh, data.batch_size)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), data.spec()
    )


def place_batch(batch: Batch, mesh: Mesh, batch_size: int) -> Batch:
    """This process's rows as global arrays on the mesh."""
    sharding = batch_sharding(mesh, batch_size)

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(sharding, x, (batch_size, *x.shape[1:]))

    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)
    return jax.tree.map(put, dict(batch))
