"""All tests run on 8 simulated CPU devices; most use the first one alone."""

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def one_device():
    from jaxformer.parallel.mesh import make_mesh

    return make_mesh({"data": 1}, jax.devices()[:1])
