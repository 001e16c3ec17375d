"""What a run leaves for people: tables, curves and `report.md`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxformer.recipe import Recipe
from jaxformer.train.metrics import read_jsonl

_NOT_CURVES = ("step", "phase", "nonfinite", "steps_per_second", "items_per_second")


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; columns in order of first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(c, "")) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows in aligned columns for a terminal."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([_cell(row.get(c, "")) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def relative(path: Path, folder: Path) -> str:
    """A link from a file in `folder` to `path`."""
    return Path(os.path.relpath(path, folder)).as_posix()


def figure(path: Path, width: float = 6.0, height: float = 4.0, columns: int = 1) -> Any:
    """A matplotlib figure with `columns` axes that needs no display, as (figure, axes)."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    return plt.subplots(1, columns, figsize=(width * columns, height), layout="constrained")


def curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """{metric: (steps, values)} of a metrics file."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in _NOT_CURVES and isinstance(value, int | float):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return found


def plot_curves(workdir: Path) -> Path:
    """`curves.png`: training loss with the evaluators' losses over it, then all other metrics."""
    found = curves(read_jsonl(workdir / "metrics.jsonl"))
    with_loss = [name for name in found if name == "loss" or name.endswith("/loss")]
    others = [name for name in found if name not in with_loss]
    path = workdir / "curves.png"
    fig, axes = figure(path, 4.5, 3.2, 1 + len(others))
    axes = [axes] if not others else list(axes)
    for name in with_loss:
        axes[0].plot(*found[name], marker="o" if len(found[name][0]) < 12 else None, label=name)
    axes[0].legend()
    for axis, name in zip(axes[1:], others, strict=True):
        axis.plot(*found[name], marker="o" if len(found[name][0]) < 12 else None)
        axis.set_title(name)
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].set_title("loss")
    fig.savefig(path, dpi=110)
    return path


def training_report(
    recipe: Recipe,
    workdir: str | Path,
    *,
    parameters: int,
    samples: Sequence[str] = (),
) -> Path:
    """`report.md` with curves, evaluations, speed, samples and the config; returns its path."""
    folder = Path(workdir)
    rows = read_jsonl(folder / "metrics.jsonl")
    speeds = [row["items_per_second"] for row in rows if "items_per_second" in row]
    evaluations = [
        {k: v for k, v in row.items() if k != "phase"} for row in rows if any("/" in k for k in row)
    ]
    last = next((row for row in reversed(rows) if "loss" in row), {})
    phases = ", ".join(f"{phase.name} ({phase.steps} steps)" for phase in recipe.phases)
    facts = {
        "paper": recipe.config.get("paper", ""),
        "parameters": f"{parameters:,}",
        "phases": phases,
        "last training loss": last.get("loss", ""),
        f"{recipe.unit}/s (median)": sorted(speeds)[len(speeds) // 2] if speeds else "",
        "steps that were not finite": sum(row.get("nonfinite", 0) > 0 for row in rows),
    }
    text = [f"# {facts['paper']}", ""]
    text += [markdown_table([{"": k, "value": v} for k, v in facts.items()]), ""]
    text += [f"![curves]({relative(plot_curves(folder), folder)})", ""]
    if evaluations:
        text += ["## Evaluations", "", markdown_table(evaluations), ""]
    for sample in samples:
        fence = "````"
        text += ["## Sample", "", fence, sample, fence, ""]
    text += ["## Config", "", "```json", json.dumps(recipe.config, indent=2), "```"]
    path = folder / "report.md"
    path.write_text("\n".join(text) + "\n")
    return path
