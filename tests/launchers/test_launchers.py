"""What the launchers render: valid by the published types, and right in its numbers."""

import dataclasses
import os
import stat
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from jaxformer.cli import main
from jaxformer.errors import ConfigError
from jaxformer.launchers.jobs import Job, gke, slurm, tpu_pod

TPU = Job(
    name="big",
    config="decoder:llama_7b",
    mesh="v5p_512_2",
    topology="2*v5p:8x8x8",
    sizes={"data": 2, "fsdp": 512},
    workdir="gs://bucket/big",
    image="registry/image:1",
    project="project",
    zone="zone",
    spot=True,
)
GPU = dataclasses.replace(
    TPU, topology="h200:8x8", mesh="gpu_8", sizes={"fsdp": 64}, workdir="/shared/big", spot=False
)

LAUNCH_FOLDER = Path(__file__).parents[2] / "launch"
NAME = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"


def only(required=(), **properties):
    """An object of these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def some(item):
    return {"type": "array", "items": item, "minItems": 1, "maxItems": 16}


# By hand from the definitions of Kueue's types, version v1beta1, at commits 6af03d770e6e (queues)
# and 014868bae29c (local queues) of github.com/kubernetes-sigs/kueue (Apache-2.0),
# config/components/crd/bases: the fields that are rendered here, their patterns and limits.
KUEUE = {
    "ResourceFlavor": only(nodeLabels={"type": "object", "maxProperties": 8}),
    "ClusterQueue": only(
        namespaceSelector={"type": "object"},
        preemption=only(
            withinClusterQueue={"enum": ["Never", "LowerPriority", "LowerOrNewerEqualPriority"]}
        ),
        resourceGroups=some(
            only(
                ["coveredResources", "flavors"],
                coveredResources=some({"type": "string"}),
                flavors=some(
                    only(
                        ["name", "resources"],
                        name={"type": "string", "pattern": NAME, "maxLength": 253},
                        resources=some(
                            only(
                                ["name", "nominalQuota"],
                                name={"type": "string"},
                                nominalQuota={"type": "integer", "minimum": 0},
                            )
                        ),
                    )
                ),
            )
        ),
    ),
    "LocalQueue": only(clusterQueue={"type": "string", "pattern": NAME, "maxLength": 253}),
}


def jobset(job):
    """The rendered JobSet, after a round trip through the published types: no field is unknown."""
    page = yaml.safe_load(gke(job).files["jobset.yaml"])
    assert JobsetV1alpha2JobSet.from_dict(page).to_dict() == page
    return page


def test_the_round_trip_notices_unknown_and_missing_fields_and_wrong_types():
    def damaged(change):
        page = yaml.safe_load(gke(TPU).files["jobset.yaml"])
        change(page["spec"])
        return page

    unknown = damaged(lambda spec: spec["failurePolicy"].update(maxRetries=3))
    missing = damaged(lambda spec: spec["replicatedJobs"][0].pop("name"))
    for page in (unknown, missing):
        assert JobsetV1alpha2JobSet.from_dict(page).to_dict() != page
    with pytest.raises(ValueError, match="maxRestarts"):
        JobsetV1alpha2JobSet.from_dict(
            damaged(lambda spec: spec["failurePolicy"].update(maxRestarts="many"))
        )


def test_a_jobset_of_two_slices():
    page = jobset(TPU)
    (job,) = page["spec"]["replicatedJobs"]
    assert job["replicas"] == 2  # slices
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 512 // 4 and spec["backoffLimit"] == 0
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "8x8x8",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": "4"}
    assert container["command"] == [
        *("jaxformer", "train", "--config=decoder:llama_7b", "--mesh=v5p_512_2"),
        "--workdir=gs://bucket/big",
    ]
    # Every failure starts all pods again, but for wrong input.
    rules = spec["podFailurePolicy"]["rules"]
    assert [rule["onExitCodes"]["values"] for rule in rules] == [[2]]
    assert page["spec"]["failurePolicy"]["maxRestarts"] == 100
    assert page["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "jaxformer"}


def test_a_jobset_of_gpus_says_where_they_meet():
    spec = jobset(GPU)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert spec["parallelism"] == 8
    (container,) = spec["template"]["spec"]["containers"]
    found = {entry["name"]: entry for entry in container["env"]}
    # A pod is called <jobset>-<replicated job>-<job>-<pod>, in a domain called as the JobSet is.
    assert found["JAX_COORDINATOR_ADDRESS"]["value"] == "big-slice-0-0.big:8476"
    assert found["JAX_NUM_PROCESSES"]["value"] == "8"
    assert "job-completion-index" in found["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert container["resources"]["requests"] == {"nvidia.com/gpu": "8"}


def test_the_queue_is_valid_and_large_enough():
    pages = list(yaml.safe_load_all(gke(TPU).files["kueue.yaml"]))
    assert [page["kind"] for page in pages] == ["ResourceFlavor", "ClusterQueue", "LocalQueue"]
    for page in pages:
        assert page["apiVersion"] == "kueue.x-k8s.io/v1beta1"
        jsonschema.validate(page["spec"], KUEUE[page["kind"]])
    (group,) = pages[1]["spec"]["resourceGroups"]
    assert group["flavors"][0]["resources"] == [{"name": "google.com/tpu", "nominalQuota": 1024}]


def tools(folder, **scripts):
    """Programs of these names that do as told and note how they were called."""
    folder.mkdir()
    for name, body in scripts.items():
        path = folder / name
        path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>"{folder}/calls"\n{body}\n')
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    "code, restarts, again",
    [(0, 0, False), (75, 0, True), (137, 3, True), (75, 100, False), (2, 0, False), (1, 0, False)],
)
def test_the_batch_script_queues_again_what_was_stopped(code, restarts, again, tmp_path):
    script = tmp_path / "train.sbatch"
    script.write_text(slurm(GPU).files["train.sbatch"])
    environment = tools(tmp_path / "bin", srun=f"exit {code}", scontrol="exit 0")
    environment["SLURM_RESTART_COUNT"] = str(restarts)
    done = subprocess.run(["bash", script], env=environment)
    srun, *rest = (tmp_path / "bin" / "calls").read_text().splitlines()
    assert "jaxformer train --config=decoder:llama_7b --mesh=gpu_8 --workdir=/shared/big" in srun
    assert rest == (["scontrol requeue 7"] if again else [])
    assert done.returncode == (0 if again else code)


def test_the_batch_script_asks_for_a_process_per_gpu():
    lines = slurm(GPU).files["train.sbatch"].splitlines()
    options = dict(
        line[8:].strip("-").split("=", 1) for line in lines if "#SBATCH" in line and "=" in line
    )
    assert options["nodes"] == options["ntasks-per-node"] == options["gpus-per-node"] == "8"
    assert options["signal"] == "TERM@120" and "#SBATCH --requeue" in lines


def test_a_preempted_tpu_is_asked_for_again(tmp_path):
    script = tmp_path / "tpu_pod.sh"
    script.write_text(tpu_pod(TPU).files["tpu_pod.sh"])
    # In turn: no such resource, running, preempted, gone, and then the report is there.
    gcloud = """
