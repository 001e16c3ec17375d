"""Graphs as sequences of tokens, with what to say next: rows for `DeviceData` (section 3, 6).

Ids are 1 .. V, then PATH, EDGE, PAD and QUERY; 0 is never used. A sequence is the edges in random
order, "EDGE s t", then "QUERY start goal PATH" and what was said so far, padded at the left. Rows
are {"inputs": (n,), "label": (), "useful": (V + 5,), "difficulty": ()}: any useful token is right,
the label is one of them at random.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxformer.errors import ConfigError
from jaxformer.papers.graph_search.graphs import (
    Graph,
    Graphs,
    Naive,
    Star,
    integer,
    largest,
    lookahead,
    places,
    shortest,
    useful,
)
from jaxformer.recipe import Batch

HELD_OUT = 16


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of sequences of `length`."""

    length: int

    @property
    def vertices(self) -> int:
        return largest(self.length)

    @property
    def path(self) -> int:
        return self.vertices + 1

    @property
    def edge(self) -> int:
        return self.vertices + 2

    @property
    def pad(self) -> int:
        return self.vertices + 3

    @property
    def query(self) -> int:
        return self.vertices + 4

    @property
    def words(self) -> int:
        return self.vertices + 5


class Said(NamedTuple):
    """What was said so far of `room` tokens, (room,) and how many; what may follow, (V,)."""

    tokens: jax.Array
    count: jax.Array
    useful: jax.Array
    difficulty: jax.Array


