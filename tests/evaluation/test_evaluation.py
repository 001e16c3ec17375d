"""Evaluators, claims, reports and FLOPs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.analyze.flops import count
from jaxformer.analyze.summary import describe
from jaxformer.data.base import Arrays, Epoch
from jaxformer.evaluation.claims import Lab, over, run_claims
from jaxformer.evaluation.evaluators import MeanEvaluator, select_steps
from jaxformer.evaluation.report import markdown_table, text_table, training_report
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import Claim, ConfigError, EvalContext, Findings, LossOutput, Mean
from jaxformer.tools.evaluate import evaluate
from jaxformer.train.fit import FitOptions, fit
from jaxformer.train.states import initialise
from tests.train.problem import phase, recipe


@dataclasses.dataclass(frozen=True)
class Average:
    """The loss is the weighted mean of the batch's x, so its exact value is known."""

    def init(self, key, batch):
        return {"w": jnp.ones(())}, {}

    def loss(self, params, extra, batch, *, key, train):
        mean = Mean.of(params["w"] * batch["x"], batch["weight"])
        return LossOutput(mean.value(), mean.weight, {"x": mean}, extra)


def test_means_are_exact_on_any_mesh_and_with_padding(one_device):
    x = np.arange(21, dtype=np.float32)
    evaluator = MeanEvaluator(
        Average(), Epoch(Arrays({"x": x}), 8), derived={"twice": lambda v: 2 * v["x"]}
    )
    for mesh in (one_device, make_mesh({"data": 8})):
        r = dataclasses.replace(recipe(), task=Average())
        with jax.set_mesh(mesh):
            state = initialise(r, mesh, 0)
            found = evaluator(state, EvalContext(mesh, "train"))
        assert found == {"loss": 10.0, "x": 10.0, "twice": 20.0}


def test_steps_are_chosen_as_named():
    saved = [5, 10, 15, 20]
    assert select_steps(saved, "last") == [20] and select_steps(saved, "all") == saved
    assert select_steps(saved, "10") == [10] and select_steps(saved, "7:15") == [10, 15]
    assert select_steps(saved, ":10") == [5, 10] and select_steps(saved, "12:") == [15, 20]
    for wrong, said in (("6", "names no checkpoint; saved: 5, 10"), ("x", "last, all, N or N:M")):
        with pytest.raises(ConfigError, match=said):
            select_steps(saved, wrong)


def test_saved_steps_are_evaluated(one_device, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Bias:
        name: str = "first"
        every: str = "end"

        def __call__(self, state, context):
            return {"bias": float(state.params["first"]["bias"][0]), "step": int(state.step)}

    r = recipe(phase("train", 6), evaluators=[Bias()])
    options = FitOptions(progress=False, checkpoint_every=2, keep=None)
    fit(r, workdir=tmp_path, mesh=one_device, options=options)
    found = evaluate(tmp_path, steps="2:6", recipe=r, mesh=one_device)
    assert [row["step"] for row in found] == [row["first/step"] for row in found] == [2, 4, 6]
    assert len({row["first/bias"] for row in found}) == 3
    assert [row["step"] for row in evaluate(tmp_path, recipe=r, mesh=one_device)] == [6]


def test_claims_are_judged_and_share_experiments(tmp_path):
    runs = []

    def experiment(lab):
        runs.append(lab.seed)
        return Findings({"a": 0.5, "b": float("nan")}, {"Table": [{"x": 1, "y": 2.0}]})

    claims = [
        Claim("a is large", "section 1", experiment, "a", at_least=0.4, baseline="0.3"),
        Claim("a is small", "section 2", experiment, "a", at_most=0.4),
        Claim("b is anything", "section 3", experiment, "b", at_most=9.0),
    ]
    lab = Lab(lambda spec: None, "paper", tmp_path, seed=7)
    assert run_claims(claims[:1], lab) and not run_claims(claims, lab)
    assert runs == [7, 7]
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["met"] for row in result["claims"]] == ["yes", "NO", "NO"]
    report = (tmp_path / "report.md").read_text()
    assert (
        "| a is large | section 1 | 0.5 | >= 0.4 | 0.3 | yes |" in report and "## Table" in report
    )
    with pytest.raises(ConfigError, match="exactly one of at_least, at_most"):
        Claim("x", "y", experiment, "a")


def test_reports_show_what_happened(one_device, tmp_path):
    r = recipe(phase("train", 12))
    fit(r, workdir=tmp_path, mesh=one_device, options=FitOptions(progress=False, log_every=4))
    path = training_report(r, tmp_path, parameters=20, samples=["a sample"])
    text = path.read_text()
    assert "train (12 steps)" in text and "a sample" in text and "| parameters | 20 |" in text
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_tables():
    rows = [{"a": 1, "b": 0.123456789}, {"a": "x", "c": True}]
    assert markdown_table(rows).splitlines()[2] == "| 1 | 0.12346 |  |"
    assert text_table(rows).splitlines()[1] == "1  0.12346"


def test_flops_count_loops_and_branches():
    w = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    x = jax.ShapeDtypeStruct((8, 32), jnp.float32)
    one = 2 * 8 * 32 * 32
    assert count(lambda x, w: x @ w, x, w) == one
    scanned = lambda x, w: jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=5)[0]
    assert count(scanned, x, w) == 5 * one
    assert count(jax.grad(lambda x, w: (x @ w).sum(), argnums=(0, 1)), x, w) == 3 * one
    assert count(jax.jit(jax.checkpoint(lambda x, w: x @ w)), x, w) == one
    branch = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)
    assert count(branch, x, w) == 2 * one
    image, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 3, 8, 8), (5, 3, 3, 3)))
    conv = lambda i, k: jax.lax.conv_general_dilated(i, k, (1, 1), "SAME")
    assert count(conv, image, kernel) == 2 * 64 * 5 * 27


def test_a_recipe_is_described(one_device):
    text = describe(recipe(phase("train", 12)), one_device)
    assert "first/kernel" in text and "GFLOP/step" in text and "20 parameters" in text
    assert "temporary MiB/device" in text


def test_a_mean_is_over_trainings_that_no_other_seed_has(tmp_path):
    labs = [Lab(lambda spec: None, "paper", tmp_path, seed=seed) for seed in range(3)]
    seeds = [member.seed for lab in labs for member in lab.members(4)]
    assert len(set(seeds)) == 12 and labs[2].members(1)[0].seed == 2
    rows = [{"a": 1.0, "b": 0.0}, {"a": 3.0, "b": 0.0}]
    assert over(rows) == {"a": 2.0, "b": 0.0}
    assert over(rows, np.std) == {"a": 1.0, "b": 0.0}
