"""In-context regression by sweeps, `jaxformer bench regressions`: 20 configurations, 5 seeds."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import numpy as np

from jaxformer.config import load_config
from jaxformer.papers import linear_icl
from jaxformer.papers.linear_icl import model
from jaxformer.recipe import Recipe
from jaxformer.train.fit import FitOptions, fit
from jaxformer.train.sweep import Sweep

LENGTHS = (5, 10, 20, 40)  # of prompts: shapes, so a sweep of its own for each
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SEEDS = 5


def bench_regressions(steps: int = 300, prompts: int = 512) -> list[dict[str, Any]]:
    """What each sweep of 25 linear layers takes, and how near its best rate comes to the minimum.

    The excess is that of the exact loss over its minimum, the mean of all seeds.
    """
    rows: list[dict[str, Any]] = []
    for N in LENGTHS:
        make = functools.partial(_recipe, N, steps, prompts)
        sweep = Sweep.grid(make, range(SEEDS), learning_rate=RATES)
        start = time.perf_counter()
        state = fit(sweep.recipe, options=FitOptions(progress=False))
        seconds = time.perf_counter() - start
        task = make(RATES[0]).task
        exact = model.PopulationRegression(task.Lambda[None], N, task.sigma)
        loss = np.asarray(jax.jit(jax.vmap(exact.population))(state.params))
        excess = (
            loss.reshape(len(RATES), SEEDS).mean(1) / float(exact.population(exact.limit())) - 1
        )
        best = int(excess.argmin())
        row = {"N": N, "members": len(loss), "seconds": seconds}
        rows.append(row | {"best rate": RATES[best], "excess": float(excess[best])})
    total = {"N": "all", "members": sum(row["members"] for row in rows)}
    return [*rows, total | {"seconds": sum(row["seconds"] for row in rows)}]


def _recipe(N: int, steps: int, prompts: int, learning_rate: float) -> Recipe:
    fields = {"data.N": N, "steps": steps, "batch_size": prompts}
    fields["optim.learning_rate"] = learning_rate
    return linear_icl.build(load_config("linear_icl:small", fields))
