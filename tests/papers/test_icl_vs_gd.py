"""ICL against GD: the stream, its few-shot tasks, and the protocol on them and on files.

What must hold of metrics, prompts and the constructed layer is in
`tests/evaluation/test_few_shot.py` and `tests/nn/test_descent.py`.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.data.sources.shots import ShotsFile
from jaxformer.data.sources.tokenizers import Bytes
from jaxformer.data.sources.topics import Topics
from jaxformer.evaluation import few_shot
from jaxformer.evaluation.exams import Subject
from jaxformer.evaluation.few_shot import FewShot, Shot
from jaxformer.evaluation.in_context import Comparison, Descent, Training, best, measured
from jaxformer.evaluation.shots import InContext, Settings
from jaxformer.models.lm import decoder_lm
from jaxformer.models.transformer import Transformer
from jaxformer.papers.icl_vs_gd.experiments import constructed, sparsities
from jaxformer.papers.icl_vs_gd.model import few_shot_task, seen
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import ConfigError, TrainState
from jaxformer.tasks.language import LanguageTask

STREAM = Topics(length=48, topics=3, words=20, symbols=4, answers=2)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def rows():
    keys = jax.random.split(KEY, 64)
    return np.asarray(jax.jit(STREAM)(KEY, keys)["tokens"])


def pairs(row):
    """[(place, x, y)] of a document."""
    at = np.flatnonzero(row[:-1] == STREAM.arrow)
    return [(i, row[i - 1], row[i + 1]) for i in at if i > 0]


def test_runs_are_of_one_mapping_of_their_document(rows):
    found = [pairs(row) for row in rows]
    for row, each in zip(rows, found, strict=True):
        assert len({(x, y) for _, x, y in each}) == len({x for _, x, _ in each})
        for at, x, y in each:
            assert x < 4 <= y < 6
            assert at + 2 >= len(row) or row[at + 2] == STREAM.end
    assert 16 < sum(map(bool, found)) < 48  # half of the documents
    assert len({tuple(sorted({(x, y) for _, x, y in each})) for each in found}) > 8


def test_text_follows_from_the_last_words(rows):
    follows, liked = STREAM.language
    assert follows.shape == (3, 20) and liked.shape == (3, 20)
    right = total = 0
    for row in rows:
        if row.max() < STREAM.arrow:  # text alone
            after = [follows[i, row[2 - i : len(row) - 1 - i]] for i in range(3)]
            right += np.any(np.stack(after) == row[3:], axis=0).sum()
            total += len(row) - 3
    assert right / total > 0.85


def test_a_task_asks_for_all_of_a_new_mapping():
    few = few_shot_task(STREAM, 6, KEY)
    shown = {shot.prompt[0]: shot.label for shot in few.demonstrations}
    assert [query.prompt for query in few.queries] == [[x, STREAM.arrow] for x in range(4)]
    for query, known in zip(few.queries, seen(few), strict=True):
        assert known == (query.prompt[0] in shown)
        assert not known or shown[query.prompt[0]] == query.label
    tokens, last = few.prompts(range(6))
    assert tokens.shape == (4, 26) and set(last) == {25} and tokens[0, 3] == STREAM.end


# The protocol.


@pytest.fixture(scope="module")
def model():
    task = LanguageTask(
        decoder_lm(Transformer(width=16, depth=1, heads=2, dropout=0.3), vocabulary=264, length=64),
        Bytes(),
    )
    params, extra = jax.jit(task.init)(KEY, {"tokens": jnp.zeros((1, 65), jnp.int32)})
    return task, params, extra


@pytest.fixture(scope="module")
def compared(model):
    few = FewShot([Shot([1, 2], 8), Shot([3, 2], 9)], [Shot([1, 2], 8), Shot([3, 2], 9)], [5], 64)
    descents = {"full": Descent(), "one": Descent(rows=1)}
    compare = Comparison(2, (0.1, 0.3), Training(4, 2), descents, k=4, rows=1)
    return few, *compare(*model, few)


def test_before_training_it_is_zero_shot_and_full_batches_have_no_order(model, compared):
    few, icl, curves = compared
    assert {measure.shape for found in curves.values() for measure in found.values()} == {(2, 3)}
    for found in curves.values():
        np.testing.assert_allclose(found["accuracy"][:, 0], icl["zero_shot"])
        np.testing.assert_allclose(found["overlap"][:, 0], icl["zero_shot_overlap"], atol=1e-6)
        assert np.all(found["sensitivity"][:, 0] < 1e-6)
        assert np.all(found["likelihood"][:, -1] > 1.5 * found["likelihood"][:, 0])
    assert np.all(curves["full"]["sensitivity"] < 1e-5)  # in spite of the model's dropout
    assert curves["one"]["sensitivity"][1, -1] > 1e-4
    zero = few_shot.answers(*model, few.prompts(()))
    assert icl["zero_shot"] == float(few_shot.accuracy(zero, few.labels))


def test_answers_are_the_same_in_parts(model):
    few = FewShot([Shot([1], 8)], [Shot([i, 2][: 1 + i % 2], 8) for i in range(5)], [5], 64)
    whole = few_shot.answers(*model, few.prompts([0]))
    parts = jax.jit(lambda p: few_shot.answers(*model, p, 2))(few.prompts([0]))
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-7)


def test_one_algorithm_has_nothing_between(compared):
    """The theorem's hypothesis, with answers in context in the place of those of descent."""
    p = jax.nn.softmax(3 * jax.random.normal(KEY, (3, 2, 12)))
    found = measured(p, p[:, None], jnp.zeros(2, int), 4)
    assert found["overlap"] == 1 and found["cosine"] == pytest.approx(1)
    assert found["sensitivity"] == pytest.approx(float(few_shot.sensitivity(p)))


