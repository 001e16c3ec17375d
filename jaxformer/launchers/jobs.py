"""Jobs for clusters: a config, a topology and a place to write, as the files a scheduler takes.

`jaxformer launch gke | slurm | tpu_pod` renders the templates beside this file and hands them to
kubectl, sbatch or gcloud; with --dry-run it prints them and needs none of these.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from jaxformer.errors import ConfigError
from jaxformer.parallel.mesh import axis_sizes
from jaxformer.parallel.topology import Topology, topology

TEMPLATES = Path(__file__).parent / "templates"
GRACE = 120  # seconds between SIGTERM and the end, in which a checkpoint must be written


@dataclasses.dataclass(frozen=True)
class Machine:
    """What Google Cloud calls a kind of device, and how many a host has."""

    label: str  # of its GKE nodes
    per_host: int
    accelerator: str = ""  # a TPU pod's type; {0} chips, {1} cores
    runtime: str = ""  # the software of a TPU VM


MACHINES = {
    "v4": Machine("tpu-v4-podslice", 4, "v4-{1}", "tpu-ubuntu2204-base"),
    "v5e": Machine("tpu-v5-lite-podslice", 4, "v5litepod-{0}", "v2-alpha-tpuv5-lite"),
    "v5p": Machine("tpu-v5p-slice", 4, "v5p-{1}", "v2-alpha-tpuv5"),
    "v6e": Machine("tpu-v6e-slice", 4, "v6e-{0}", "v2-alpha-tpuv6e"),
    "a100": Machine("nvidia-a100-80gb", 8),
    "h100": Machine("nvidia-h100-80gb", 8),
    "h200": Machine("nvidia-h200-141gb", 8),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A run of one config on one topology."""

    name: str
    config: str
    mesh: str  # a file of configs/mesh
    topology: str
    sizes: Mapping[str, int]  # of the mesh axes
    workdir: str  # where all processes can write: gs://bucket/run, or a shared disk
    arguments: tuple[str, ...] = ()  # more of `jaxformer train`
    image: str = ""  # gke: with jaxformer in it
    package: str = "jaxformer[tpu,gcs]"  # tpu_pod: what pip installs
    queue: str = "jaxformer"  # gke: of Kueue
    namespace: str = "default"
    project: str = ""
    zone: str = ""
    logs: str = "logs"  # slurm: a folder on a shared disk
    restarts: int = 100
    spot: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name):
            raise ConfigError(
                f"name: {self.name!r} must be at most 40 of a-z, 0-9 and -, a letter first; give "
                "--name"
            )
        axis_sizes(self.sizes, self.hardware.size)

    @property
    def hardware(self) -> Topology:
        return topology(self.topology)

    @property
    def kind(self) -> str:
        """The name of the chip."""
        return self.topology.rpartition("*")[2].partition(":")[0]

    @property
    def machine(self) -> Machine:
        return MACHINES[self.kind]

    @property
    def grid(self) -> str:
        return "x".join(map(str, self.hardware.grid))

    @property
    def tpu(self) -> bool:
        return self.hardware.chip.platform == "tpu"

    @property
    def per_host(self) -> int:
        """Devices of one host."""
        per_slice = self.hardware.size // self.hardware.slices
        return min(self.machine.per_host, per_slice) if self.tpu else self.hardware.grid[-1]

    @property
    def hosts(self) -> int:
        """Hosts of one slice."""
        return self.hardware.size // self.hardware.slices // self.per_host

    @property
    def command(self) -> list[str]:
        """What every process runs; the same to start and to continue."""
        fixed = ["train", f"--config={self.config}", f"--mesh={self.mesh}"]
        return ["jaxformer", *fixed, f"--workdir={self.workdir}", *self.arguments]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Files for a scheduler, and the commands that hand them over."""

    files: Mapping[str, str]
    commands: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]  # where to look

    def text(self) -> str:
        """What would be done."""
        parts = [f"# ---- {name}\n{text}" for name, text in self.files.items()]
        commands = "".join(f"# would run: {shlex.join(c)}\n" for c in self.commands)
        return "\n".join(parts) + commands + "".join(f"# {note}\n" for note in self.notes)

    def submit(self, folder: Path) -> None:
        """Write the files and run the commands.

        Raises:
            ConfigError: the tool of the scheduler is not installed, or refuses.
        """
        tool = self.commands[0][0]
        if shutil.which(tool) is None:
            raise ConfigError(f"launch: {tool} is not installed here; --dry-run prints the files")
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            (folder / name).write_text(text)
        for command in self.commands:
            code = subprocess.run(command, cwd=folder).returncode
            if code:
                raise ConfigError(f"launch: {shlex.join(command)} failed with exit code {code}")


def render(template: str, **values: object) -> str:
    """A template with every <<name>> replaced; a name without a value is an error."""
    text = (TEMPLATES / template).read_text()
    return re.sub(r"<<(\w+)>>", lambda found: str(values[found[1]]), text)


def gke(job: Job) -> Plan:
    """A JobSet for Google Kubernetes Engine, and the Kueue queue that it waits in."""
    if not job.image:
        raise ConfigError("launch gke: give --image, a container image with jaxformer installed")
    labels = {"cloud.google.com/gke-accelerator": job.machine.label}
    resource, environment = "nvidia.com/gpu", _peers_of_pods(job)
    if job.tpu:  # GKE itself tells the pods of a slice about each other
        labels = {
            "cloud.google.com/gke-tpu-accelerator": job.machine.label,
            "cloud.google.com/gke-tpu-topology": job.grid,
        }
        resource, environment = "google.com/tpu", {}
    selector = labels | ({"cloud.google.com/gke-spot": "true"} if job.spot else {})
    tolerated = [resource] + ["cloud.google.com/gke-spot"] * job.spot
    values = {
        **dataclasses.asdict(job),
        "slices": job.hardware.slices,
        "hosts": job.hosts,
        "per_host": job.per_host,
        "grace": GRACE,
        "resource": resource,
        "quota": job.hardware.size,
        "command": json.dumps(job.command),
        "labels": _yaml(labels, 4),
        "selector": _yaml(selector, 16),
        "tolerations": "\n".join(
            f'{" " * 16}- {{key: "{key}", operator: Exists, effect: NoSchedule}}'
            for key in tolerated
        ),
        "environment": _environment(environment, 18),
    }
    files = {name: render(name, **values) for name in ("kueue.yaml", "jobset.yaml")}
    first = f"jobset.sigs.k8s.io/jobset-name={job.name},batch.kubernetes.io/job-completion-index=0"
    return Plan(
        files,
        (("kubectl", "apply", "-f", "jobset.yaml"),),
        (
            "once per cluster, by its administrator: kubectl apply -f kueue.yaml",
            f"logs: kubectl logs -n {job.namespace} -f -l {first}",
            *_notes(job),
        ),
    )


def _peers_of_pods(job: Job) -> dict[str, str]:
    """Where the processes meet: the first pod of the first Job, by the JobSet's own names."""
    return {
        "JAX_COORDINATOR_ADDRESS": f"{job.name}-slice-0-0.{job.name}:8476",
        "JAX_NUM_PROCESSES": str(job.hosts),
        "JAX_PROCESS_ID": "metadata.annotations['batch.kubernetes.io/job-completion-index']",
    }


