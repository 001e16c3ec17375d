"""What the figures were measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "nvidia-cudnn-cu13", "libtpu")
QUERY = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "temperature.gpu",
)


def describe() -> dict[str, Any]:
    """Date, device, versions, and on NVIDIA the driver, clocks and the compiler of kernels."""
    device = jax.devices()[0]
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "python": platform.python_version(),
        "versions": versions,
    }
    smi = _output("nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader")
    if smi:
        values = smi.splitlines()[0].split(",")
        found["nvidia"] = {name: x.strip() for name, x in zip(QUERY, values, strict=False)}
    version = re.search(r"V\d+\.\d+\.\d+", _output(_ptxas(), "--version"))
    if version:
        found["ptxas"] = version[0]
    return found


def _output(program: str | None, *arguments: str) -> str:
    if program is None or shutil.which(program) is None:
        return ""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30)
    return done.stdout if done.returncode == 0 else ""


def _ptxas() -> str | None:
    """The one that comes with jax's CUDA wheels, else the system's."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(root).glob("*/bin/ptxas")):
            return str(path)
    return shutil.which("ptxas")
