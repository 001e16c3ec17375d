"""Graph search: identities that must hold, and errors that must be clear."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer.analyze import patching
from jaxformer.analyze.capture import Edit, Site, capture
from jaxformer.nn.attention import Fused, Mix, Unfused
from jaxformer.nn.make import swap
from jaxformer.papers.graph_search import circuits
from jaxformer.papers.graph_search.graphs import (
    Balanced,
    Naive,
    Star,
    lookahead,
    reach,
    useful,
)
from jaxformer.papers.graph_search.merging import PathMerger
from jaxformer.papers.graph_search.model import searcher
from jaxformer.papers.graph_search.optim import sophia_g
from jaxformer.papers.graph_search.sequences import (
    DepthFirst,
    Search,
    SelectionInference,
    Tokens,
    is_held_out,
)
from jaxformer.recipe import ConfigError
from jaxformer.train.optim import signum

N, ROWS = 23, 128
TOKENS = Tokens(N)  # room for 6 vertices


def drawn(rows, seed=0, count=ROWS):
    make = jax.jit(lambda keys: rows(None, keys))
    return jax.device_get(make(jax.random.split(jax.random.key(seed), count)))


class Read:
    """A sequence, read as a person would."""

    def __init__(self, inputs):
        tokens = inputs.tolist()
        at = 0
        while tokens[at] == TOKENS.pad:
            at += 1
        self.edges = []
        while tokens[at] == TOKENS.edge:
            self.edges.append((tokens[at + 1], tokens[at + 2]))
            at += 3
        assert tokens[at] == TOKENS.query and tokens[at + 3] == TOKENS.path
        self.start, self.goal, self.said = tokens[at + 1], tokens[at + 2], tokens[at + 4 :]
        self.children = collections.defaultdict(list)
        for a, b in self.edges:
            self.children[a].append(b)

    def reaches(self, vertex):
        seen, stack = {vertex}, [vertex]
        while stack:
            new = [c for c in self.children[stack.pop()] if c not in seen]
            seen |= set(new)
            stack += new
        return seen

    def ahead(self, child):
        """The look-ahead by its definition, branch by branch."""
        branch = {c: c for c in self.children[self.start]}
        front, seen, steps = dict(branch), set(branch), 0
        while any(b != child for b in front.values()):
            steps += 1
            if self.goal in front:
                return steps
            after = {}
            for v, b in front.items():
                for c in self.children[v]:
                    if c not in seen or (c in after and b == child):
                        after[c] = b
                        seen.add(c)
            front = after
        return steps


GRAPHS = {
    "naive": Naive(TOKENS.vertices),
    "balanced": Balanced(TOKENS.vertices, 2),
    "star": Star(TOKENS.vertices, 3),
}


@pytest.fixture(scope="module")
def searches():
    return {name: drawn(Search(graphs, N)) for name, graphs in GRAPHS.items()}


@pytest.mark.parametrize("kind", GRAPHS)
def test_sequences_are_graphs_without_cycles(searches, kind):
    rows = searches[kind]
    seen = collections.Counter()
    for inputs, right, label, ahead in zip(
        *(rows[name] for name in ("inputs", "useful", "label", "difficulty")), strict=True
    ):
        read = Read(inputs)
        ids = {v for edge in read.edges for v in edge}
        assert ids <= set(range(1, TOKENS.vertices + 1)) and len(set(read.edges)) == len(read.edges)
        assert all(v not in read.reaches(c) for v in ids for c in read.children[v])
        assert read.said == [read.start] and read.goal in read.reaches(read.start)
        wanted = {c for c in read.children[read.start] if read.goal in read.reaches(c)}
        assert set(np.flatnonzero(right).tolist()) == wanted and label in wanted
        assert int(ahead) in {read.ahead(c) for c in wanted}
        seen[int(ahead)] += 1
    if kind == "balanced":
        assert set(seen) == {0, 1, 2} and min(seen.values()) > ROWS / 6


def test_orders_and_ids_are_random(searches):
    starts = searches["balanced"]["inputs"][:, -1]
    assert set(np.unique(starts)) == set(range(1, TOKENS.vertices + 1))
    again = drawn(Search(GRAPHS["star"], N))
    np.testing.assert_array_equal(again["inputs"], searches["star"]["inputs"])


def test_held_out_sequences_are_never_drawn(searches):
    inputs = searches["balanced"]["inputs"]
    share = np.asarray(is_held_out(inputs)).mean()
    assert 0.01 < share < 0.2
    stars = GRAPHS["star"]  # the quickest to compile
    test = drawn(Search(stars, N, held_out=True), count=32)
    train = drawn(Search(stars, N, held_out=False), count=ROWS)
    assert np.all(is_held_out(test["inputs"])) and not np.any(is_held_out(train["inputs"]))


def test_new_names_for_vertices_rename_the_answers():
    """Another permutation of the vertices permutes reachability and what is useful."""
    edge = np.zeros((6, 6), bool)
    for a, b in ((0, 1), (1, 2), (0, 3), (3, 4), (2, 5)):
        edge[a, b] = True
    order = np.random.default_rng(0).permutation(6)
    moved = np.zeros_like(edge)
    moved[np.ix_(order, order)] = edge
    np.testing.assert_array_equal(reach(jnp.array(moved))[np.ix_(order, order)], reach(edge))
    plain = useful(jnp.array(edge), 0, 5)
    other = useful(jnp.array(moved), order[0], order[5])
    np.testing.assert_array_equal(other[order], plain)
    np.testing.assert_array_equal(np.flatnonzero(plain), [1])
    assert (
        lookahead(jnp.array(edge), 0, 1, 5) == 2
    )  # the goal is 3 away, the other branch ends at 2
    assert lookahead(jnp.array(moved), order[0], order[1], order[5]) == 2


def test_traces_of_depth_first_search():
    rows = drawn(DepthFirst(40), count=64)
    tokens = Tokens(40)
    for inputs, right, back in zip(rows["inputs"], rows["useful"], rows["difficulty"], strict=True):
        text = inputs.tolist()
        edges = circuits.edges_of(text, tokens)
        at = text.index(tokens.query)
        trace, goal = text[at + 4 :], text[at + 2]
        children = collections.defaultdict(set)
        for a, b in edges:
            children[a].add(b)
        assert trace[0] == text[at + 1] and goal not in trace and len(set(trace)) == len(trace)
        for i in range(1, len(trace) + 1):
            fresh = [v for v in reversed(trace[:i]) if children[v] - set(trace[:i])]
            options = children[fresh[0]] - set(trace[:i])
            if i < len(trace):
                assert trace[i] in options
        assert set(np.flatnonzero(right).tolist()) == options
        assert back == len(trace) - 1 - trace.index(fresh[0])


def test_selection_and_inference():
    rows = drawn(SelectionInference(40), count=64)
    tokens, kinds = Tokens(40), collections.Counter()
    for inputs, right, size in zip(rows["inputs"], rows["useful"], rows["difficulty"], strict=True):
        text = inputs.tolist()
        edges = set(circuits.edges_of(text, tokens))
        at = text.index(tokens.query)
        said, seen = text[at + 4 :], {text[at + 1]}
        for a, b in zip(said[::2], said[1::2], strict=False):
            assert (a, b) in edges and a in seen and b not in seen
            seen.add(b)
        fresh = {(a, b) for a, b in edges if a in seen and b not in seen}
        inferring = len(said) % 2
        wanted = {b for a, b in fresh if a == said[-1]} if inferring else {a for a, _ in fresh}
        assert set(np.flatnonzero(right).tolist()) == wanted and size == len(wanted)
        kinds[inferring] += 1
    assert min(kinds.values()) > 16


@pytest.fixture(scope="module")
def model():
    net = swap(searcher(words=TOKENS.words, length=N, hidden=4, depth=1), Fused, Unfused)
    tokens = jnp.zeros((1, N), jnp.int32) + 1
    return net, net.init(jax.random.key(0), tokens)


def test_padding_is_not_read(searches, model):
    """What stands at padded positions changes nothing elsewhere, as nobody reads it."""
    net, variables = model
    inputs = searches["balanced"]["inputs"][:8]
    embed = Site("^embed$")
    padded = (inputs == TOKENS.pad)[..., None]
    assert padded.any()
    edit = Edit(embed, lambda x: jnp.where(padded, 7.0, x))
    other = capture(net, variables, inputs, edits=[edit]).output
    plain = net.apply(variables, inputs)
    np.testing.assert_allclose(np.where(padded, 0, other), np.where(padded, 0, plain), atol=1e-5)


def test_a_weight_edited_to_itself_changes_nothing(searches, model):
    net, variables = model
    one = searches["balanced"]["inputs"][:1]
    seen = capture(net, variables, one, sites=[patching.WEIGHTS]).values[0]
    edits = patching.held(patching.WEIGHTS, seen)
    edits.append(Edit(Site(kind=Mix, argument=0), lambda p: p.at[0, 0, 3, 4].set(p[0, 0, 3, 4])))
    output = capture(net, variables, one, edits=edits).output
    np.testing.assert_array_equal(output, net.apply(variables, one))


def test_the_optimiser_is_sophia_without_its_hessian():
    params = {"w": jax.random.normal(jax.random.key(0), (5, 4)), "v": jnp.ones(3)}
    ours, theirs = signum()(0.01, 0.1), sophia_g(0.01)
    a, b = params, params
    s, t = ours.init(a), theirs.init(b)
    for i in range(4):
        key = jax.random.key(i)
        grads = jax.tree.map(lambda x, k=key: jax.random.normal(k, x.shape), params)
        grads["v"] = grads["v"].at[0].set(0.0)  # whose momentum stays 0: it only decays
        u, s = ours.update(grads, s, a)
        w, t = theirs.update(grads, t, b)
        a, b = (jax.tree.map(jnp.add, x, y) for x, y in ((a, u), (b, w)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-7), a, b)
    np.testing.assert_allclose(a["v"][0], (1 - 0.01 * 0.1) ** 4, rtol=1e-6)


def test_paths_merged_by_hand():
    """Right as far ahead as 2^(layers - 1), and not further."""
    rows = drawn(Search(Balanced(9, 4), 32), count=256)
    right = {}
    for depth in (1, 2, 3):
        net = PathMerger(32, depth)
        logits = jax.jit(lambda x, net=net: net.apply({}, x))(rows["inputs"])[:, -1]
        said = np.asarray(logits.argmax(-1))[:, None]
        right[depth] = np.take_along_axis(rows["useful"], said, 1)[:, 0]
        near = rows["difficulty"] <= 2 ** (depth - 1)
        assert right[depth][near].all()
    assert right[1].mean() < right[2].mean() < right[3].mean() == 1


def test_its_circuit_is_explained(searches, model):
    """And one of random weights is not; an input that uses all ids is refused."""
    rows = searches["balanced"]
    net = PathMerger(N, 2)
    free = [
        x
        for x, ahead in zip(rows["inputs"], rows["difficulty"], strict=True)
        if ahead == 2 and len({*x.tolist()} & set(range(1, 7))) < 6
    ]
    for inputs in free[:2]:
        circuit = circuits.extract(net, {}, inputs)
        merged = circuits.check(circuit, inputs)
        assert circuit.ops and merged.share == 1.0 and merged.finds
        broken = circuits.Circuit(circuit.said, dict(list(circuit.ops.items())[:1]))
        assert not circuits.check(broken, inputs).finds
    random = circuits.extract(*model, free[0])
    assert not circuits.check(random, free[0]).finds
    full = next(x for x in rows["inputs"] if len({*x.tolist()} & set(range(1, 7))) == 6)
    with pytest.raises(circuits.NoUnusedVertex, match="all 6 vertices"):
        circuits.extract(net, {}, full)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: Tokens(10).vertices, r"data\.length=10: must be at least 11"),
        (lambda: Balanced(6, 3), r"data\.lookahead=3: .* allowed: 0 to 2"),
        (lambda: load(data__graphs="star", data__lookahead=-1), r"data\.lookahead=-1: chains"),
        (
            lambda: load(data__graphs="star", data__task="depth_first"),
            r"data\.graphs='star': .*'depth_first'",
        ),
        (lambda: load(data__graphs="naive"), r"data\.lookahead=1: naive graphs .* give -1"),
        (lambda: load(data__task="depth_first"), r"data\.graphs='balanced': balances look-ahead"),
        (lambda: load(data__graphs="rings"), r"data\.graphs='rings': must be one of balanced"),
        (lambda: load(model__ablate="all"), r"model\.ablate='all': must be one of none"),
        (lambda: DepthFirst(40, graphs=Star(6, 2)), r"data\.graphs='star'"),
    ],
)
def test_mistakes_are_named(act, said):
    with pytest.raises(ConfigError, match=said):
        act()


def load(**fields):
    return jaxformer.load("graph_search:tiny", **fields)


def test_phases_of_a_curriculum():
    recipe = load(data__curriculum=True, data__length=23, data__lookahead=2, data__tested=2)
    assert [(phase.name, phase.steps) for phase in recipe.phases] == [
        ("lookahead_1", 30),
        ("lookahead_2", 30),
    ]


def test_several_heads_have_no_circuit(searches):
    net = swap(searcher(words=11, length=N, hidden=6, depth=1, heads=2), Fused, Unfused)
    variables = net.init(jax.random.key(0), jnp.zeros((1, N), jnp.int32))
    inputs = next(
        x for x in searches["balanced"]["inputs"] if len({*x.tolist()} & set(range(1, 7))) < 6
    )
    with pytest.raises(ConfigError, match=r"model\.heads=2"):
        circuits.extract(net, variables, inputs)