case "$*" in
  *describe*) sed -n 1p "$STATES"; sed -i 1d "$STATES" ;;
  "storage ls"*) [ ! -s "$STATES" ] ;;
esac"""
    environment = tools(tmp_path / "bin", gcloud=gcloud, sleep="exit 0")
    environment["STATES"] = str(tmp_path / "states")
    (tmp_path / "states").write_text("NONE\nACTIVE\nSUSPENDED\nNONE\n")
    subprocess.run(["bash", script], env=environment, check=True)
    calls = (tmp_path / "bin" / "calls").read_text().splitlines()
    did = [line.split()[4] for line in calls if "queued-resources" in line]
    assert [verb for verb in did if verb != "describe"] == ["create", "delete", "create", "delete"]
    create = next(line for line in calls if "resources create" in line)
    for words in ("--node-count=2 --node-prefix=big", "--accelerator-type=v5p-1024", "--spot"):
        assert words in create


def test_the_worker_script_is_one(tmp_path):
    text = tpu_pod(TPU).files["tpu_pod.sh"].split("<<'WORKER'\n")[1].split("WORKER\n")[0]
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert "/opt/jaxformer/bin/jaxformer train --config=decoder:llama_7b" in text


@pytest.mark.parametrize(
    "make, changes, message",
    [
        (gke, {"image": ""}, "--image"),
        (slurm, {}, "is none of GPUs"),
        (tpu_pod, {"workdir": "/home"}, "--workdir in gs://"),
        (gke, {"name": "Big_Run"}, "--name"),
        (gke, {"sizes": {"fsdp": 7}}, "does not cover 1024 devices"),
        (gke, {"topology": "v9:2x2"}, "topology: 'v9:2x2' is unknown"),
    ],
)
def test_mistakes_are_named(make, changes, message):
    with pytest.raises(ConfigError, match=message):
        make(dataclasses.replace(TPU, **changes))


LAUNCH = ["launch", "gke", "--config=decoder:llama_7b", "--mesh=v5e_256", "--image=registry/i:1"]


def test_a_dry_run_needs_no_tool(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    more = ["--workdir=gs://bucket/run", "--config.optim.learning_rate=1e-4"]
    assert main([*LAUNCH, *more, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "# would run: kubectl apply -f jobset.yaml" in said
    assert '"--config.optim.learning_rate=1e-4"' in said
    assert list(tmp_path.iterdir()) == []
    assert main([*LAUNCH, *more]) == 2
    assert "kubectl is not installed here; --dry-run prints the files" in capsys.readouterr().err


def test_a_wrong_field_is_found_before_the_cluster_sees_it(capsys):
    assert main([*LAUNCH, "--workdir=gs://b/r", "--config.model.widht=3", "--dry-run"]) == 2
    assert "widht" in capsys.readouterr().err


EXAMPLES = {
    "gke/example.yaml": ["gke", "--mesh=v5e_256", "--workdir=gs://BUCKET/RUN", "--image=IMAGE"],
    "slurm/example.sbatch": ["slurm", "--mesh=gpu_8", "--workdir=/shared/RUN"],
    "tpu_pod/example.sh": [
        *("tpu_pod", "--mesh=v5e_256", "--workdir=gs://BUCKET/RUN"),
        *("--project=P", "--zone=us-west4-a", "--spot"),
    ],
}


@pytest.mark.parametrize("path", EXAMPLES)
def test_the_examples_are_what_is_rendered(path, capsys):
    """Run with JAXFORMER_WRITE_EXAMPLES=1 after a change of the templates."""
    config = "decoder:gpt2_124m" if path.startswith("slurm") else "decoder:llama_7b"
    assert main(["launch", *EXAMPLES[path], f"--config={config}", "--dry-run"]) == 0
    said = capsys.readouterr().out
    file = LAUNCH_FOLDER / path
    if os.environ.get("JAXFORMER_WRITE_EXAMPLES"):
        file.write_text(said)
    assert file.read_text() == said
