"""TEGA: identities that must hold, and errors that must be clear."""

import itertools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import jaxformer
from jaxformer.data.sources.knowledge_graph import KnowledgeGraph, read_folder, ruled_graph
from jaxformer.evaluation.ranking import expected_ranks, reciprocal_rank
from jaxformer.kernels.attention import operands as ops
from jaxformer.models.transformer import Transformer
from jaxformer.nn.position import At
from jaxformer.nn.relative_key import DisentangledScheme, RelativeKeyScheme, Together
from jaxformer.papers.tega import formula, lisp, oracle
from jaxformer.papers.tega.cells import answer_arrays, reciprocal_ranks
from jaxformer.papers.tega.formula import FREE, And, Atom, Not, Or
from jaxformer.papers.tega.model import GuideScheme, encoder, parse_of
from jaxformer.papers.tega.queries import (
    Query,
    Sampler,
    read_queries,
    read_query,
    write_queries,
)
from jaxformer.papers.tega.recipe import corpus_of
from jaxformer.papers.tega.tokens import PAD, Vocabulary, guide_matrix, layout, rows
from jaxformer.papers.tega.types import SEEN, TYPES, UNSEEN, pattern
from jaxformer.recipe import ConfigError

GRAPH = ruled_graph(12, 2, np.random.default_rng(0))
INP = "((r1(s1,e1))&(!(r2(s2,e1))))&(r3(e1,f))"


@pytest.fixture(scope="module")
def sampled():
    """Eleven queries or so of every type, with answers, as the sampler has them."""
    draw = np.random.default_rng(1)
    return {kind: Sampler(GRAPH, GRAPH).queries(kind, 11, draw) for kind in TYPES}


def is_tree(query):
    try:
        lisp.to_tree(query)
    except ConfigError:
        return False
    return True


def test_types(sampled):
    assert (len(SEEN), len(UNSEEN), len(TYPES)) == (23, 32, 55)
    trees = {kind for kind, found in sampled.items() if is_tree(found[0].query)}
    assert set(TYPES) - trees == {"2il", "3il", "2m", "2nm", "im", "3mp", "3pm", "3c", "3cm"}
    for kind in trees:
        assert pattern(lisp.to_tree(sampled[kind][0].query)) == TYPES[kind]


def test_both_syntaxes_say_the_same(sampled):
    trees = 0
    for query in (q.query for found in sampled.values() for q in found):
        assert formula.read(formula.write(query)) == query
        if not is_tree(query):
            continue
        trees += 1
        tree = lisp.to_tree(query)
        assert lisp.read(lisp.write(tree)) == tree == lisp.to_tree(lisp.to_formula(tree))
        by_sets = np.flatnonzero(oracle.members(tree, GRAPH))
        np.testing.assert_array_equal(oracle.answers(query, GRAPH), by_sets)
        turned = formula.reversed_operands(query)
        np.testing.assert_array_equal(oracle.answers(turned, GRAPH), by_sets)
    assert trees >= 480


def brute_force(query, graph):
    """All values of f for which values of the others, each in its smallest scope, make it true."""
    edges = set(map(tuple, graph.triples.tolist()))
    total = formula.occurrences(query)

    def whole(part):
        return {v for v, n in formula.occurrences(part).items() if n == total[v] and v != FREE}

    def true(part, values):
        own = whole(part).difference(*map(whole, formula.parts(part)))
        for chosen in itertools.product(range(graph.entities), repeat=len(own)):
            now = values | dict(zip(own, chosen, strict=True))
            match part:
                case Atom(r, a, b):
                    found = (now.get(a, a), r, now.get(b, b)) in edges
                case Not(of):
                    found = not true(of, now)
                case And(left, right):
                    found = true(left, now) and true(right, now)
                case Or(left, right):
                    found = true(left, now) or true(right, now)
            if found:
                return True
        return False

    return [e for e in range(graph.entities) if true(query, {FREE: e})]


def test_answers_are_those_of_brute_force():
    graph = ruled_graph(10, 2, np.random.default_rng(3))
    draw = np.random.default_rng(4)
    for kind in ("2in", "inp", "pni", "up", "2il", "2nm", "3mp", "3c", "3cm", "2inn", "iu"):
        for one in Sampler(graph, graph, tries=40).queries(kind, 2, draw):
            assert brute_force(one.query, graph) == one.answers.tolist(), formula.write(one.query)


