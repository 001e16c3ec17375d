"""Compile kernels for accelerators that are not here, and read what the compilers say.

TPU programs need libtpu; CUDA programs the CUDA plugin of JAX and the ptxas that comes with it.
Neither needs a device: `pip install jaxformer[aot]`, or `./launch/local test --aot`.
"""

import functools
import importlib.util
import os
import pathlib
import re
import subprocess
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

from jaxformer.parallel import topology

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
GPUS = {"h200": "sm_90a", "a100": "sm_80"}
TARGETS = pathlib.Path(topology.__file__).parent / "targets"


class Compiled(NamedTuple):
    """A program, and for CUDA what ptxas says of each kernel."""

    program: jax.stages.Compiled
    kernels: dict[str, "Resources"]

    @property
    def spills(self):
        """Bytes spilled to memory, by kernel; nothing where nothing spills."""
        return {name: x.spills for name, x in self.kernels.items() if x.spills}


class Resources(NamedTuple):
    """Of one CUDA kernel: registers per thread, bytes of spill stores and loads."""

    registers: int
    spills: int


def need(target):
    """Skip the test where the compiler of a target is not installed."""
    package = "libtpu" if target in TPUS else "jax_cuda13_plugin"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: ./launch/local test --aot")


@functools.cache
def device(target):
    """A device that can be compiled for: a key of TPUS or of GPUS."""
    need(target)
    if target in TPUS:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # in every test worker
        return topologies.get_topology_desc(platform="tpu", topology_name=TPUS[target]).devices[0]
    config = (TARGETS / f"{target}.txtpb").read_text()
    return topologies.get_topology_desc(
        platform="cuda", topology_name=target, target_config=config, topology="1x1x1"
    ).devices[0]


def compile_for(target, function, *args, dump=None):
    """Compile `function` for a target; `args` are trees of arrays or ShapeDtypeStructs.

    `dump`, an empty folder (`tmp_path`), makes `Compiled.kernels` known on CUDA.
    """
    sharding = SingleDeviceSharding(device(target))
    args = jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) if hasattr(x, "shape") else x
        ),
        args,
    )
    # The tests' own flags, which spare the compiler, would spill registers.
    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    if dump is not None and target in GPUS:
        options["xla_dump_to"] = str(dump)
        for name, value in (("PTX", "1"), ("PTXAS", "1"), ("TO", str(dump))):
            os.environ[f"MOSAIC_GPU_DUMP_{name}"] = value
    # Inside its mesh, the program is traced for the target and not for this process's CPU.
    mesh = Mesh(np.array([device(target)]), ("device",), axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function).lower(*args)
    program = lowered.compile(compiler_options=options)
    return Compiled(program, _resources(dump, GPUS[target]) if "xla_dump_to" in options else {})


def _resources(dump, arch):
    """What ptxas -v says of the kernels dumped to a folder, by XLA and by Mosaic.

    Mosaic's own report counts as well: its ptxas may be that of another CUDA on this machine, and
    they differ by a register here and there.
    """
    reports = [x.read_text() for x in pathlib.Path(dump).rglob("*ptxas*") if x.is_file()]
    for ptx in pathlib.Path(dump).glob("*.ptx"):
        if ".version" in ptx.read_text():
            command = [_ptxas(), "-v", f"-arch={arch}", str(ptx), "-o", os.devnull]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            reports.append(done.stdout + done.stderr)
    found = {}
    for report in reports:
        for part in re.split(r"Compiling entry function '", report)[1:]:
            spills = re.findall(r"(\d+) bytes spill", part)
            registers = re.search(r"Used (\d+) registers", part)
            one = Resources(int(registers[1]), sum(map(int, spills)))
            name = part.split("'")[0]  # Mosaic calls every kernel alike: keep the worst
            found[name] = Resources(*map(max, found.get(name, one), one))
    return found


@functools.cache
def _ptxas():
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations:
        for path in pathlib.Path(root).glob("*/bin/ptxas"):
            return str(path)
    pytest.skip("ptxas is not installed: ./launch/local test --aot")
