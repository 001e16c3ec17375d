"""The experiments behind the claims."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxformer import paths
from jaxformer.data.sources.topics import Topics
from jaxformer.evaluation import few_shot
from jaxformer.evaluation.claims import Lab
from jaxformer.evaluation.few_shot import FewShot, Prompts
from jaxformer.evaluation.in_context import (
    DESCENTS,
    Descent,
    Training,
    best,
    in_context,
    measured,
    trained,
)
from jaxformer.evaluation.report import figure
from jaxformer.nn.descent import descent_answer, descent_layer, descent_tokens, descent_weights
from jaxformer.papers.icl_vs_gd.model import VALUES, few_shot_task, seen
from jaxformer.papers.icl_vs_gd.recipe import stream_of
from jaxformer.recipe import Claim, EvalContext, Findings, Params, Recipe, TrainState

N, ORDERS = 8, 10
TASKS, MORE = 4, 32  # mappings: compared in all orders; more of them in one
TRAINING = Training(epochs=40, every=5)
RATES: Mapping[str, Sequence[float]] = {
    "sgd": (0.01, 0.03, 0.1, 0.3),
    "adam": (3e-4, 1e-3, 3e-3),
}
K = 10


@dataclasses.dataclass(frozen=True)
class Emergence:
    """Recall in context as pretraining goes, and how far the weights are from the last time."""

    recipe: Recipe
    tasks: Sequence[FewShot]
    every: int
    name: str = "emergence"
    rows: list[dict[str, float]] = dataclasses.field(default_factory=list, compare=False)
    last: list[Params] = dataclasses.field(default_factory=list, compare=False)

    def __call__(self, state: TrainState, context: EvalContext) -> dict[str, float]:
        del context
        params = jax.device_get(state.params)
        recalled = Study(self.recipe.task, params, state.extra).accuracies(self.tasks)
        moved = 0.0
        if self.last:
            before, after = paths.leaves(self.last.pop()), paths.leaves(params)
            size = sum(x.size for x in after.values())
            moved = sum(np.abs(after[name] - before[name]).sum() for name in after) / size
        self.last.append(params)
        found = {**recalled, "moved": float(moved)}
        self.rows.append({"step": int(state.step), **found})
        return found


def together(prompts: Sequence[Prompts]) -> Prompts:
    """Prompts of one length, one after another."""
    return Prompts(*map(np.concatenate, zip(*prompts, strict=True)))


def demonstrated(few: Sequence[FewShot]) -> np.ndarray:
    """Which queries the demonstrations are, (T, N): what can be answered, and is compared."""
    return np.array([[shot.prompt[0] for shot in task.demonstrations] for task in few])


def stacked(prompts: Sequence[Prompts]) -> Prompts:
    return Prompts(*map(np.stack, zip(*prompts, strict=True)))


@functools.lru_cache(maxsize=1)
def read(task: Any) -> Any:
    """Answers of parameters, extra variables and prompts; compiled once for each shape."""
    return jax.jit(lambda params, extra, prompts: few_shot.answers(task, params, extra, prompts))


def comparing(lab: Lab) -> Findings:
    """A language model is trained; then it reads demonstrations, and is trained on them."""
    recipe = lab.recipe()
    stream = stream_of(ConfigDict(recipe.config))
    key = jax.random.key(lab.seed)
    keys = jax.random.split(key, TASKS + MORE)
    tasks = [few_shot_task(stream, N, key) for key in keys]
    watch = Emergence(recipe, tasks[TASKS:], max(recipe.steps // 10, 1))
    state = lab.fit(dataclasses.replace(recipe, evaluators=[watch]))
    lm = Study(recipe.task, state.params, state.extra)
    few, turns = tasks[:TASKS], few_shot.orders(ORDERS, N, lab.seed)

    p_icl, p_zero = lm.contexts(few, turns)
    labels = jnp.asarray(np.stack([task.labels for task in few]))
    asked = jnp.asarray(demonstrated(few))
    icl = mean(
        jax.vmap(lambda p, q, y, i: in_context(p[:, i], q[i], y[i], K))(
            p_icl, p_zero, labels, asked
        )
    )
    icl["sensitivity, all x"] = jax.vmap(few_shot.sensitivity)(p_icl).mean()
    wide = lm.accuracies(tasks[TASKS:])
    depth = recipe.config["model"]["depth"]
    parts = {f"W_V of layer {i}": Descent(trains=VALUES.format(i)) for i in range(depth)}
    curves = {
        name: lm.descents(few, turns, p_icl, labels, descent, rates_of(descent))
        for name, descent in {**DESCENTS, **parts}.items()
    }
    chosen = {
        name: best(rates_of({**DESCENTS, **parts}[name]), TRAINING, found)
        for name, found in curves.items()
    }
    closest = {name: float(found["overlap"][:, 1:].max()) for name, found in curves.items()}
    whole = list(DESCENTS)
    values = {
        **{f"icl_{name}": float(x) for name, x in icl.items()},
        "recall": wide["seen"],
        "unseen": wide["unseen"],
        "icl_gain": wide["accuracy"] - wide["zero_shot"],
        "sensitivity_ratio": float(icl["sensitivity"]) / max(sensitivity(chosen["batch 1"]), 1e-9),
        "sensitivity_ratio_any": float(icl["sensitivity"])
        / max(float(curves["batch 1"]["sensitivity"].max()), 1e-9),
        "full_batch_sensitivity": max(curves["full batch"]["sensitivity"].ravel().tolist()),
        "overlap_gap": float(icl["overlap"]) - max(chosen[n].found["overlap"] for n in whole),
        "overlap_gap_any": float(icl["overlap"]) - max(closest[name] for name in whole),
        **constructed(lab.seed),
    }
    sparse, values["sparsity"] = sparsities(state.params, recipe.config["model"]["width"])
    rows = [
        {
            "descent": name,
            "rate": choice.rate,
            "epochs": choice.epoch,
            **choice.found,
            "closest overlap": closest[name],
        }
        for name, choice in chosen.items()
    ]
    tables = {
        "In context": [{**{name: float(x) for name, x in icl.items()}}],
        "Descent, at the rate and epoch of the best accuracy": rows,
        "Accuracy by demonstrations": [
            lm.by_demonstrations(stream, n, keys[TASKS:], chosen["full batch"].rate)
            for n in (1, 2, 4, 8)
        ],
        "Pretraining": watch.rows,
        "Share of weights that are small": sparse,
    }
    return Findings(values, tables, [draw(lab, icl, curves, chosen, watch.rows)])


def sensitivity(choice: Any) -> float:
    return float(choice.found["sensitivity"])


def mean(found: Mapping[str, Any]) -> dict[str, Any]:
    """Over tasks, the first axis."""
    return {name: np.asarray(x).mean(0) for name, x in found.items()}


def rates_of(descent: Descent) -> Sequence[float]:
    return RATES[descent.optimizer]


@dataclasses.dataclass(frozen=True)
class Study:
    """A trained language model, asked about several few-shot tasks of one size at once."""

    task: Any
    params: Params
    extra: Any

    def contexts(self, few: Sequence[FewShot], turns: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Answers in context (T, R, Q, V), and those without demonstrations (T, Q, V)."""
        ask = read(self.task)
        rows = together([task.prompts(turn) for task in few for turn in turns])
        p = ask(self.params, self.extra, rows)
        zero = ask(self.params, self.extra, together([task.prompts(()) for task in few]))
        shape = (len(few[0].queries), p.shape[-1])
        return p.reshape(len(few), len(turns), *shape), zero.reshape(len(few), *shape)

    def accuracies(self, few: Sequence[FewShot]) -> dict[str, float]:
        """In context, of words that were demonstrated and others; and without demonstrations."""
        turns = np.arange(len(few[0].demonstrations))[None]
        p_icl, p_zero = self.contexts(few, turns)
        labels = np.stack([task.labels for task in few])
        right, guessed = (np.asarray(p.argmax(-1)) == labels for p in (p_icl[:, 0], p_zero))
        shown = np.stack([seen(task) for task in few])
        unseen = right[~shown]
        return {
            "seen": float(right[shown].mean()),
            "unseen": float(unseen.mean()) if unseen.size else float("nan"),
            "accuracy": float(right.mean()),
            "zero_shot": float(guessed.mean()),
        }

    def descents(
        self,
        few: Sequence[FewShot],
        turns: np.ndarray,
        p_icl: jax.Array,
        labels: jax.Array,
        descent: Descent,
        rates: Sequence[float],
    ) -> dict[str, np.ndarray]:
        """{measure: (rates, C)}, means over tasks, each trained on in all orders."""
        examples = jax.tree.map(lambda *x: np.stack(x), *[dict(task.examples()) for task in few])
        zeros = stacked([task.prompts(()) for task in few])

        @jax.jit
        def run(params: Params, extra: Any, rate: Any, given: Any) -> Any:
            def one(examples: Any, zero: Prompts, asked: Any, p_icl: Any, labels: Any) -> Any:
                def along(turn: jax.Array) -> jax.Array:
                    return trained(
                        self.task, params, extra, examples, zero, turn, rate, descent, TRAINING
                    )

                p = jax.vmap(along)(jnp.asarray(turns))
                found = measured(p_icl[:, asked], p[:, :, asked], labels[asked], K)
                return found | {"sensitivity, all x": jax.vmap(few_shot.sensitivity, 1)(p)}

            return jax.vmap(one)(*given)

        given = examples, zeros, demonstrated(few), p_icl, labels
        found = [mean(run(self.params, self.extra, rate, given)) for rate in rates]
        return {name: np.stack([each[name] for each in found]) for name in found[0]}

    def by_demonstrations(self, stream: Topics, n: int, keys: Any, rate: float) -> dict[str, float]:
        """Accuracy of N demonstrations: in context, without them, and after full-batch descent."""
        few = [few_shot_task(stream, n, key) for key in keys]
        turns = np.arange(n)[None]
        p_icl, _ = self.contexts(few, turns)
        labels = jnp.asarray(np.stack([task.labels for task in few]))
        found = self.descents(few, turns, p_icl, labels, Descent(), (rate,))
        descended = float(found["accuracy"][0, 1:].max())
        return {"N": n, **self.accuracies(few), "descent": descended}


