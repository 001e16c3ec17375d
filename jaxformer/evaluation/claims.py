"""Claims: the experiments behind a paper's statements, run and judged."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxformer.evaluation.report import markdown_table, relative
from jaxformer.recipe import Claim, Findings, Recipe, TrainState
from jaxformer.train.fit import FitOptions, fit


@dataclasses.dataclass(frozen=True)
class Lab:
    """Where the experiments of a paper's claims run: a seed, a folder and the shared loop."""

    load: Callable[..., Recipe]  # `jaxformer.load`
    paper: str
    workdir: Path
    seed: int = 0
    preset: str = "small"
    progress: bool = True

    def recipe(self, **overrides: Any) -> Recipe:
        """The paper's recipe at this lab's preset and seed; overrides as `model__width=256`."""
        return self.load(f"{self.paper}:{self.preset}", **{"seed": self.seed, **overrides})

    def fit(self, recipe: Recipe) -> TrainState:
        """Train without checkpoints: an experiment is short and is repeated whole."""
        options = FitOptions(seed=self.seed, progress=self.progress)
        return fit(recipe, options=options)

    def members(self, count: int) -> list[Lab]:
        """As many labs, with seeds that no other seed's members have: for means over trainings."""
        return [dataclasses.replace(self, seed=count * self.seed + i) for i in range(count)]

    def figure(self, name: str) -> Path:
        """The file for a figure."""
        self.workdir.mkdir(parents=True, exist_ok=True)
        return self.workdir / f"{name}.png"


def over(
    members: Sequence[Mapping[str, float]], statistic: Callable[..., Any] = np.mean
) -> dict[str, float]:
    """A statistic over members of each of their numbers."""
    return {name: float(statistic([one[name] for one in members])) for name in members[0]}


def run_claims(claims: Sequence[Claim], lab: Lab) -> bool:
    """Measure claims; write `result.json`, `report.md` and figures; return whether all hold."""
    lab.workdir.mkdir(parents=True, exist_ok=True)
    found: dict[Any, Findings] = {}
    rows = []
    for claim in claims:
        if claim.experiment not in found:
            found[claim.experiment] = claim.experiment(lab)
        value = float(found[claim.experiment].values[claim.value])
        rows.append({"claim": claim, "value": value, "met": claim.met(value)})
    _write(lab, rows, list(found.values()))
    return all(row["met"] for row in rows)


def _limit(claim: Claim) -> str:
    return f">= {claim.at_least:g}" if claim.at_least is not None else f"<= {claim.at_most:g}"


def _write(lab: Lab, rows: Sequence[Mapping[str, Any]], findings: Sequence[Findings]) -> None:
    folder = lab.workdir
    table = [
        {
            "claim": row["claim"].says,
            "source": row["claim"].source,
            "measured": row["value"],
            "required": _limit(row["claim"]),
            "baseline": row["claim"].baseline,
            "met": "yes" if row["met"] else "NO",
        }
        for row in rows
    ]
    values = {name: float(value) for f in findings for name, value in f.values.items()}
    result = {
        "paper": lab.paper,
        "seed": lab.seed,
        "met": all(row["met"] for row in rows),
        "claims": table,
        "values": values,
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    text = [f"# {lab.paper}: claims, seed {lab.seed}", "", markdown_table(table), ""]
    for finding in findings:
        for name, part in finding.tables.items():
            text += [f"## {name}", "", markdown_table(part), ""]
        text += [f"![{path.stem}]({relative(path, folder)})\n" for path in finding.figures]
    text += [
        "## All values",
        "",
        markdown_table([{"name": k, "value": v} for k, v in values.items()]),
    ]
    (folder / "report.md").write_text("\n".join(text) + "\n")
