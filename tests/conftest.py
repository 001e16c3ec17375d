"""All tests run on 8 simulated CPU devices; most use the first one alone."""

import os

import jax
import pytest

# Nearly all of the time goes into compiling small programs, so XLA is told not to try hard: half
# the CPU time of tests/nn. Child processes inherit it, so that both sides of a comparison agree.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if jax.__version_info__ < (0, 11):
    # Training steps of small models compile in a third of the time (3.0 s to .95, 4.8 to 2.0). A
    # process ends at a flag that its XLA does not know, so only where they were tried.
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Compiled programs of finished modules go, or a worker would grow by gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def one_device():
    from jaxformer.parallel.mesh import make_mesh

    return make_mesh({"data": 1}, jax.devices()[:1])