def _yaml(values: Mapping[str, str], indent: int) -> str:
    return "\n".join(f'{" " * indent}{name}: "{value}"' for name, value in values.items())


def _environment(values: Mapping[str, str], indent: int) -> str:
    if not values:
        return f"{' ' * indent}env: []"
    lines = ["env:"]
    for name, value in values.items():
        if value.startswith("metadata."):
            source = f'valueFrom: {{fieldRef: {{fieldPath: "{value}"}}}}'
        else:
            source = f'value: "{value}"'
        lines.append(f"  - {{name: {name}, {source}}}")
    return "\n".join(" " * indent + line for line in lines)


def slurm(job: Job) -> Plan:
    """A batch script for a GPU cluster under SLURM."""
    if job.tpu or job.hardware.slices > 1:
        raise ConfigError(f"launch slurm: {job.topology} is none of GPUs; use one like h200:8x8")
    values = {
        **dataclasses.asdict(job),
        "hosts": job.hosts,
        "per_host": job.per_host,
        "grace": GRACE,
        "command": " \\\n  ".join(shlex.quote(word) for word in job.command),
    }
    return Plan(
        {"train.sbatch": render("train.sbatch", **values)},
        (("sbatch", "train.sbatch"),),
        (f"logs: {job.logs}/{job.name}-<job>-<task>.log", *_notes(job)),
    )


def tpu_pod(job: Job) -> Plan:
    """A queued resource of TPU VMs, whose workers all start the run at boot."""
    if not job.tpu:
        raise ConfigError(f"launch tpu_pod: {job.topology} is none of TPUs; use one like v5e:16x16")
    if not (job.project and job.zone and job.workdir.startswith("gs://")):
        raise ConfigError("launch tpu_pod: give --project, --zone and a --workdir in gs://")
    chips, slices = job.hardware.size // job.hardware.slices, job.hardware.slices
    single = f"--node-id={job.name}"
    values = {
        **dataclasses.asdict(job),
        "grace": GRACE,
        "command": shlex.join(job.command),
        "nodes": single if slices == 1 else f"--node-count={slices} --node-prefix={job.name}",
        "accelerator": job.machine.accelerator.format(chips, 2 * chips),
        "runtime": job.machine.runtime,
        "spot": "--spot " if job.spot else "",
    }
    node = job.name if slices == 1 else f"{job.name}-0"
    return Plan(
        {"tpu_pod.sh": render("tpu_pod.sh", **values)},
        (("bash", "tpu_pod.sh"),),
        (
            f"logs: gcloud compute tpus tpu-vm ssh {node} --project={job.project} "
            f"--zone={job.zone} --worker=0 --command='journalctl -fu jaxformer'",
            *_notes(job),
        ),
    )


def _notes(job: Job) -> tuple[str, ...]:
    return (
        f"metrics, checkpoints, report and traces: {job.workdir}",
        "to stop and continue: delete the job, launch the same again",
    )


LAUNCHERS: dict[str, Callable[[Job], Plan]] = {"gke": gke, "slurm": slurm, "tpu_pod": tpu_pod}
