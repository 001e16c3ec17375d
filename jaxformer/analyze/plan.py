"""Does it fit, and how fast could it be: a recipe's step compiled for hardware that is not here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from jaxformer.analyze.flops import count
from jaxformer.analyze.hlo import Traffic, collectives
from jaxformer.analyze.summary import local_bytes, unruled
from jaxformer.errors import ConfigError
from jaxformer.parallel.mesh import make_mesh
from jaxformer.parallel.topology import GIB, Topology, topology
from jaxformer.recipe import Recipe
from jaxformer.train.states import abstract_states, lower, on_device

USABLE = 0.95  # of a chip's memory; the rest is the runtime's
# For a 7B decoder on v5e:16x16 the TPU compiler takes 116 CPU seconds, of which 55 are left with
# this; temporary memory is then 13.0 GiB, not 9.6. What fits so fits, and is not compiled again.
QUICK = {"exec_time_optimization_effort": -1.0}


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One phase on one topology. Bytes are those of one device."""

    phase: str
    batch: int
    parameters: int
    optimizer: int  # and the rest of the state
    host: int  # what of the state waits in the host's memory
    temporary: int | None  # None: the compiler gave up for want of memory
    needed: int  # all of it, at the fullest moment
    flops: int  # of the whole step on all devices
    traffic: Mapping[str, Traffic]
    seconds: Mapping[str, float]  # the least that each resource needs
    complaint: str = ""  # of the compiler, where it gave up
    quick: bool = False  # compiled with little effort: less memory would do

    def fits(self, chip_memory: float) -> bool:
        return self.temporary is not None and self.needed <= USABLE * chip_memory

    @property
    def mfu(self) -> float:
        """FLOPs over what the chips could do in the time of the slowest resource."""
        return self.seconds["compute"] / max(self.seconds.values())


def mesh_for(recipe: Recipe, where: Topology) -> Mesh:
    """The mesh of the recipe's config on the devices of a topology."""
    return make_mesh(recipe.config.get("mesh"), where.devices())


def plan_step(recipe: Recipe, mesh: Mesh, where: Topology, phase: int = 0) -> StepPlan:
    """Compile a phase's step for `mesh`; nothing runs.

    For TPUs with little effort first, and with all of it where it does not fit so.
    """
    if where.chip.platform == "tpu":
        quick = _compiled(recipe, mesh, where, phase, QUICK)
        if quick.fits(where.chip.memory):
            return dataclasses.replace(quick, quick=True)
    return _compiled(recipe, mesh, where, phase)


def _compiled(
    recipe: Recipe,
    mesh: Mesh,
    where: Topology,
    phase: int,
    options: Mapping[str, Any] | None = None,
) -> StepPlan:
    chip = where.chip
    what = recipe.phases[phase]
    state = abstract_states(recipe, mesh)[phase + 1]
    batch = what.data.spec() if what.data is not None else {}
    assert what.update is not None
    flops = count(lambda s, b: what.update(s, on_device(what.data, b)), state, batch)  # type: ignore[misc]
    parameters = local_bytes(state.params)
    optimizer = local_bytes(state) - parameters
    host = local_bytes(state, on_host=True)
    rows = what.data.batch_size if what.data is not None else 0
    compute = flops / (where.size * chip.flops)
    program = lower(recipe, mesh, chip.platform, phase)
    try:
        compiled = program.compile(compiler_options=dict(options) if options else None)
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return StepPlan(
            phase=what.name,
            batch=rows,
            parameters=parameters,
            optimizer=optimizer,
            host=host,
            temporary=None,
            needed=parameters + optimizer,
            flops=flops,
            traffic={},
            seconds={"compute": compute},
            complaint=str(error).strip().splitlines()[0],
        )
    memory = compiled.memory_analysis()
    near = where.grid[-1] if chip.platform == "cuda" else where.size // where.slices
    traffic = collectives(compiled.as_text(), near)
    inputs = memory.argument_size_in_bytes
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed = inputs + outputs + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    between = sum(t.between for t in traffic.values())
    within = sum(t.sent for t in traffic.values()) - between
    seconds = {
        "compute": compute,
        # State is read and written once, what is temporary written and read once.
        "memory": 2 * (inputs + memory.temp_size_in_bytes) / chip.bandwidth,
        "network": within / chip.link + between / chip.between,
    }
    return StepPlan(
        phase=what.name,
        batch=rows,
        parameters=parameters,
        optimizer=optimizer,
        host=host,
        temporary=memory.temp_size_in_bytes,
        needed=needed,
        flops=flops,
        traffic=traffic,
        seconds=seconds,
    )


def _micro_batches(recipe: Recipe) -> int:
    return int(recipe.config["gradient"]["accumulate"])