def test_negation_quantifies_inside():
    """No entity that leads to f at all, not: some entity that does not lead to f."""
    graph = KnowledgeGraph(np.array([[0, 0, 1], [0, 0, 2], [3, 1, 2]]), 4, 2)
    query = formula.read("(r0(s0,f))&(!(r1(e1,f)))")
    assert oracle.answers(query, graph).tolist() == [1] == brute_force(query, graph)


def assert_related(m, reference):
    found = [set(np.flatnonzero(row).tolist()) for row in m]
    assert found == [set(reference[i]) for i in range(len(m))]


def test_guide_matrix():
    query = formula.read(INP)
    efo, tree = layout(query), layout(lisp.to_tree(query))
    assert " ".join(efo.symbols) == "( ( r1 s1 e1 ) & ( ! ( r2 s2 e1 ) ) ) & ( r3 e1 f )"
    vocabulary = Vocabulary(5, 4)
    m = guide_matrix(np.array(vocabulary.encode(efo.symbols)), np.array(efo.spans))
    e1 = {4, 12, 19}
    reference = {
        0: range(16),
        1: range(1, 6),
        2: range(1, 6),
        3: range(1, 6),
        4: {*range(1, 6), *e1},
        5: range(1, 6),
        6: range(1, 15),
        7: range(7, 15),
        8: range(8, 14),
        9: range(9, 14),
        10: range(9, 14),
        11: range(9, 14),
        12: {*range(9, 14), *e1},
        13: range(9, 14),
        14: range(7, 15),
        15: range(16),
        16: range(22),
        17: range(17, 22),
        18: range(17, 22),
        19: {*range(17, 22), *e1},
        20: range(17, 22),
        21: range(17, 22),
    }
    assert [set(np.flatnonzero(row).tolist()) for row in m] == [
        set(reference[i]) for i in range(22)
    ]

    text = "( p r3 ( i ( p r1 ( s1 ) ) ( n ( p r2 ( s2 ) ) ) ) )"
    assert " ".join(tree.symbols) == text
    m = guide_matrix(np.array(vocabulary.encode(tree.symbols)), np.array(tree.spans))
    projection = dict.fromkeys((5, 6, 7, 9, 11), range(5, 12))
    negated = dict.fromkeys((14, 15, 16, 18, 20), range(14, 21))
    reference = {
        **dict.fromkeys((0, 1, 2, 23), range(24)),
        **dict.fromkeys((3, 4, 22), range(3, 23)),
        **projection,
        **dict.fromkeys((8, 10), range(8, 11)),
        **dict.fromkeys((12, 21), range(12, 22)),
        13: range(13, 21),
        **negated,
        **dict.fromkeys((17, 19), range(17, 20)),
    }
    assert [set(np.flatnonzero(row).tolist()) for row in m] == [
        set(reference[i]) for i in range(24)
    ]


# ------------------------------------------------------------------------------------- model

VOCABULARY, LENGTH = Vocabulary(GRAPH.entities, GRAPH.relations), 28
TRUNK = Transformer(width=16, depth=1, heads=2, hidden=16, order="post", position="none")


def model_of(**variant):
    return encoder(TRUNK, VOCABULARY, length=LENGTH, **variant)


def inputs_of(sampled, kinds=("1p", "2in", "ip"), length=LENGTH):
    queries = [sampled[kind][0].query for kind in kinds]
    return tuple(rows(queries, VOCABULARY, length).values())