def constructed(seed: int) -> dict[str, float]:
    """The layer that is a step of descent: how far from one, and how sensitive to the order."""
    dx, dy, eta = 4, 2, 0.3
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(N, dx), (N, dy), (dx,), (dy, dx)]
    x, y, x_q, W_0 = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))

    def layer(turn: jax.Array) -> jax.Array:
        tokens = descent_tokens(x[turn], y[turn], x_q, W_0)
        return descent_answer(descent_layer(descent_weights(W_0, eta, N), tokens), dy)

    def descent(turn: jax.Array) -> jax.Array:
        gradient = jax.grad(lambda W: jnp.sum((x[turn] @ W.T - y[turn]) ** 2) / (2 * N))
        return (W_0 - eta * gradient(W_0)) @ x_q

    turns = jnp.asarray(few_shot.orders(ORDERS, N, seed))
    by_layer, by_descent = (jax.jit(jax.vmap(f))(turns) for f in (layer, descent))
    return {
        "constructed_difference": float(jnp.abs(by_layer - by_descent).max()),
        "constructed_sensitivity": float(few_shot.sensitivity(by_layer[:, None])),
    }


def sparsities(params: Params, width: int) -> tuple[list[dict[str, Any]], float]:
    """Shares of weights below each delta, beside the construction of that width.

    The second is how much smaller the trained share is than the constructed, at 1e-3, where the
    three matrices differ least.
    """
    half = width // 2
    built = descent_weights(0.1 * jax.random.normal(jax.random.key(0), (half, half)), 0.1, N)
    rows, gaps = [], []
    for letter, name in {"W_Q": "query", "W_K": "key", "W_V": "value"}.items():
        real = few_shot.sparsity(params, rf"{name}/kernel$")
        by_hand = few_shot.sparsity(built, letter)
        for model, found in {"trained": real, "constructed": by_hand}.items():
            row = {f"below {delta:g}": share for delta, share in found.items()}
            rows.append({"model": model, "matrix": letter, **row})
        gaps.append(by_hand[1e-3] - real[1e-3])
    return rows, min(gaps)


