"""Grokked reasoning: identities that must hold, and errors that must be clear."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer.papers.grokked_reasoning import facts, hard, language, probes
from jaxformer.papers.grokked_reasoning.facts import Comparison, Composition
from jaxformer.papers.grokked_reasoning.language import Vocabulary
from jaxformer.papers.grokked_reasoning.recipe import QUESTIONS, Corpus, corpus_of
from jaxformer.recipe import ConfigError

COMPOSITION = Composition(entities=30, relations=8, out_degree=4, ood=0.1, iid=0.1)
COMPARISON = Comparison(entities=12, attributes=3, levels=4, ood=0.25, iid=0.2)


def draw(seed=0):
    return np.random.default_rng(seed)


def rows_of(table):
    return [tuple(row) for row in table.tolist()]


@pytest.fixture(scope="module")
def corpus():
    return Corpus(COMPOSITION, phi=2.0, seed=3, probes=50)


@pytest.fixture(scope="module")
def compared():
    return Corpus(COMPARISON, phi=2.0, seed=3, probes=50)


def test_no_training_deduction_uses_an_ood_fact(corpus):
    tables = corpus.tables
    facts_ = np.concatenate([tables["id_atomic"], tables["ood_atomic"]])
    tail = {(h, r): t for h, r, t in rows_of(facts_)}
    assert len(tail) == len(facts_) == 30 * 4  # keys are unique
    ood = {(h, r) for h, r, _ in rows_of(tables["ood_atomic"])}
    assert len(ood) == round(0.1 * len(facts_))
    assert set(np.bincount(facts_[:, 0])) == {4}
    used = {"train_inferred": 0, "test_inferred_iid": 0, "test_inferred_ood": 2}
    for name, count in used.items():
        assert len(tables[name])
        for h, r1, r2, t in rows_of(tables[name]):
            bridge = tail[h, r1]
            assert tail[bridge, r2] == t
            assert ((h, r1) in ood) + ((bridge, r2) in ood) == count
    every = sum(len(tables[name]) for name in facts.INFERRED)
    both = sum(
        ((h, r) in ood) == ((tail[h, r], s) in ood)
        for h, r in tail
        for s in range(8)
        if (tail[h, r], s) in tail
    )
    assert every == both  # all of them, but those with one OOD hop


def test_what_is_trained_on(corpus):
    train, tables = corpus.train, corpus.tables
    for name in facts.ATOMIC:
        np.testing.assert_array_equal(train[name], tables[name])
    assert len(train["train_inferred"]) == round(2.0 * len(tables["id_atomic"]))
    assert set(rows_of(train["train_inferred"])) <= set(rows_of(tables["train_inferred"]))
    again = Corpus(COMPOSITION, phi=2.0, seed=3, probes=50)
    other = Corpus(COMPOSITION, phi=2.0, seed=4, probes=50)
    np.testing.assert_array_equal(again.train["train_inferred"], train["train_inferred"])
    assert rows_of(other.tables["id_atomic"]) != rows_of(tables["id_atomic"])


def test_comparisons_turn_round_under_a_swap(compared):
    tables = compared.tables
    atomic = np.concatenate([tables["id_atomic"], tables["ood_atomic"]])
    value = {(e, a): v for e, a, v in rows_of(atomic)}
    assert len(value) == len(atomic) == 12 * 3
    ood = {(e, a) for e, a, _ in rows_of(tables["ood_atomic"])}
    assert all(sum((e, a) in ood for e in range(12)) == 3 for a in range(3))
    count = {"train_inferred": 0, "test_inferred_iid": 0, "test_inferred_ood": 2, "mixed": 1}
    for name, outside in count.items():
        label = {(a, e1, e2): k for a, e1, e2, k in rows_of(tables[name])}
        for (a, e1, e2), k in label.items():
            assert label[a, e2, e1] == 2 - k  # in the same table, 0 <-> 2 and 1 <-> 1
            assert k == 1 + np.sign(value[e1, a] - value[e2, a])
            assert ((e1, a) in ood) + ((e2, a) in ood) == outside
    assert sum(len(tables[name]) for name in count) == 3 * 12 * 11


def test_only_the_answer_and_its_end_count():
    """Loss of one item by hand; other tokens of the question as targets change nothing."""
    recipe = jaxformer.load("grokked_reasoning:tiny")
    batch = recipe.phases[0].data.batch(0)
    params, extra = recipe.task.init(jax.random.key(0), batch)
    key = jax.random.key(0)
    corpus = corpus_of(jaxformer.load_config("grokked_reasoning:tiny"))
    vocabulary = Vocabulary(language.symbols(corpus.base))
    row = corpus.train["train_inferred"][:1]
    one = language.items(vocabulary, row, corpus.form("train_inferred")).arrays(6)
    assert vocabulary.decode(one["tokens"][0, :5]) == "<e_{}><r_{}><r_{}><e_{}></a>".format(*row[0])
    np.testing.assert_array_equal(one["weight"], [[0, 0, 1, 1, 0, 0]])

    @jax.jit
    def loss(batch):
        return recipe.task.loss(params, extra, batch, key=key, train=False)

    likely = jax.nn.log_softmax(recipe.task.predict(params, extra, one, key=key)[0])
    tokens = one["tokens"][0]
    by_hand = -(likely[2, tokens[3]] + likely[3, tokens[4]]) / 2
    np.testing.assert_allclose(loss(one).loss, by_hand, rtol=1e-5)

    weight = jnp.array(one["weight"])
    grads = jax.grad(
        lambda t: (
            recipe.task.loss(
                params, extra, {"tokens": tokens[None], "weight": weight * t}, key=key, train=False
            ).loss
        )
    )(jnp.ones(()))
    np.testing.assert_allclose(grads, 0, atol=1e-6)  # a mean, whatever the weights' scale
    exact = {**one, "weight": one["weight"] * 0}
    assert loss(exact).loss == 0 and loss(exact).weight == 0
    padded = jax.tree.map(lambda x: np.concatenate([x, 0 * x]), one)
    np.testing.assert_allclose(loss(padded).loss, by_hand, rtol=1e-5)
    assert loss(padded).metrics["exact"].weight == 1


def by_brute_force(given, rows, entities):
    """{(e1, e2): label} of what all values that fit have in common, of entities not `given`.

    Values may lie between those of the others, and beyond them, in any order.
    """
    options = [(given[e],) if e in given else np.arange(-3, 12) / 4 for e in range(entities)]
    worlds = np.array(list(itertools.product(*options)))
    for _, a, b, label in rows:
        worlds = worlds[1 + np.sign(worlds[:, a] - worlds[:, b]) == label]
    found = {}
    for a, b in itertools.permutations(sorted(set(range(entities)) - set(given)), 2):
        at_least = (worlds[:, a] >= worlds[:, b]).all()
        at_most = (worlds[:, a] <= worlds[:, b]).all()
        if at_least or at_most:
            found[a, b] = 1 + int(at_least) - int(at_most)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_hard_questions_are_those_that_brute_force_decides(seed):
    base = Comparison(6, 1, 3, ood=0.5, iid=0.0)
    tables = base.tables(draw(seed))
    train = hard.training(tables, 0.6, draw(seed))
    given = {e: v for e, _, v in rows_of(train["id_atomic"])}
    mixed, inside = rows_of(train["mixed"]), rows_of(train["train_inferred"])
    among = {e for row in mixed for e in row[1:3]} - set(given)
    easy = hard.decided(6, np.array(mixed + inside), np.array(sorted(among)))
    easy = {(a, b): k for _, a, b, k in rows_of(easy)}
    solvable = by_brute_force(given, mixed, 6)
    wanted = {pair: k for pair, k in solvable.items() if easy.get(pair) != k}
    assert {(a, b): k for _, a, b, k in rows_of(hard.questions(train, 6))} == wanted


def test_complex_corpus():
    base = Comparison(60, 2, 8, ood=0.2, iid=0.1)
    corpus = Corpus(base, phi=0.0, seed=0, probes=30, share=0.05)
    assert "ood_atomic" not in corpus.train
    questions = corpus.probe(QUESTIONS)
    value = {
        (e, a): v
        for e, a, v in rows_of(np.concatenate([corpus.tables[name] for name in facts.ATOMIC]))
    }
    assert np.bincount(questions[:, 3]).tolist() == [10, 6, 10]  # of each at most a third of 30
    for a, e1, e2, label in rows_of(questions):
        v1, v2 = value[e1, a], value[e2, a]
        assert v1 == v2 or label == 1 + np.sign(v1 - v2)
    vocabulary = Vocabulary(language.symbols(base))
    one = language.items(vocabulary, questions[:1], corpus.form(QUESTIONS))
    text = vocabulary.decode(one.tokens[0])
    assert text.startswith(f"<attr_{questions[0, 0]}><q>") and text.endswith("></a>")
    assert one.length[0] == 9 and one.prompt[0] == 6
    atomic = language.items(vocabulary, corpus.train["id_atomic"], corpus.form("id_atomic"))
    assert atomic.length.max() == 8


def test_perturbed_questions_have_other_answers(corpus, compared):
    tables, rows = corpus.tables, corpus.train["train_inferred"][:20]
    facts_ = np.concatenate([tables[name] for name in facts.ATOMIC])
    tail = {(h, r): t for h, r, t in rows_of(facts_)}
    found = probes.composition(tables, rows, 30, 8, draw())
    assert [found[name].positions for name in ("h", "r1", "r2")] == [(0,), (1,), (2,)]
    for name, other in found.items():
        assert other.valid.mean() > 0.8
        for old, new, valid in zip(rows.tolist(), other.rows.tolist(), other.valid, strict=True):
            column = {"h": 0, "r1": 1, "r2": 2}[name]
            same = [i for i in range(4) if i != column]
            assert [old[i] for i in same] == [new[i] for i in same]
            answer = tail.get((tail.get((new[0], new[1])), new[2]))
            assert (answer != old[3]) == bool(valid)
            if name != "h" and valid:
                assert answer is not None or name == "r1"

    rows = compared.train["train_inferred"][:20]
    value = {(e, a): v for e, a, v in rows_of(compared.tables["id_atomic"])}
    for name, other in probes.comparison(compared.tables, rows, (12, 3), draw()).items():
        for (a, *old, label), new, valid in zip(
            rows.tolist(), other.rows.tolist(), other.valid, strict=True
        ):
            if valid:
                v1, v2 = value[new[1], a], value[new[2], a]
                assert 1 + np.sign(v1 - v2) != label
                assert abs(v1 - v2) == (label == 1) and new[2 if name == "e1" else 1] in old


def test_the_authors_files(tmp_path, corpus):
    vocabulary = Vocabulary(language.symbols(corpus.base))
    probed = {kind: corpus.probe(kind) for kind in corpus.kinds}
    language.write(tmp_path, vocabulary, corpus.train, probed, corpus.forms)
    lines = json.loads((tmp_path / "train.json").read_text())
    assert set(lines[0]) == {"input_text", "target_text"}
    assert len(json.loads((tmp_path / "valid.json").read_text())) == len(
        probed["test_inferred_ood"]
    )
    read_vocabulary, train, read_probes = language.read(tmp_path)
    assert read_vocabulary == vocabulary
    ours = corpus.items(vocabulary)
    for name in ("tokens", "prompt", "length"):
        np.testing.assert_array_equal(getattr(train, name), getattr(ours, name))
    assert set(read_probes) == set(probed)
    recipe = jaxformer.load("grokked_reasoning:tiny", data__folder=str(tmp_path))
    assert recipe.task.model.vocabulary == vocabulary.size == 30 + 8 + 6 + 1
    assert recipe.phases[0].data.batch(0)["tokens"].shape == (16, 7)
    (tmp_path / "train.json").write_text(
        json.dumps([{"input_text": "<x>", "target_text": "<x><y>"}])
    )
    with pytest.raises(ConfigError, match="'<x>': is no symbol"):
        language.read(tmp_path)


def test_vocabularies_can_be_padded():
    vocabulary = Vocabulary(("<a>", "<b>", "<c>"), multiple=8)
    assert vocabulary.size == 8 and vocabulary.pad == 3
    assert vocabulary.encode("<b><a>") == [1, 0] and vocabulary.decode([2, 3]) == "<c>"


def test_all_there_is_is_taken_with_a_warning(corpus):
    with pytest.warns(UserWarning, match="phi=1000"):
        train = facts.training(corpus.tables, 1000.0, draw())
    assert len(train["train_inferred"]) == len(corpus.tables["train_inferred"])


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: Composition(9, 4, 5), r"data\.out_degree=5: .* allowed: 1 to 4"),
        (lambda: Composition(9, 4, 2, ood=1.5), r"data\.ood=1\.5: must be in \[0, 1\]"),
        (lambda: Comparison(9, 2, 1), r"data\.levels=1: must be at least 2"),
        (lambda: Vocabulary(("<a>",)).encode("<a><b>"), r"'<b>': is no symbol"),
        (lambda: load(data__task="sums"), r"data\.task='sums': must be one of composition"),
        (lambda: load(data__context=3).phases[0].data.batch(0), r"data\.context=3: .* at least 4"),
        (lambda: load(data__folder="/nowhere"), r"data\.folder: /nowhere/vocab\.json cannot"),
        (lambda: load(data__phi=-1.0).phases[0].data.batch(0), r"data\.phi=-1\.0"),
        (
            lambda: (
                load(data__task="complex", data__context=8, data__share=2.0).phases[0].data.batch(0)
            ),
            r"data\.share=2\.0",
        ),
    ],
)
def test_mistakes_are_named(act, said):
    with pytest.raises(ConfigError, match=said):
        act()


def load(**fields):
    return jaxformer.load("grokked_reasoning:tiny", **fields)