def loud(model, tokens, spans, seed=5):
    """Parameters large enough for everything to be seen; nothing is compiled for them."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, spans)["params"]
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: 0.3 * draw.normal(size=x.shape).astype(np.float32), shapes)


def without_parts(tree):
    """Without the typed tables and the gammas."""
    kept = {k: v for k, v in tree.items() if k not in ("typed", "guide")}
    return {k: without_parts(v) if isinstance(v, dict) else v for k, v in kept.items()}


def zeroed(tree, name=""):
    if isinstance(tree, dict):
        return {k: zeroed(v, k) for k, v in tree.items()}
    return 0 * tree if name in ("typed", "gamma") else tree


def test_without_its_parts_tega_is_the_baseline(sampled):
    tokens, spans = inputs_of(sampled)
    tega, plain = model_of(typed=True, guide="soft"), model_of()
    params = loud(tega, tokens, spans)
    run = jax.jit(lambda m, p: m.apply({"params": p}, tokens, spans), static_argnums=0)
    baseline = run(plain, without_parts(params))
    np.testing.assert_allclose(run(tega, zeroed(params)), baseline, atol=1e-6)
    assert np.abs(run(tega, params) - baseline).max() > 1e-2


def test_scores_by_hand(sampled):
    """One layer's relative keys, by type, and its guide against loops over positions."""
    tokens, spans = inputs_of(sampled)
    kinds = VOCABULARY.kinds()
    parse = jax.jit(parse_of)(tokens, spans, kinds)
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(7, 4)), draw.normal(size=(6, 6, 7, 4))
    q, k = draw.normal(size=(2, len(tokens), LENGTH, 2, 4))
    scheme = RelativeKeyScheme(jnp.array(a), 3, jnp.array(b), parse.kinds)
    gamma = np.array([0.5, 2.0])
    guide = GuideScheme(parse, jnp.array(gamma), jnp.zeros(2))
    both = Together([scheme, guide]).read(jnp.array(q), jnp.array(k), 0.5)
    at = At(LENGTH, LENGTH)

    sizes = ops.Sizes(len(tokens), 2, LENGTH, LENGTH)
    whole = ops.Block.whole(sizes)

    @jax.jit
    def added_by_both():
        mods = both.mods(2, at)
        aux = ops.read(ops.prepare(mods.aux, sizes, sizes), whole)
        return mods.score_mod(jnp.zeros(sizes), ops.indices(sizes, whole), aux)

    added = added_by_both()
    t = kinds[tokens]
    for n, i, j in ((0, 0, 4), (1, 3, 2), (1, 8, 1), (2, 18, 4), (2, 4, 18), (2, 0, 0)):
        offset = np.clip(j - i, -3, 3) + 3
        m = guide_matrix(tokens[n], spans[n])[i, j]
        by_hand = 0.5 * q[n, i] @ (a[offset] + b[t[n, i], t[n, j], offset]) + gamma * m
        np.testing.assert_allclose(added[n, :, i, j], by_hand, atol=1e-5)

    tables = draw.normal(size=(2, 7, 2, 4))
    dpe = DisentangledScheme(*map(jnp.array, tables), 3)
    found = jax.jit(lambda: dpe.scores(jnp.array(q), jnp.array(k), at))()
    for n, i, j in ((0, 0, 2), (1, 9, 2)):
        ahead = np.clip(j - i, -3, 3) + 3
        by_hand = (q[n, i] * tables[0, ahead] + k[n, j] * tables[1, ahead]).sum(-1)
        np.testing.assert_allclose(found[n, :, i, j], by_hand, atol=1e-5)


@pytest.mark.parametrize(("position", "same"), [("rpe", True), ("dpe", True), ("ape", False)])
def test_padding_in_front_moves_relative_positions_along(sampled, position, same):
    tokens, spans = inputs_of(sampled, ("1p", "2in"))
    ahead = LENGTH - 20  # places that are free at the end of all of them
    moved, moved_spans = np.roll(tokens, ahead, axis=1), np.roll(spans + ahead, ahead, axis=1)
    model = model_of(position=position, guide="soft")
    params = loud(model, tokens, spans)
    states = jax.jit(lambda x, y: model.apply({"params": params}, x, y, method="states"))
    difference = np.abs(states(tokens, spans) - np.roll(states(moved, moved_spans), -ahead, axis=1))
    assert (difference[tokens != PAD].max() < 1e-5) == same


def test_entities_have_no_order(sampled):
    """Other ids for entities, and their embeddings moved along, permute the scores."""
    tokens, spans = inputs_of(sampled)
    model = model_of(typed=True, guide="soft")
    params = loud(model, tokens, spans)
    new = np.random.default_rng(0).permutation(GRAPH.entities)
    moved = np.arange(VOCABULARY.size)
    moved[100 : 100 + GRAPH.entities] = 100 + new
    table = np.empty_like(params["embed"]["table"])
    table[moved] = params["embed"]["table"]
    other = {**params, "embed": {"table": table}}
    run = jax.jit(lambda p, x: model.apply({"params": p}, x, spans))
    scores, permuted = run(params, tokens), run(other, moved[tokens])
    np.testing.assert_allclose(permuted[:, new], scores, atol=1e-5)


