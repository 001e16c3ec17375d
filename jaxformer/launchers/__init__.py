"""`jaxformer launch`: its arguments, and what is done with them. `jobs.py` makes the files."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxformer.errors import ConfigError

# {argument: (default, help)}; all are fields of `jobs.Job`
_FIELDS: dict[str, tuple[Any, str]] = {
    "workdir": (None, "gs://bucket/run, or on a disk that all hosts share"),
    "image": ("", "gke: a container image with jaxformer installed"),
    "queue": ("jaxformer", "gke: the queue of Kueue"),
    "namespace": ("default", "gke"),
    "package": ("jaxformer[tpu,gcs]", "tpu_pod: what pip installs on the workers"),
    "project": ("", "tpu_pod"),
    "zone": ("", "tpu_pod"),
    "logs": ("logs", "slurm: a folder on a disk that all hosts share"),
    "restarts": (100, "times that a stopped or broken run is started again"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the verb."""
    parser.add_argument("where", choices=("gke", "slurm", "tpu_pod"))
    parser.add_argument("--config", required=True, help="file or paper, with :preset")
    parser.add_argument("--mesh", required=True, help="a file of configs/mesh, such as v5e_256")
    parser.add_argument("--topology", help="v5e:16x16, h200:8x8, ...; default: the mesh's")
    parser.add_argument("--name", help="of the job; default: that of the config")
    for name, (default, text) in _FIELDS.items():
        kind = int if isinstance(default, int) else str
        needed = default is None
        parser.add_argument(f"--{name}", type=kind, default=default, required=needed, help=text)
    parser.add_argument("--spot", action="store_true", help="machines that may be taken back")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")


def launch(options: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    """Print the files of a job (--dry-run), or write them to runs/launch/ and hand them over.

    Raises:
        ConfigError: the config, its mesh and the topology do not fit, or the scheduler refuses.
    """
    from jaxformer.config import load_config, load_mesh

    sizes, of_mesh = load_mesh(options.mesh)
    config = load_config(options.config, {**sizes, **overrides})  # mistakes show here, not there
    chosen = options.topology or of_mesh
    if chosen is None:
        raise ConfigError(f"launch: mesh {options.mesh} is for no topology; give --topology")
    from jaxformer.launchers.jobs import LAUNCHERS, Job

    stem = re.sub(r"\.py(?=:|$)", "", Path(options.config).name)
    job = Job(
        name=options.name or re.sub(r"[^a-z0-9]+", "-", stem.lower()),
        config=options.config,
        mesh=options.mesh,
        topology=chosen,
        sizes=config.mesh.to_dict(),
        arguments=tuple(f"--config.{field}={value}" for field, value in overrides.items()),
        spot=options.spot,
        **{name: getattr(options, name) for name in _FIELDS},
    )
    plan = LAUNCHERS[options.where](job)
    if options.dry_run:
        print(plan.text())
    else:
        plan.submit(Path("runs/launch") / job.name)
