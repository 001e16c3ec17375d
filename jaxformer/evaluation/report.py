"""What a run leaves for people: tables, curves and `report.md`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from jaxformer.evaluation.goodput import goodput
from jaxformer.observe.metrics import read_jsonl
from jaxformer.recipe import Recipe
from jaxformer.storage.places import AnyPath, place

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
    return Path(os.path.relpath(path, folder)).as_posix()  # two paths of one kind


def figure(path: Path, columns: int = 1, rows: int = 1, width: float = 4.5) -> Any:
    """A matplotlib figure that needs no display: (figure, array of axes (rows, columns))."""
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure until it is closed

    path.parent.mkdir(parents=True, exist_ok=True)
    fig = Figure(figsize=(width * columns, 0.72 * width * rows), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False)


def accuracy_bars(path: Path, panels: Mapping[str, Mapping[str, float]], whole: float) -> Path:
    """A panel of named accuracies in percent for each title, beside that of the float model."""
    fig, axes = figure(path, len(panels), width=5)
    for axis, (title, named) in zip(axes.flat, panels.items(), strict=True):
        names = list(named)[::-1]
        bars = axis.barh(names, [named[name] for name in names])
        axis.bar_label(bars, fmt="%.1f", label_type="center", color="white")
        axis.axvline(whole, linestyle=":", color="k", label="float")
        axis.set(title=title, xlabel="accuracy %", xlim=(0, 112))
        axis.legend(loc="lower left")
    fig.savefig(path, dpi=110)
    return path


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


def plot_curves(workdir: epath.Path) -> epath.Path:
    """`curves.png`: a panel per metric, with the evaluators' values beside those of training."""
    found = curves(read_jsonl(workdir / "metrics.jsonl"))
    panels: dict[str, list[str]] = {"loss": []}
    for name in found:
        panels.setdefault(name.rpartition("/")[2], []).append(name)
    path = workdir / "curves.png"
    columns = min(3, len(panels))
    fig, axes = figure(path, columns, -(-len(panels) // columns))
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
        for name in names:
            marker = "o" if len(found[name][0]) < 12 else None
            axis.plot(*found[name], marker=marker, label=name.rpartition("/")[0] or "training")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend()
    with path.open("wb") as file:
        fig.savefig(file, dpi=110, format="png")
    return path


def training_report(
    recipe: Recipe,
    workdir: AnyPath,
    *,
    parameters: int,
    samples: Sequence[str] = (),
    pictures: Sequence[epath.Path] = (),
) -> epath.Path:
    """`report.md` with curves, evaluations, speed, samples and the config; returns its path.

    `pictures` are files of drawn examples, such as PNGs.
    """
    folder = place(workdir)
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
        "goodput": goodput(folder) or "",
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
    for picture in pictures:
        text += [f"![{picture.stem}]({relative(picture, folder)})", ""]
    text += ["## Config", "", "```json", json.dumps(recipe.config, indent=2), "```"]
    path = folder / "report.md"
    path.write_text("\n".join(text) + "\n")
    return path
