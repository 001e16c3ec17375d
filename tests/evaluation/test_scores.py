"""Scores of whole test sets: gathered from batches on any mesh, and SQuAD's by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.data.base import Arrays, Epoch
from jaxformer.data.sources import glue
from jaxformer.evaluation import spans
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.evaluation.scores import SCORES, Scores
from jaxformer.evaluation.spans import SpanScores, best_spans
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import EvalContext, LossOutput, Mean
from jaxformer.train.states import initialise
from tests.train.problem import recipe


@dataclasses.dataclass(frozen=True)
class Given:
    """Answers with the column "logits", whatever its parameter."""

    def init(self, key, batch):
        return {"w": jnp.ones(())}, {}

    def loss(self, params, extra, batch, *, key, train):
        mean = Mean.of(params["w"] * jnp.ones(len(batch["label"])), batch["weight"])
        return LossOutput(mean.value(), mean.weight, {}, extra)

    def predict(self, params, extra, batch, *, key):
        return params["w"] * batch["logits"]


def measured(mesh, whole, **columns):
    """Of 21 rows in batches of 8: the last is filled up with repeated rows of no weight."""
    evaluator = MeanEvaluator(Given(), Epoch(Arrays(columns), 8), whole=whole)
    with jax.set_mesh(mesh):
        state = initialise(dataclasses.replace(recipe(), task=Given()), mesh, 0)
        return evaluator(state, EvalContext(mesh, "train"))


def test_scores_are_of_all_rows_once_on_any_mesh(one_device):
    rng = np.random.default_rng(0)
    label, answer = rng.integers(0, 2, 21), rng.integers(0, 2, 21)
    label[:8] = 0  # a batch without the class: a mean of batches is far from the whole
    logits = np.eye(2, dtype=np.float32)[answer]
    hits = int((label & answer).sum())
    misses, false = int((label & ~answer & 1).sum()), int((~label & 1 & answer).sum())
    f1 = 2 * hits / (2 * hits + misses + false)
    matthews = np.corrcoef(label, answer)[0, 1]
    batches = [slice(0, 8), slice(8, 16), slice(16, 21)]
    means = np.mean([SCORES["f1"](logits[i], label[i]) for i in batches])
    assert abs(means - f1) > 0.05
    for mesh in (one_device, make_mesh({"data": 8})):
        found = measured(mesh, Scores(("f1", "matthews")), logits=logits, label=label)
        assert found["loss"] == 1.0
        np.testing.assert_allclose([found["f1"], found["matthews"]], [f1, matthews], rtol=1e-6)


def test_rows_keep_their_order_and_come_once(one_device):
    seen = {}

    @dataclasses.dataclass(frozen=True)
    class Look:
        columns: tuple = ("label", "logits")

        def __call__(self, rows):
            seen.update(rows)
            return {"rows": len(rows["label"])}

    logits = np.arange(42, dtype=np.float32).reshape(21, 2)
    found = measured(make_mesh({"data": 8}), Look(), logits=logits, label=np.arange(21))
    assert found["rows"] == 21 and set(seen) == {"answer", "label", "logits"}
    np.testing.assert_array_equal(seen["label"], np.arange(21))
    np.testing.assert_array_equal(seen["answer"], logits)


def test_correlations_by_hand():
    """Ranks with a tie: x 1 2.5 2.5 4, y 1 2 3 4."""
    answer, label = np.array([[1.0], [2], [2], [9]]), np.array([0.0, 1, 2, 3])
    x, y = answer[:, 0] - 3.5, label - 1.5
    pearson = (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())
    ranks = np.array([1, 2.5, 2.5, 4]) - 2.5
    spearman = (ranks * y).sum() / np.sqrt((ranks**2).sum() * (y**2).sum())
    np.testing.assert_allclose(SCORES["pearson"](answer, label), pearson)
    np.testing.assert_allclose(SCORES["spearman"](answer, label), spearman)
    for name in ("pearson", "spearman"):
        assert SCORES[name](np.ones((4, 1)), label) == 0.0


def test_a_class_that_is_never_found_scores_nothing():
    logits, label = np.eye(2)[[0, 0, 0]], np.array([0, 1, 1])
    assert SCORES["f1"](logits, label) == 0.0 and SCORES["matthews"](logits, label) == 0.0


def test_every_task_of_glue_is_judged_as_the_benchmark_does():
    expected = dict.fromkeys(glue.TASKS, ("accuracy",)) | {
        "cola": ("matthews",),
        "sts-b": ("pearson", "spearman"),
        "mrpc": ("accuracy", "f1"),
        "qqp": ("accuracy", "f1"),
    }
    assert {name: task.scores for name, task in glue.TASKS.items()} == expected
    assert {name for task in glue.TASKS.values() for name in task.scores} - {"accuracy"} == set(
        SCORES
    )


# -------------------------------------------------------------------------------------- SQuAD


@pytest.mark.parametrize(
    ("found", "wanted", "exact", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1, 1),
        ("an  apple, a day", "apple day", 1, 1),
        ("theatre", "the theatre", 1, 1),  # an article is a whole word
        ("in 1889", "1889", 0, 2 / 3),  # precision 1/2, recall 1
        ("the big big dog", "big dog", 0, 0.8),  # words count as often as they occur
        ("cat", "dog", 0, 0),
        ("", "dog", 0, 0),
        ("U.S.", "US", 1, 1),
    ],
)
def test_exact_match_and_f1_by_hand(found, wanted, exact, f1):
    assert spans.exact(found, wanted) == exact
    assert spans.f1(found, wanted) == pytest.approx(f1)


def test_the_closest_of_the_answers_counts():
    assert spans.best(spans.f1, "in 1889", ["1887", "1889", "of 1889 and in 1890"]) == 2 / 3
    assert spans.best(spans.exact, "in 1889", ["1889", "In 1889."]) == 1


def test_the_best_span_of_all_pairs():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(6, 2, 12))
    inside = np.arange(12) >= 3
    inside = np.stack([inside & (np.arange(12) < stop) for stop in (12, 9, 12, 5, 4, 3)])
    for longest in (1, 3, 30):
        scores, found = best_spans(logits, inside, longest)
        for row in range(5):
            pairs = {
                (i, j): logits[row, 0, i] + logits[row, 1, j]
                for i in range(12)
                for j in range(i, min(i + longest, 12))
                if inside[row, i] and inside[row, j]
            }
            best = max(pairs, key=pairs.get)
            assert tuple(found[row]) == best and scores[row] == pairs[best]
        assert scores[5] == -np.inf  # nothing is inside


def test_a_question_takes_the_best_of_its_windows(tmp_path):
    from tests.data.test_squad import QUESTIONS, paragraph, source

    data = source(tmp_path, paragraph(questions=QUESTIONS[:2]), length=15, stride=4)
    owners = [window.question for window in data.windows]
    logits = np.zeros((len(data), 2, 15), np.float32)
    for row in range(len(data)):
        first, last = data[row]["label"]
        if first:  # [CLS] is never an answer, however large its logits are
            logits[row, 0, first] = logits[row, 1, last] = 5.0
        logits[row, :, 0] = 9.0
    scores = SpanScores(data)
    assert scores.answers(logits)["q1"] == "Zoë"
    found = scores({"answer": logits})
    assert owners.count(0) == 3 and found["exact"] >= 0.5
    # "1889, by" has one of the two words of "by Zoë", which is an answer too.
    logits[:3] = 0
    begin, _ = data.inside(1)
    logits[1, 0, begin + 2], logits[1, 1, begin + 5] = 5.0, 5.0
    assert scores.answers(logits[:3]) == {"q1": "1889, by"}
    assert scores({"answer": logits[:3]}) == {"exact": 0.0, "f1": pytest.approx(0.5)}