def test_masked_heads_see_what_the_parse_relates(sampled):
    """With hard masks a token outside of a span changes nothing, except for the first token."""
    tokens, spans = inputs_of(sampled, ("ip",))
    model = model_of(guide="hard")
    params = loud(model, tokens, spans)
    states = jax.jit(lambda x: model.apply({"params": params}, x, spans, method="states"))
    other = tokens.copy()
    other[0, 15] = 100 + GRAPH.entities + (tokens[0, 15] - 100 - GRAPH.entities + 1) % 8
    changed = np.abs(states(tokens) - states(other))[0].max(-1) > 1e-6
    related = guide_matrix(tokens[0], spans[0])[:, 15]
    related[0] = True
    there = tokens[0] != PAD
    np.testing.assert_array_equal(changed[there], related[there])


# -------------------------------------------------------------------------------------- ranks


def test_expected_ranks():
    draw = np.random.default_rng(0)
    scores = draw.integers(0, 4, (5, 9)).astype(np.float32)  # with many ties
    wrong = draw.random((5, 9)) < 0.6
    ranks = np.asarray(jax.jit(expected_ranks)(scores, wrong))
    for q, e in itertools.product(range(5), range(9)):
        others = scores[q, wrong[q]]
        by_hand = 1 + (others > scores[q, e]).sum() + (others == scores[q, e]).sum() / 2
        if not wrong[q, e]:
            assert ranks[q, e] == by_hand
    targets = ~wrong
    value, has = jax.jit(reciprocal_rank)(np.where(targets, 5.0, 0.0), targets, wrong)
    assert np.all(value[has] == 1) and np.array_equal(has, targets.any(1))


def test_answers_of_neither_kind():
    """Answers of the observed graph that are none of the full graph are neither right nor wrong."""
    query = Query(formula.read("r0(s0,f)"), np.array([1, 2]), np.array([2, 3]))
    batch = answer_arrays({"1p": [query]}, 5)
    scores = np.array([[0.0, 2.0, 1.0, 9.0, 1.5]])  # 3, which is neither, is ahead of all
    found = jax.jit(reciprocal_ranks)(scores, batch)
    assert found["inferred"][0][0] == 1.0  # entity 1
    assert found["known"][0][0] == 0.5  # entity 2, behind 4


# -------------------------------------------------------------------------------------- files


def test_rules_hold_in_the_graph():
    triples = {tuple(x) for x in GRAPH.triples.tolist()}
    first, second, parent = ({(h, t) for h, r, t in triples if r == i} for i in (0, 1, 5))
    composed = {(a, d) for a, b in first for c, d in second if b == c}
    assert {(h, t) for h, r, t in triples if r == 2} == composed
    for r, inverse in ((3, first), (4, second), (7, parent)):
        assert {(t, h) for h, rr, t in triples if rr == r} == inverse
    grand = {(a, d) for a, b in parent for c, d in parent if b == c}
    assert {(h, t) for h, r, t in triples if r == 6} == grand
    assert len(parent) == GRAPH.entities - 1


def test_files(tmp_path, sampled):
    (tmp_path / "stats.txt").write_text("numentity: 12\nnumrelations: 8\n")
    for name, part in zip(
        ("train", "valid", "test"), np.array_split(GRAPH.triples, 3), strict=True
    ):
        (tmp_path / f"{name}.txt").write_text("".join("\t".join(map(str, x)) + "\n" for x in part))
    (tmp_path / "ent2id.pkl").write_bytes(pickle.dumps({f"/m/{i}": i for i in range(12)}))
    (tmp_path / "id2rel.pkl").write_bytes(pickle.dumps({i: f"+r{i}" for i in range(8)}))
    folder = read_folder(tmp_path)
    assert folder.entity_names[3] == "/m/3" and folder.relation_names[7] == "+r7"
    splits = list(folder.splits.values())
    together = splits[0].joined(splits[1]).joined(splits[2])
    np.testing.assert_array_equal(together.triples, GRAPH.triples)

    kinds = {name: sampled[name] for name in ("1p", "2in", "ip", "3c")}
    write_queries(tmp_path / "train_queries.json", kinds, evaluation=False)
    write_queries(tmp_path / "test_queries.json", kinds, evaluation=True)
    found = read_queries(tmp_path / "test_queries.json")
    for name, queries in kinds.items():
        for one, other in zip(queries, found[name], strict=True):
            np.testing.assert_array_equal(one.answers, other.answers)
            np.testing.assert_array_equal(
                oracle.answers(one.query, GRAPH), oracle.answers(other.query, GRAPH)
            )
    sizes = {"data__folder": str(tmp_path), "data__entities": 12, "data__length": 36}
    types = {"data__train_types": ("1p", "2in"), "data__test_types": ("ip", "3c")}
    recipe = jaxformer.load("tega:tiny", **sizes, **types)
    batch = recipe.phases[0].data.batch(0)
    assert batch["tokens"].shape == (16, 36) and batch["answer"].shape == (16,)
    test = recipe.evaluators[0].data
    assert len(test) == 1 and set(test.batch(0)["kind"].tolist()) == {0, 1, 2, 3}

    (tmp_path / "test_queries.json").write_text(json.dumps({"1p": {"r0(s1,f)": {"x": []}}}))
    with pytest.raises(ConfigError, match="has no 'test_answers'"):
        read_queries(tmp_path / "test_queries.json")
    (tmp_path / "ent2id.pkl").write_bytes(pickle.dumps(np.array))
    with pytest.raises(ConfigError, match="no pickle of a plain dictionary"):
        read_folder(tmp_path)
    (tmp_path / "train.txt").write_text("1\t2\n")
    with pytest.raises(ConfigError, match="line 1"):
        read_folder(tmp_path)