def test_the_rate_is_chosen_by_accuracy_and_not_before_training():
    curves = {
        "accuracy": np.array([[1.0, 0.2, 0.5], [1.0, 0.5, 0.1]]),
        "likelihood": np.array([[0.9, 0.1, 0.3], [0.9, 0.4, 0.1]]),
        "overlap": np.array([[0.0, 0.1, 0.2], [0.3, 0.4, 0.5]]),
    }
    chosen = best((0.1, 0.3), Training(20, 10), curves)
    assert (chosen.rate, chosen.epoch, chosen.found["overlap"]) == (0.3, 10, 0.4)


def test_the_control_is_descent_and_mostly_zeros(model):
    found = constructed(3)
    assert found["constructed_difference"] < 1e-5 and found["constructed_sensitivity"] < 1e-5
    rows, gap = sparsities(model[1], 16)
    assert gap > 0.3 and len(rows) == 6


# Tasks from files.


def written(folder, **changes):
    train = [{"text": "ab", "label": 0}, {"text": "cd", "label": 1}, {"text": "ef", "label": 1}]
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, train)))
    fields = {"prompt": "{text}:", "labels": {"0": "n", "1": "y"}, "separator": "\n"}
    fields |= {"train": "train.jsonl", "test": "test.jsonl"}
    fields |= {"demonstrations": 2, "orders": 2, "rates": [0.1], "epochs": 2, "every": 1, "k": 4}
    path = folder / "task.json"
    path.write_text(json.dumps({**fields, "descents": ["full batch"], **changes}))
    return str(path)


def subject(model, length=64):
    task, params, extra = model
    state = TrainState(jnp.zeros((), jnp.int32), params, extra, {}, KEY)
    return Subject("tiny", 0, task, state, make_mesh({"data": 1}, jax.devices()[:1]), {}, (), "")


def test_any_decoder_takes_a_task_of_a_file(model, tmp_path):
    found = subject(model).take(InContext(written(tmp_path)))
    assert found["few_shot/full batch: rate"] == 0.1
    assert found["few_shot/full batch: sensitivity"] < 1e-5 < found["few_shot/icl sensitivity"]
    assert all(np.isfinite(value) for value in found.values())


def test_glue_is_read_as_premise_and_hypothesis(tmp_path):
    head, line = "sentence1\tsentence2\tlabel", "A b.\tB?\tnot_entailment"
    (tmp_path / "train.tsv").write_text(f"{head}\n{line}\n")
    labels = {"entailment": " yes", "not_entailment": " no"}
    file = ShotsFile("{premise} So {hypothesis}", labels, glue="rte", folder=str(tmp_path))
    assert file.examples("train") == [("A b. So B?", " no")]
    with pytest.raises(ConfigError, match="names 'text'; the sentences of rte are premise"):
        ShotsFile("{text}", labels, glue="rte", folder=str(tmp_path)).examples("train")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"demonstrations": 0}, "demonstrations=0: must be"),
        ({"demonstrations": 4}, "there are 3 examples to train on"),
        ({"orders": 3}, "2 demonstrations have 2 orders, 3"),
        ({"labels": {"0": "no", "1": "y"}}, "'no' is 2 tokens"),
        ({"labels": {"0": "n"}}, "labels=.* two or more"),
        ({"labels": {"0": "n", "2": "y"}}, "the label '1' is none of 0, 2"),
        ({"labels": {"0": "ya", "1": "yb"}, "first_token": True}, "begin with the same token"),
        ({"prompt": "{premise}"}, "needs an object with 'premise'"),
        ({"prompt": "text"}, "names no field"),
        ({"k": 265}, "k: 265 of a vocabulary of 264"),
        ({"every": 3}, "every=3: must divide the 2 epochs"),
        ({"descents": ["newton"]}, "descents=.*full batch"),
        ({"rates": [0]}, "rates=.* learning rates"),
        ({"shots": 3}, "'shots': no such field"),
        ({"train": "none.jsonl"}, "cannot be read"),
    ],
)
def test_bad_files_are_named(model, tmp_path, changes, says):
    with pytest.raises(ConfigError, match=says):
        subject(model).take(InContext(written(tmp_path, **changes)))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Topics(8, words=5), "data.words=5: .* give at least 12"),
        (lambda: Topics(8, runs=2.0), "data.runs=2.0: must be from 0 to 1"),
        (lambda: Topics(8, order=0), "data.order=0"),
        (lambda: few_shot_task(STREAM, 0, KEY), "demonstrations=0: must be at least 1"),
        (lambda: few_shot_task(STREAM, 12, KEY), "the model reads 48"),
        (lambda: Descent("newton").update(None, 0.1), "optimizer='newton'"),
        (lambda: Settings(queries=0), "queries=0"),
        (lambda: Settings(epochs="many"), "epochs='many'"),
        (lambda: Settings(trains=["value"]), "trains="),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(ConfigError, match=says):
        make()