def written(
    u: jax.Array, tokens: Tokens, graph: Graph, ids: jax.Array, said: Said
) -> dict[str, jax.Array]:
    """A row of a graph whose vertices have `ids` (V',); V' may be less than V.

    `u` are uniform numbers (V' V' + V',): for the order of edges, and the label.
    """
    n, size = tokens.length, len(graph.edge)
    order = jnp.argsort(jnp.where(graph.edge.ravel(), u[: size * size], 2.0))
    source, target = (ids[x] for x in jnp.unravel_index(order, (size, size)))
    edges = graph.edge.sum()
    at = jnp.arange(n)
    which = jnp.minimum(at // 3, size * size - 1)
    triple = jnp.stack([jnp.full_like(which, tokens.edge), source[which], target[which]], -1)
    question = jnp.array([tokens.query, 0, 0, tokens.path]).at[1].set(ids[graph.start])
    tail = jnp.concatenate([question.at[2].set(ids[graph.goal]), said.tokens])
    after = at - 3 * edges
    text = jnp.where(
        after < 0,
        jnp.take_along_axis(triple, (at % 3)[:, None], 1)[:, 0],
        tail[jnp.clip(after, 0, len(tail) - 1)],
    )
    count = 3 * edges + 4 + said.count
    inputs = jnp.roll(jnp.where(at < count, text, tokens.pad), n - count)
    right = jnp.zeros(tokens.words).at[ids].set(said.useful.astype(jnp.float32))
    label = ids[jnp.argmax(jnp.where(said.useful, u[size * size :], -1.0))]
    return {
        "inputs": inputs.astype(jnp.int32),
        "label": label.astype(jnp.int32),
        "useful": right,
        "difficulty": said.difficulty.astype(jnp.int32),
        "kept": graph.kept & (count <= n) & said.useful.any(),
    }


def hidden(
    key: jax.Array, graphs: Graphs, tokens: Tokens, more: int = 0
) -> tuple[Graph, jax.Array, jax.Array]:
    """A graph, ids for its vertices (V',), and uniform numbers for what else is to be drawn.

    Those are V' (V' + 2), and with `more` so many times V' beside V' V'.
    """
    for_graph, for_rest = jax.random.split(key)
    graph = graphs(for_graph)
    size = len(graph.edge)
    count = tokens.vertices + size * (size + 1) + size * (size + more if more else 1)
    u = jax.random.uniform(for_rest, (count,))
    ids = 1 + places(u[: tokens.vertices])[:size]
    return graph, ids, u[tokens.vertices :]


Drawn = Callable[[jax.Array], dict[str, jax.Array]]


def until_kept(drawn: Drawn, key: jax.Array) -> dict[str, jax.Array]:
    """The first row that is kept, of as many draws as it takes."""

    def again(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        return state[0] + 1, drawn(jax.random.fold_in(key, state[0]))

    # Begins with a row that is not kept, not with a draw: the drawing is compiled once then.
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(drawn, key))
    start = (jnp.zeros((), jnp.int32), nothing)
    row = jax.lax.while_loop(lambda state: ~state[1]["kept"], again, start)[1]
    return {name: value for name, value in row.items() if name != "kept"}


def fingerprint(inputs: jax.Array) -> jax.Array:
    """(..., 2) uint32 of sequences (..., n): of two that differ, it differs but by chance 2^-64."""
    at = jnp.arange(1, inputs.shape[-1] + 1, dtype=jnp.uint32)

    def mixed(x: jax.Array, by: int) -> jax.Array:
        x = (x ^ (x >> 15)) * jnp.uint32(by)
        return x ^ (x >> 13)

    both = []
    for by in (0x2C1B3C6D, 0x297A2D39):
        each = mixed(mixed(inputs.astype(jnp.uint32) + at * jnp.uint32(0x9E3779B9), by), by)
        both.append(each.sum(-1, dtype=jnp.uint32))
    return jnp.stack(both, -1)


def is_held_out(inputs: jax.Array) -> jax.Array:
    """(...,): whether sequences (..., n) are for tests alone, as one in `HELD_OUT` is."""
    return fingerprint(inputs)[..., 0] % HELD_OUT == 0


@dataclasses.dataclass(frozen=True)
class Search:
    """The next vertex on a way to the goal; the difficulty is the look-ahead.

    Only the start is said so far. With `held_out` False none of the sequences kept for tests is
    drawn, with True no other.
    """

    graphs: Graphs
    length: int
    held_out: bool | None = None

    def __call__(self, step_key: jax.Array, row_keys: jax.Array) -> Batch:
        del step_key
        return jax.vmap(lambda key: until_kept(self.drawn, key))(row_keys)

    def drawn(self, key: jax.Array) -> dict[str, jax.Array]:
        tokens = Tokens(self.length)
        graph, ids, u = hidden(key, self.graphs, tokens)
        child = shortest(u[-len(ids) :], graph.edge, graph.start, graph.goal)
        said = Said(
            ids[graph.start][None],
            jnp.ones((), jnp.int32),
            useful(graph.edge, graph.start, graph.goal),
            lookahead(graph.edge, graph.start, child, graph.goal),
        )
        row = written(u[: -len(ids)], tokens, graph, ids, said)
        if self.held_out is not None:
            row["kept"] &= is_held_out(row["inputs"]) == self.held_out
        return row


class Walk(NamedTuple):
    """A search under way: when each vertex was seen (0: not yet), and what is said (T,)."""

    seen: jax.Array
    said: jax.Array
    count: jax.Array


def fresh_children(edge: jax.Array, seen: jax.Array) -> jax.Array:
    """(V, V): edges from vertices that were seen to those that were not."""
    return edge & (seen > 0)[:, None] & (seen == 0)[None, :]


@dataclasses.dataclass(frozen=True)
class DepthFirst:
    """The next vertex of a depth-first search for the goal (section 6.1).

    Right is any new child of the latest vertex that has some; the difficulty is how far back in
    the trace that one is. The trace is cut anywhere before its end.

    Raises:
        ConfigError: star graphs, which have no trace worth following.
    """

    length: int
    max_difficulty: int | None = None  # each up to it alike; None: as they come
    graphs: Graphs | None = None

    def __post_init__(self) -> None:
        if isinstance(self.graphs, Star):
            raise ConfigError("data.graphs='star': a depth-first trace needs 'naive' or 'balanced'")
        largest(self.length)

    @property
    def room(self) -> int:
        """Vertices and edges there may be: each has three tokens as an edge, one in the trace."""
        return max((self.length - 4) // 4, 2)

    def __call__(self, step_key: jax.Array, row_keys: jax.Array) -> Batch:
        del step_key
        return jax.vmap(self._row)(row_keys)

    def _row(self, key: jax.Array) -> dict[str, jax.Array]:
        if self.max_difficulty is None:
            return until_kept(self.drawn, key)
        for_want, for_rows = jax.random.split(key)
        want = jax.random.randint(for_want, (), 0, self.max_difficulty + 1)

        def wanted(key: jax.Array) -> dict[str, jax.Array]:
            row = self.drawn(key)
            return row | {"kept": row["kept"] & (row["difficulty"] == want)}

        return until_kept(wanted, for_rows)

    def drawn(self, key: jax.Array) -> dict[str, jax.Array]:
        tokens = Tokens(self.length)
        graph, ids, u = hidden(key, self.graphs or Naive(self.room, self.room), tokens, more=2)
        size = len(ids)
        u, for_walk = u[: size * size + size], u[size * size + size :].reshape(-1, size)

        def visit(walk: Walk, u: jax.Array) -> tuple[Walk, None]:
            fresh = fresh_children(graph.edge, walk.seen)
            latest = jnp.argmax(jnp.where(fresh.any(1), walk.seen, 0))
            options = fresh[latest]
            # A goal in reach is taken at once, and ends the search.
            score = u + (jnp.arange(size) == graph.goal)
            child = jnp.argmax(jnp.where(options, score, -1.0))
            going = options.any() & (walk.seen[graph.goal] == 0)
            seen = walk.seen.at[child].set(walk.count + 1)
            said = walk.said.at[walk.count].set(child)
            after = Walk(seen, said, walk.count + 1)
            return jax.tree.map(lambda a, b: jnp.where(going, a, b), after, walk), None

        start = Walk(
            (jnp.arange(size) == graph.start).astype(jnp.int32),
            jnp.zeros(size, jnp.int32).at[0].set(graph.start),
            jnp.ones((), jnp.int32),
        )
        walk, _ = jax.lax.scan(visit, start, for_walk[:size])
        count = integer(for_walk[size, 0], 1, walk.count)
        seen = jnp.where(walk.seen <= count, walk.seen, 0)
        fresh = fresh_children(graph.edge, seen)
        latest = jnp.argmax(jnp.where(fresh.any(1), seen, 0))
        said = Said(ids[walk.said], count, fresh[latest], count - seen[latest])
        return written(u, tokens, graph, ids, said)


@dataclasses.dataclass(frozen=True)
class SelectionInference:
    """A search by two kinds of steps, one of which is asked for (section 6.2).

    Selection: a vertex that was seen and has new children, of which the difficulty is how many
    there are. Inference: one of the new children of the vertex selected last, where it is how many
    of those there are. What is said so far are pairs of a selected vertex and the child that was
    inferred, and, if the next step is an inference, a selected vertex.

    Raises:
        ConfigError: star graphs.
    """

    length: int
    graphs: Graphs | None = None

    def __post_init__(self) -> None:
        if isinstance(self.graphs, Star):
            raise ConfigError("data.graphs='star': selection needs 'naive' or 'balanced' graphs")
        largest(self.length)

    @property
    def room(self) -> int:
        return max((self.length - 5) // 5, 2)

    def __call__(self, step_key: jax.Array, row_keys: jax.Array) -> Batch:
        del step_key
        return jax.vmap(lambda key: until_kept(self.drawn, key))(row_keys)

    def drawn(self, key: jax.Array) -> dict[str, jax.Array]:
        tokens = Tokens(self.length)
        graph, ids, u = hidden(key, self.graphs or Naive(self.room, self.room), tokens, more=2)
        size = len(ids)
        u, for_walk = u[: size * size + size], u[size * size + size :].reshape(-1, size)
        steps, inferring = integer(for_walk[size, 0], 0, size), for_walk[size, 1] < 0.5

        def step(walk: Walk, at: tuple[jax.Array, jax.Array]) -> tuple[Walk, None]:
            u, i = at
            fresh = fresh_children(graph.edge, walk.seen).at[:, graph.goal].set(False)
            # A vertex that has new children, then one of them.
            source = jnp.argmax(jnp.where(fresh.any(1), u, -1.0))
            child = jnp.argmax(jnp.where(fresh[source], u[::-1], -1.0))
            going = fresh.any() & (i < steps)
            said = walk.said.at[walk.count].set(source).at[walk.count + 1].set(child)
            after = Walk(walk.seen.at[child].set(i + 2), said, walk.count + 2)
            return jax.tree.map(lambda a, b: jnp.where(going, a, b), after, walk), None

        start = Walk(
            (jnp.arange(size) == graph.start).astype(jnp.int32),
            jnp.zeros(2 * size + 1, jnp.int32),
            jnp.zeros((), jnp.int32),
        )
        walk, _ = jax.lax.scan(step, start, (for_walk[:size], jnp.arange(size)))
        fresh = fresh_children(graph.edge, walk.seen)
        frontier = fresh.any(1)
        chosen = jnp.argmax(jnp.where(frontier, for_walk[size + 1], -1.0))
        said = Said(
            ids[jnp.where(inferring, walk.said.at[walk.count].set(chosen), walk.said)],
            walk.count + inferring,
            jnp.where(inferring, fresh[chosen], frontier),
            jnp.where(inferring, fresh[chosen].sum(), frontier.sum()),
        )
        return written(u, tokens, graph, ids, said)