def shareable(recipe: Recipe, mesh: Mesh) -> int:
    """The config's batch size, or the next that every device gets as many rows of at a time."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * _micro_batches(recipe)
    return -(-int(recipe.config["batch_size"]) // ways) * ways


def largest_batch(load: Callable[[int], Recipe], where: Topology, accumulate: int) -> int:
    """The largest power-of-two number of rows per device and micro-batch whose step fits; 0: none.

    `load(rows)` is the recipe with that global batch. Temporary memory is all but linear in the
    rows: two compilations predict the answer, further ones confirm it.
    """
    mesh = mesh_for(load(1), where)
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * accumulate
    needed: dict[int, float] = {}

    def fits(rows: int) -> bool:
        if rows not in needed:
            step = plan_step(load(rows * ways), mesh, where)
            needed[rows] = step.needed if step.temporary is not None else math.inf
        return needed[rows] <= USABLE * where.chip.memory

    if not fits(1):
        return 0
    if not fits(2):
        return 1
    slope = max(needed[2] - needed[1], 1.0)
    room = (USABLE * where.chip.memory - needed[1]) / slope + 1
    guess = 2 ** max(int(math.log2(room)), 1)
    while guess > 2 and not fits(guess):
        guess //= 2
    while fits(2 * guess):
        guess *= 2
    return guess


def report(step: StepPlan, mesh: Mesh, where: Topology) -> str:
    """The plan as text, with its assumptions."""
    memory = where.chip.memory

    def gib(n: float) -> str:
        return f"{n / GIB:.2f} GiB"

    sizes = ", ".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1) or "one device"
    lines = [
        f"phase {step.phase} on {where.name}: {where.size} devices ({sizes}), "
        f"{step.batch} rows a step",
        f"  parameters {gib(step.parameters)}, optimiser and other state {gib(step.optimizer)}, "
        + (f"temporary {gib(step.temporary)}" if step.temporary is not None else "temporary ?")
        + " per device"
        + (f", {gib(step.host)} of state in the host's memory" if step.host else ""),
    ]
    if step.temporary is None:
        lines.append(f"  DOES NOT FIT {gib(memory)}: {step.complaint}")
        return "\n".join(lines)
    verdict = "fits" if step.fits(memory) else "DOES NOT FIT"
    lines.append(
        f"  needs {gib(step.needed)} of {gib(memory)} ({step.needed / memory:.0%}): {verdict}"
    )
    lines.append(f"  {step.flops / 1e12:,.1f} TFLOP a step (products only, no recomputation)")
    for kind, traffic in sorted(step.traffic.items()):
        crossing = (
            f", {gib(traffic.between)} of it between slices or hosts" if traffic.between else ""
        )
        sent = f"{gib(traffic.sent)} sent per device"
        lines.append(f"  {kind}: {traffic.calls} calls, {sent}{crossing}")
    slowest = max(step.seconds, key=lambda name: step.seconds[name])
    times = ", ".join(f"{name} {1e3 * t:.1f} ms" for name, t in step.seconds.items())
    lines.append(
        f"  at least {1e3 * step.seconds[slowest]:.1f} ms ({times}): "
        f"at most {step.mfu:.0%} model FLOPs utilisation"
    )
    lines.append(
        "  assumes peak bfloat16 products, state and temporaries crossing memory twice, ring "
        "collectives on all links, and everything overlapping; a real step is slower"
    )
    if step.quick:
        lines.append("  compiled with little effort: temporary memory is an upper bound")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every phase of a recipe on one topology."""

    where: Topology
    mesh: Mesh
    steps: Sequence[StepPlan]
    notes: Sequence[str]
    rows: int | None = None  # the largest micro-batch per device, where it was looked for

    @property
    def fits(self) -> bool:
        return all(step.fits(self.where.chip.memory) for step in self.steps)

    def text(self) -> str:
        lines = [*self.notes, *(report(step, self.mesh, self.where) for step in self.steps)]
        if self.rows is not None:
            lines.append(
                f"  largest micro-batch that fits: {self.rows} rows per device"
                if self.rows
                else "  not even a micro-batch of one row per device fits"
            )
        return "\n".join(lines)

    def json(self) -> dict[str, Any]:
        """The same as plain numbers: bytes, FLOPs and seconds."""
        steps = [dataclasses.asdict(step) for step in self.steps]
        return {
            "topology": self.where.name,
            "mesh": dict(self.mesh.shape),
            "fits": self.fits,
            "largest micro-batch": self.rows,
            "phases": steps,
        }


def plan(spec: str, load: Callable[..., Recipe], name: str, search: bool = False) -> Plan:
    """Plan every phase of `load(spec)` on topology `name`; `search` for the largest micro-batch.

    A batch that the devices cannot share evenly is planned with the next size that they can.
    """
    where = topology(name)
    recipe, notes = load(spec), []
    mesh = mesh_for(recipe, where)
    rows = shareable(recipe, mesh)
    if rows != recipe.config["batch_size"]:
        notes.append(
            f"batch_size: {recipe.config['batch_size']} rows cannot be shared by this mesh in "
            f"{_micro_batches(recipe)} micro-batches; planned with {rows}"
        )
        recipe = load(spec, batch_size=rows)
    notes += unruled(recipe, abstract_states(recipe, mesh)[0].params)
    found = [
        plan_step(recipe, mesh, where, index)
        for index, phase in enumerate(recipe.phases)
        if phase.steps and phase.update is not None
    ]
    if not found:
        raise ConfigError(f"config: {spec} has no phase with steps to plan")
    largest = None
    if search:
        accumulate = _micro_batches(recipe)
        largest = largest_batch(lambda n: load(spec, batch_size=n), where, accumulate)
    return Plan(where, mesh, found, notes, largest)