def test_training_answers_are_observed():
    recipe = jaxformer.load("tega:tiny")
    corpus = corpus_of(ConfigDict(recipe.config))
    batch = recipe.phases[0].data.batch(3)
    half = recipe.phases[0].data.batch(3, slice(8, 16))
    for name, x in batch.items():
        np.testing.assert_array_equal(x[8:], half[name])
    triples = {tuple(x) for x in corpus.observed.triples.tolist()}
    one_p = [i for i, x in enumerate(batch["tokens"]) if x[5] == PAD]
    assert one_p
    for i in one_p:
        r, s = batch["tokens"][i][1:3]
        assert (s - 100, r - 100 - 20, batch["answer"][i]) in triples
    inferred = sum(len(np.setdiff1d(q.answers, q.observed)) for q in corpus.test["1p"])
    assert inferred >= 5


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: read_query("((r1(s1,f))&(r2(s2,f))"), "unbalanced parentheses"),
        (lambda: read_query("(r1(s1,f)))"), "unbalanced parentheses"),
        (lambda: read_query("(p,(1),(e,(2))"), "unbalanced parentheses"),
        (lambda: read_query("(r1(s1,e1))&(r2(e1,e2))"), "free variable f is not bound"),
        (lambda: read_query("!(r1(s1,f))"), "unsafe, negation alone does not bind f"),
        (lambda: read_query("(r1(s1,f))|(!(r2(s2,f)))"), "unsafe, negation alone"),
        (lambda: read_query("(r1(s1,f))&(r2(s1,f))|(r3(s1,f))"), "need parentheses"),
        (lambda: read_query("(r1(s1,f))|(r2(e1,e2))"), "sides of | must share"),
        (lambda: read_query("r1(s1,e7)"), "no variable e7"),
        (lambda: read_query("(i,(p,(1),(e,(2))))"), "needs two sets"),
        (lambda: read_query("(e,(2))"), "an entity alone"),
        (lambda: oracle.answers(formula.read("r9(s1,f)"), GRAPH), "unknown relation r9"),
        (lambda: oracle.answers(formula.read("r1(s12,f)"), GRAPH), "unknown entity s12"),
        (lambda: rows([formula.read("r9(s1,f)")], VOCABULARY, 8), "unknown relation r9"),
        (lambda: rows([formula.read(INP)], VOCABULARY, 8), "data.length=8: a query has 22"),
        (lambda: lisp.to_tree(formula.read("((r1(s1,e1))&(r2(e1,f)))&(r3(e1,f))")), "use EFO"),
        (lambda: lisp.to_tree(formula.read("((r1(s1,f))&(r2(f,e1)))&(r3(e1,f))")), "use EFO"),
        (lambda: lisp.to_tree(formula.read("(r1(s1,f))&(r2(e1,f))")), "use EFO"),
        (lambda: KnowledgeGraph(np.array([[0, 1, 9]]), 5, 2), "triple .0, 1, 9. is out of range"),
        (lambda: model_of(position="ape", typed=True), "model.typed=True: is of relative keys"),
        (lambda: model_of(guide="firm"), "model.guide='firm': must be one of"),
        (lambda: jaxformer.load("tega:tiny", data__test_types=("9p",)), "'9p': must be one of"),
        (lambda: jaxformer.load("tega:tiny", data__syntax="sql"), "data.syntax='sql'"),
    ],
)
def test_mistakes_are_named(act, said):
    with pytest.raises(ConfigError, match=said) as error:
        act()
    assert "\n" not in str(error.value)
