"""Where the state of every paper and of the large decoders lies on a pod, and what it needs there.

A change that moves a partition, or any memory by more than 2 %, fails here. Where that is meant:
    JAXFORMER_WRITE_GOLDEN=1 ./launch/local test --aot tests/analyze/test_golden_plans.py
and read the difference before it is committed.
"""

import functools
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxformer import paths
from jaxformer.analyze.summary import local_bytes
from jaxformer.catalogue import load
from jaxformer.config import papers
from jaxformer.parallel.mesh import AXES, abstract_mesh, axis_sizes
from jaxformer.parallel.topology import topology
from jaxformer.train.states import abstract_states, on_device
from tests.kernels.aot import need

FOLDER = Path(__file__).parent.parent / "golden_plans"
WRITE = "JAXFORMER_WRITE_GOLDEN"
DECODERS = ["decoder:gpt2_124m", "decoder:gpt_1p3b", "decoder:llama_7b", "decoder:llama_70b"]
CONFIGS = [*(f"{paper}:paper" for paper in papers()), *DECODERS]
TOPOLOGIES = ["v5e:16x16", "v5p:8x8x16", "v6e:16x16", "h200:8x8"]
COMPILED = [
    ("decoder:gpt2_124m", "v5e:16x16", {"data": 256}),
    ("decoder:gpt_1p3b", "v5p:4x4x4", {"data": 4, "fsdp": 16}),
    ("linear_icl:paper", "v6e:2x2", {"data": 4}),
]


def placed(recipe, where):
    """Partitions and bytes per device of a recipe's state; layers that are alike share a line."""
    sizes = axis_sizes(recipe.config["mesh"], topology(where).size)
    states = abstract_states(recipe, abstract_mesh(dict(zip(AXES, sizes, strict=True))))
    partitions = {}
    for name, leaf in paths.leaves(states[0].params).items():
        line = re.sub(r"_\d+(?=/)", "_*", name)
        shape = "x".join(map(str, leaf.shape))
        partitions.setdefault(line, set()).add(f"{shape} {leaf.sharding.spec}")
    memory = {"parameters": local_bytes(states[0].params)}
    for phase, state in zip(recipe.phases, states[1:], strict=True):
        memory[f"state of {phase.name}"] = local_bytes(state)
    mesh = {axis: size for axis, size in zip(AXES, sizes, strict=True) if size > 1}
    lines = {line: ", ".join(sorted(found)) for line, found in partitions.items()}
    return {"mesh": mesh, "bytes": memory, "partitions": lines}


def compare(path, found, near):
    """With the file, or write it; the numbers under `near` may differ by 2 %."""
    if os.environ.get(WRITE):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    assert path.is_file(), f"not committed; {WRITE}=1 writes it"
    golden = json.loads(path.read_text())
    for name in golden.keys() | found.keys():
        for key in near:
            if key in found.get(name, {}):
                assert found[name].pop(key) == pytest.approx(golden[name].pop(key), rel=0.02), name
        assert found.get(name) == golden.get(name), name


# Scoped, so that the tests of one config follow each other and share its recipe.
every_config = pytest.mark.parametrize("config", CONFIGS, scope="module")
recipe_of = functools.lru_cache(maxsize=1)(load)


@every_config
def test_state_lies_as_committed(config):
    recipe = recipe_of(config)
    found = {where: placed(recipe, where) for where in TOPOLOGIES}
    compare(FOLDER / f"{config.replace(':', '-')}.json", found, ["bytes"])


@every_config
def test_stream_and_output_are_constrained(config):
    """Every block's stream, what enters the first and what leaves the model: without it the
    compiler may gather the rows of all devices on each.
    """
    recipe = recipe_of(config)
    mesh = abstract_mesh({"data": 4, "fsdp": 2})
    state, data = abstract_states(recipe, mesh)[0], recipe.phases[0].data

    def loss(params, extra, batch):
        batch = on_device(data, batch)
        return recipe.task.loss(params, extra, batch, key=jax.random.key(0), train=False).loss

    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.make_jaxpr(loss)(state.params, state.extra, data.spec())
    text = str(program)
    model = recipe.config["model"]
    depths = model["depths"] if "depths" in model else [model.get("depth", 1)]
    blocks = 1 if model.get("scan") else sum(depths)
    assert text.count("sharding_constraint[") >= blocks + 2


@pytest.mark.aot
@pytest.mark.parametrize("config, where, mesh", COMPILED)
def test_compiled_steps_need_what_is_committed(config, where, mesh):
    need("v5e")
    sizes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    command = [sys.executable, "-m", "jaxformer", "plan", "--json"]
    # Without the flags of the tests, which spare the compiler.
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, f"--config={config}", f"--topology={where}", *sizes],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    compiler = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
    found = {"compiler": compiler, "mesh": plan["mesh"]}
    for phase in plan["phases"]:
        memory = {name: phase[name] for name in ("parameters", "optimizer", "temporary", "needed")}
        sent = {kind: round(traffic["sent"]) for kind, traffic in phase["traffic"].items()}
        found[phase["phase"]] = {"bytes": memory, "sent": sent, "flops": phase["flops"]}
    path = FOLDER / f"{config.replace(':', '-')}@{where.replace(':', '-')}.json"
    if path.is_file() and not os.environ.get(WRITE):
        of = json.loads(path.read_text())["compiler"]
        if of != compiler:
            pytest.skip(f"written with {of}, which is not installed: other compilers need other")
    compare(path, found, ["bytes", "sent"])
