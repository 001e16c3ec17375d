"""Checkpoints measured side by side, by their own evaluators and by exams."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxformer.errors import ConfigError
from jaxformer.evaluation.evaluators import select_steps
from jaxformer.evaluation.exams import Exam, Subject
from jaxformer.evaluation.report import figure, markdown_table
from jaxformer.interop.huggingface import is_folder
from jaxformer.recipe import Recipe
from jaxformer.storage.places import place
from jaxformer.tools.subject import open_subject
from jaxformer.train.checkpoint import saved_steps

Row = dict[str, Any]  # "checkpoint", "step", then {"evaluator/metric": value}


def evaluate(
    checkpoints: str | Path | Sequence[str | Path],
    *,
    steps: str = "last",
    exams: Sequence[Exam] = (),
    own: bool | None = None,
    recipe: Recipe | None = None,
    mesh: Mesh | None = None,
) -> list[Row]:
    """Measure checkpoints: runs of `fit` at the `steps` named, and Hugging Face folders.

    `steps` is "last", "all", "N" or "N:M". `own` runs the evaluators of a run's recipe too; by
    default, where there are no exams. A run that was not made from a config needs its `recipe`.
    Results do not depend on the size of batches or devices
    beyond rounding, and are the same each time.

    Raises:
        ConfigError: a checkpoint or a file of an exam cannot be read, or does not fit.
    """
    given = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints)
    return [
        measure(open_subject(path, step, mesh, recipe), exams, not exams if own is None else own)
        for path in given
        for step in _steps(path, steps)
    ]


def _steps(path: str | Path, which: str) -> Sequence[int | None]:
    return [None] if is_folder(path) else select_steps(saved_steps(path), which)


def measure(subject: Subject, exams: Sequence[Exam], own: bool) -> Row:
    """One row of results."""
    evaluators = list(subject.evaluators) if own else []
    if not evaluators and not exams:
        raise ConfigError(
            f"evaluate: {subject.name} has no evaluators of its own; name an exam (--text, "
            "--images, --choices, --few-shot)"
        )
    row: Row = {"checkpoint": subject.name, "step": subject.step}
    for exam in (*evaluators, *exams):
        row |= subject.take(exam)
    return row


def watch(
    workdir: str | Path,
    *,
    exams: Sequence[Exam] = (),
    own: bool | None = None,
    until: int | None = None,
    seconds: float = 10.0,
    mesh: Mesh | None = None,
    sleep: Callable[[float], object] = time.sleep,
) -> Iterator[Row]:
    """Measure each checkpoint of a run as the training job writes it, oldest first.

    A checkpoint that the job deletes before or while it is read is passed over. Ends once step
    `until` has been measured or passed; without it, never.
    """
    done: set[int] = set()
    while True:
        for step in sorted(set(_present(workdir)) - done):
            done.add(step)
            try:
                subject = open_subject(workdir, step, mesh)
            except Exception:
                if step in _present(workdir):
                    raise  # it is there and cannot be read
                continue
            yield measure(subject, exams, not exams if own is None else own)
        if until is not None and any(step >= until for step in done):
            return
        sleep(seconds)


def _present(workdir: str | Path) -> list[int]:
    """The steps saved now; none before the job has written any."""
    try:
        return saved_steps(workdir)
    except ConfigError:
        return []


def write_results(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """`evaluation.json`, `evaluation.md` and, where a run has several steps, `evaluation.png`."""
    folder = place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "evaluation.json"
    partial = page.with_suffix(".partial")  # a reader never sees half of it
    partial.write_text(json.dumps(list(rows), indent=2) + "\n")
    partial.replace(page)
    text = ["# Evaluation", "", markdown_table(rows), ""]
    written = [page, folder / "evaluation.md"]
    if len({row["step"] for row in rows}) > 1:
        written.append(plot(rows, folder / "evaluation.png"))
        text.append("![metrics over steps](evaluation.png)\n")
    written[1].write_text("\n".join(text))
    return written


def plot(rows: Sequence[Row], path: Path) -> Path:
    """A panel per metric: a line over steps for each run, a level for each folder."""
    names = list(dict.fromkeys(n for row in rows for n in row if "/" in n))
    columns = min(3, len(names))
    fig, axes = figure(path, columns, -(-len(names) // columns))
    for axis, name in itertools.zip_longest(axes.flat, names):
        if name is None:
            axis.remove()
            continue
        for i, checkpoint in enumerate(dict.fromkeys(row["checkpoint"] for row in rows)):
            mine = [r for r in rows if r["checkpoint"] == checkpoint and name in r]
            steps, values = [r["step"] for r in mine], [r[name] for r in mine]
            look = {"color": f"C{i}", "label": checkpoint}
            if steps == [0]:
                axis.axhline(values[0], linestyle="--", **look)
            elif mine:
                axis.plot(steps, values, marker="o", **look)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    fig.savefig(path, dpi=110)
    return path
