"""`jaxformer bench h200`: is it right, and how fast, on the accelerator of this machine.

Needs jax, flax, optax and numpy alone; PyTorch gives rows beside it where it is installed. Stages
run one by one, each within its time limit, and leave DIR/<stage>.json; DIR/report.md is made anew
from all that are there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxformer.bench.clock import Deadline
from jaxformer.bench.stage import Stage
from jaxformer.bench.targets import judge
from jaxformer.errors import ConfigError

MINUTES = 7.0  # of a stage; what runs when they are over may take one more


def _stages() -> dict[str, Callable[[Stage], None]]:
    from jaxformer.bench import linear, numerics, peak, softmax, training, tune

    return {
        "numerics": numerics.measure,
        "peak": peak.measure,
        "forward": lambda stage: softmax.measure_plain(stage, "forward"),
        "backward": lambda stage: softmax.measure_plain(stage, "backward"),
        "mods": softmax.measure_mods,
        "linear": linear.measure,
        "train": training.measure,
        "tune": tune.measure,
    }


def run(out: Path, stage: str = "all", *, minutes: float = MINUTES, tiny: bool = False) -> str:
    """Measure one stage, or all but `tune`, and return the report.

    tiny: the same program in miniature, for a machine without an accelerator; its figures mean
    nothing.
    """
    # JAX would take three quarters of the memory at once, and leave PyTorch too little.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    stages = _stages()
    if stage not in (*stages, "all"):
        raise ConfigError(f"--stage {stage}: allowed are {', '.join([*stages, 'all'])}")
    for name in [x for x in stages if x != "tune"] if stage == "all" else [stage]:
        deadline = Deadline.after(60 * minutes, 2 if tiny else 20)
        stages[name](Stage(name, out, deadline, tiny=tiny))
    text = report(out)
    (out / "report.md").write_text(text)
    return text


def report(out: Path) -> str:
    """Every stage that was measured in `out`, and the targets, in Markdown."""
    from jaxformer.evaluation.report import markdown_table

    found = {name: _load(out / f"{name}.json") for name in _stages()}
    measured = {name: stage for name, stage in found.items() if stage}
    tiny = [name for name, stage in measured.items() if stage["tiny"]]
    lines = ["# Measurements", ""]
    if tiny:
        lines += [f"In miniature, so that the figures mean nothing: {', '.join(tiny)}.", ""]
    rows = {name: stage["rows"] for name, stage in measured.items() if not stage["tiny"]}
    lines += ["## Targets", "", markdown_table(judge(rows)), ""]
    if "numerics" in rows:
        judged = [row for row in rows["numerics"] if "right" in row]
        wrong = [f"{row['case']} by {row['who']}" for row in judged if not row["right"]]
        lines += [f"Right: {len(judged) - len(wrong)} of {len(judged)} cases.", ""]
        lines += [f"Wrong: {', '.join(wrong)}.", ""] if wrong else []
    for name, stage in found.items():
        lines += [f"## {name}", ""]
        if not stage:
            lines += ["Not measured.", ""]
            continue
        lines += [_machine(stage), "", markdown_table(stage["rows"]), ""]
        if stage["left_out"]:
            lines += [f"Left out for want of time: {len(stage['left_out'])} cases.", ""]
            lines += [markdown_table(stage["left_out"]), ""]
    return "\n".join(lines)


def _machine(stage: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in stage["versions"].items())
    parts = [stage["date"], f"{stage['devices']} x {stage['device']}", versions]
    parts += [f"{name} {value}" for name, value in stage.get("nvidia", {}).items()]
    parts += [f"ptxas {stage['ptxas']}"] if "ptxas" in stage else []
    return "; ".join(parts)


def _load(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.exists() else None
