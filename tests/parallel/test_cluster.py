"""Which environments make a run of several processes, and what JAX's runtime is then told."""

import jax
import pytest

from jaxformer.errors import ConfigError
from jaxformer.parallel import multihost

WE = {"JAX_COORDINATOR_ADDRESS": "job-0-0.job:1234", "JAX_NUM_PROCESSES": "4"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}
ASK_JAX = (None, None, None)  # JAX reads SLURM's and the TPU's variables by itself


@pytest.fixture
def told(monkeypatch):
    """What the runtime was told, in place of a cluster to start in."""
    found = []
    monkeypatch.setattr(multihost, "_until_somebody_listens", lambda address, wait: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *where, **_: found.append(where))
    monkeypatch.setattr(multihost.importlib.util, "find_spec", lambda name: None)
    return found


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        ({**WE, "JAX_PROCESS_ID": "2"}, (WE["JAX_COORDINATOR_ADDRESS"], 4, 2)),
        ({**WE, **POD}, (WE["JAX_COORDINATOR_ADDRESS"], 4, 3)),  # a pod of a JobSet
        ({**WE, **POD, "JAX_PROCESS_ID": "1"}, (WE["JAX_COORDINATOR_ADDRESS"], 4, 1)),
        ({**POD, "JOB_COMPLETION_INDEX": "0"}, None),
        ({**SLURM, "SLURM_STEP_NODELIST": "n[1-4]"}, ASK_JAX),
        (SLURM, None),  # salloc without srun
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "1"}, ASK_JAX),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "a"}, ASK_JAX),
        # A JobSet on TPUs: GKE lists the workers of each slice.
        ({**POD, "TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, ASK_JAX),
    ],
)
def test_environments(told, environment, expected):
    multihost.start(environment)
    assert told == ([] if expected is None else [expected])


def test_kubernetes_is_asked_where_its_client_is_installed(told, monkeypatch):
    monkeypatch.setattr(multihost.importlib.util, "find_spec", lambda name: name)
    multihost.start(POD)
    assert told == [ASK_JAX]


def test_a_pod_that_would_train_alone_is_stopped(told):
    with pytest.raises(ConfigError, match="JAX_COORDINATOR_ADDRESS: not set in pod 3 of a Kub"):
        multihost.start(POD)
    assert not told