def draw(lab: Lab, icl: Any, curves: Any, chosen: Any, emergence: Any) -> Any:
    """Accuracy, sensitivity and overlap along descent, and accuracy along pretraining."""
    path = lab.figure("icl_vs_gd")
    fig, axes = figure(path, 4, width=3.8)
    for axis, name in zip(axes[0], ("accuracy", "sensitivity", "overlap"), strict=False):
        for kind, found in curves.items():
            rate = list(rates_of(kind_of(kind))).index(chosen[kind].rate)
            values = found[name][rate]
            axis.plot(TRAINING.moments, values, ":" if "W_V" in kind else "-", label=kind)
        axis.axhline(icl[name], color="k", linestyle="--", label="in context")
        axis.set(title=name, xlabel="epoch of descent")
        axis.grid(alpha=0.3)
    axes[0, 1].set_yscale("symlog", linthresh=1e-3)
    axes[0, 1].set_ylim(bottom=0)
    axes[0, 0].legend(fontsize=7, loc="lower right")
    for name in ("seen", "unseen", "zero_shot"):
        axes[0, 3].plot([r["step"] for r in emergence], [r[name] for r in emergence], label=name)
    axes[0, 3].set(title="accuracy in context", xlabel="step of pretraining", ylim=(0, 1.05))
    axes[0, 3].legend(fontsize=7)
    axes[0, 3].grid(alpha=0.3)
    fig.savefig(path, dpi=110)
    return path


def kind_of(name: str) -> Descent:
    return DESCENTS.get(name, Descent())


def claim(says: str, source: str, value: str, baseline: str, **limit: float) -> Claim:
    return Claim(says, source, comparing, value, baseline=baseline, **limit)


CLAIMS = (
    claim(
        "A language model that no few-shot task was trained on answers from 8 demonstrations "
        "(accuracy above zero-shot).",
        "section 5",
        "icl_gain",
        "the same model without demonstrations",
        at_least=0.3,
    ),
    claim(
        "Its answers depend on their order more than those of descent, one at a time (ratio).",
        "section 4, figure 3",
        "sensitivity_ratio",
        "SGD, batch 1, at its best rate",
        at_least=2.0,
    ),
    claim(
        "Descent on all at once does not depend on it (sensitivity, at any rate and epoch).",
        "section 4",
        "full_batch_sensitivity",
        "answers in context",
        at_most=1e-4,
    ),
    claim(
        "The likeliest words after descent are other ones (overlap of two orders in context, "
        "above that with the closest descent at its best accuracy).",
        "section 5, figure 5",
        "overlap_gap",
        "in context, in another order",
        at_least=0.1,
    ),
    claim(
        "The layer constructed by hand is descent (largest difference).",
        "section 3.1, von Oswald et al.",
        "constructed_difference",
        "answers of one step",
        at_most=1e-5,
    ),
    claim(
        "And does not depend on the order (sensitivity).",
        "section 4, theorem",
        "constructed_sensitivity",
        "answers in context",
        at_most=1e-5,
    ),
    claim(
        "Its matrices are mostly zeros, those of the trained model are not (difference of the "
        "shares below 1e-3).",
        "section 3.2, figure 2",
        "sparsity",
        "the trained model",
        at_least=0.3,
    ),
)
