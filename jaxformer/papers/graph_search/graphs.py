"""Random directed graphs without cycles, with a start and a goal (sections 3.1 and 3.2).

All of it is made on the device, a graph at a time under `vmap`, from one draw of uniform numbers:
with a draw for each decision, drawing took 8 s to compile. Graphs have room for V vertices;
`edge[i, j]` is an edge from i to j. Vertices are numbered as they were made, which the sequences
hide by giving them ids at random.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxformer.errors import ConfigError

ALPHA = 0.5  # how likely a vertex without edges is drawn beside one that has them
SPREAD = 4  # parents and children are fewer than so many


class Graph(NamedTuple):
    """edge (V, V) bool, start and goal (); `kept` is whether it is one of its distribution."""

    edge: jax.Array
    start: jax.Array
    goal: jax.Array
    kept: jax.Array


class Graphs(Protocol):
    """A distribution of graphs: of as many as it takes, the first that is `kept`."""

    vertices: int

    def __call__(self, key: jax.Array) -> Graph: ...


def largest(length: int) -> int:
    """V: the vertices, and edges, that a sequence has room for."""
    if length < 11:
        raise ConfigError(f"data.length={length}: must be at least 11, the room for two edges")
    return (length - 5) // 3


def reach(edge: jax.Array) -> jax.Array:
    """(V, V): whether j can be reached from i; every vertex reaches itself."""
    size = len(edge)
    known = edge | jnp.eye(size, dtype=bool)
    for _ in range(max(size - 1, 1).bit_length()):
        known = (known.astype(jnp.float32) @ known.astype(jnp.float32)) > 0
    return known


def distance(edge: jax.Array, goal: jax.Array) -> jax.Array:
    """(V,): how many edges from each vertex to the goal; V where there is no path."""
    size = len(edge)

    def relax(_: int, far: jax.Array) -> jax.Array:
        return jnp.minimum(far, jnp.where(edge, far[None, :] + 1, size).min(1))

    return jax.lax.fori_loop(0, size, relax, jnp.where(jnp.arange(size) == goal, 0, size))


def useful(edge: jax.Array, vertex: jax.Array, goal: jax.Array) -> jax.Array:
    """(V,): which vertices are children of a vertex from which the goal can be reached."""
    return edge[vertex] & reach(edge)[:, goal]


def lookahead(edge: jax.Array, vertex: jax.Array, child: jax.Array, goal: jax.Array) -> jax.Array:
    """How many steps of breadth-first search tell that `child` is the right one.

    The search begins at the children. It ends where the goal is met, or where all that it still
    follows began at `child`; what is reached along several ways counts as reached by `child`.
    """
    at = jnp.arange(len(edge))

    def searching(state: tuple[jax.Array, ...]) -> jax.Array:
        front, _, right, _, found = state
        return ~found & (front & ~right).any()

    def expand(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        front, seen, right, steps, _ = state
        after = (edge & front[:, None]).any(0) & ~seen
        right = (edge & (front & right)[:, None]).any(0) & after
        return after, seen | after, right, steps + 1, front[goal]

    first = edge[vertex]
    start = (first, first, first & (at == child), jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    return jax.lax.while_loop(searching, expand, start)[3]


def integer(u: jax.Array, low: Any, high: Any) -> jax.Array:
    """`low` to `high` - 1, of uniform numbers."""
    count = jnp.maximum(high - low, 1)
    return low + jnp.minimum(jnp.floor(u * count), count - 1).astype(jnp.int32)


def places(score: jax.Array) -> jax.Array:
    """(V,): how many scores are above each; 0 is that of the highest."""
    ahead = score[None, :] > score[:, None]
    same = (score[None, :] == score[:, None]) & jnp.tri(len(score), k=-1, dtype=bool)
    return (ahead | same).sum(1)


def chosen(u: jax.Array, weight: jax.Array, count: jax.Array) -> jax.Array:
    """(V,): `count` of them, as if drawn one after another by weight without putting them back.

    Those of weight 0 are never drawn (Vieira 2014, "Gumbel-max trick and weighted reservoir").
    """
    score = jnp.log(weight) - jnp.log(-jnp.log(jnp.clip(u, 1e-7, 1 - 1e-6)))
    return (places(score) < count) & (weight > 0)


@dataclasses.dataclass(frozen=True)
class Naive:
    """Each vertex has a parent among those before it, and with probability 1/2 maybe more."""

    vertices: int
    max_edges: int | None = None

    def __call__(self, key: jax.Array) -> Graph:
        V = self.vertices
        u, at = jax.random.uniform(key, (V + 4, V)), jnp.arange(V)
        count = integer(u[0, 0], min(3, V - 1), V)
        parents = jnp.where(u[1] < 0.5, 1, integer(u[2], 1, SPREAD))
        before = (at[None, :] < at[:, None]).astype(jnp.float32)
        edge = jax.vmap(chosen)(u[4:], before, parents).T & (at < count)[None, :]
        ends = jnp.where(at < count - 1, u[3], -at - 1.0)
        start, goal = (jnp.argmax(places(ends) == i) for i in (0, 1))
        kept = reach(edge)[start, goal] & (edge.sum() <= _most(self)) & (count > 2)
        return Graph(edge, start, goal, kept)


@dataclasses.dataclass(frozen=True)
class Balanced:
    """Graphs of every look-ahead alike, 0 to `lookahead`; of one alone with `only`.

    A start with several chains of at least as many edges, one to the goal, a chain of at most
    `max_prefix` into it, and vertices with edges at random beside. What has too many edges, or by
    them another look-ahead, is not kept.

    Raises:
        ConfigError: two chains of the look-ahead do not fit.
    """

    vertices: int
    lookahead: int
    only: int | None = None
    max_edges: int | None = None
    max_prefix: int | None = None

    def __post_init__(self) -> None:
        if self.lookahead < 0 or 1 + 2 * self.lookahead > self.vertices:
            raise ConfigError(
                f"data.lookahead={self.lookahead}: two paths of that many edges need "
                f"1 + 2 data.lookahead vertices, and there is room for {self.vertices}; allowed: "
                f"0 to {(self.vertices - 1) // 2}"
            )
        if self.only is not None and not 0 <= self.only <= self.lookahead:
            raise ConfigError(f"only={self.only}: must be in 0 to data.lookahead={self.lookahead}")

    def __call__(self, key: jax.Array) -> Graph:
        V, most = self.vertices, _most(self)
        at, zero = jnp.arange(V), jnp.zeros((), jnp.int32)
        u = jax.random.uniform(key, (V + 1, 2 * V + 4))
        ahead = integer(u[0, 0], 0, self.lookahead + 1) if self.only is None else zero + self.only
        most_paths = jnp.maximum((most - 1) // jnp.maximum(ahead, 1), 2)
        paths = jnp.where(ahead == 0, 1, integer(u[0, 1], 2, most_paths + 1))
        span = ahead * paths
        count = jnp.minimum(span + 1 + integer(u[0, 2], 0, 6), V)
        count = jnp.maximum(jnp.minimum(count, most + 1), jnp.maximum(2, 1 + span))
        parent, made = _chains(u[0, 4 : V + 4], jnp.maximum(ahead, 1), paths, count)
        edge = (parent[None, :] == at[:, None]) & (at < made)[None, :] & (at > 0)[None, :]

        room = jnp.maximum(count - made, 0)
        limit = room if self.max_prefix is None else jnp.minimum(room, self.max_prefix)
        prefix = integer(u[0, 3], 0, limit + 1)
        before = (at >= made) & (at < made + prefix)
        to = jnp.where(at == made, 0, at - 1)
        edge |= before[:, None] & (to[:, None] == at[None, :])
        edge = _scatter(u[1:], edge, made + prefix, count)

        goal = jnp.maximum(ahead, 1)
        child = shortest(u[0, V + 4 :], edge, zero, goal)
        fits = (edge.sum() <= most) & (1 + span <= V)
        return Graph(edge, zero, goal, fits & (lookahead(edge, zero, child, goal) == ahead))


def _chains(
    u: jax.Array, ahead: jax.Array, paths: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The parent of each vertex of the chains out of vertex 0, and how many vertices they have.

    The first has `ahead` edges, others that many or one more, where there is room.
    """

    def grow(state: tuple[jax.Array, ...], i: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
        chain, place, size, made = state
        fresh = place == size
        room = count - i - (paths - chain - 1) * ahead
        own = ahead + ((room >= 1) & (u[i] < 0.5))
        chain, size = jnp.where(fresh, chain + 1, chain), jnp.where(fresh, own, size)
        place = jnp.where(fresh, 1, place + 1)
        made = jnp.where(chain < paths, i + 1, made)
        return (chain, place, size, made), jnp.where(fresh, 0, i - 1)

    zero = jnp.zeros((), jnp.int32)
    start = (zero, zero, ahead, zero + 1)
    (_, _, _, made), parent = jax.lax.scan(grow, start, jnp.arange(1, len(u)))
    return jnp.concatenate([jnp.zeros(1, parent.dtype), parent]), made


def _scatter(u: jax.Array, edge: jax.Array, first: jax.Array, count: jax.Array) -> jax.Array:
    """Vertices `first` to `count`, each with children and parents among those before it.

    The more edges a vertex has, the likelier it is drawn; what would come after the new vertex is
    not drawn as its parent. `u` is (V, 2 V + 4).
    """
    V = len(edge)
    at = jnp.arange(V)

    def add(state: tuple[jax.Array, jax.Array], i: jax.Array) -> Any:
        edge, known = state
        for_child, for_parent, rest = u[i, :V], u[i, V : 2 * V], u[i, 2 * V :]
        children = integer(rest[0], 0, SPREAD)
        parents = integer(rest[1], jnp.where(children == 0, 1, 0), SPREAD)
        before = at < i
        child = chosen(for_child, jnp.where(before, ALPHA + edge.sum(0), 0.0), children)
        below = (known & child[:, None]).any(0)
        free = before & ~below
        parent = chosen(for_parent, jnp.where(free, ALPHA + edge.sum(1), 0.0), parents)
        own = at == i
        new = edge | (own[:, None] & child[None, :]) | (parent[:, None] & own[None, :])
        above = (known & parent[None, :]).any(1) | own
        grown = known | (above[:, None] & (below | own)[None, :])
        is_new = (i >= first) & (i < count)
        return (jnp.where(is_new, new, edge), jnp.where(is_new, grown, known)), None

    (edge, _), _ = jax.lax.scan(add, (edge, reach(edge)), at)
    return edge


def shortest(u: jax.Array, edge: jax.Array, vertex: jax.Array, goal: jax.Array) -> jax.Array:
    """A child of a vertex on one of the shortest paths to the goal, by uniform numbers (V,)."""
    far = distance(edge, goal)
    right = edge[vertex] & (far == far[vertex] - 1)
    return jnp.argmax(jnp.where(right, u, -1.0))


@dataclasses.dataclass(frozen=True)
class Star:
    """A start with disjoint chains of equal length, the goal at the end of one.

    Lengths up to `lookahead` and numbers of chains that fit are all equally likely, as pairs.
    """

    vertices: int
    lookahead: int

    def __post_init__(self) -> None:
        if not 1 <= self.lookahead < self.vertices:
            raise ConfigError(
                f"data.lookahead={self.lookahead}: chains of a star have 1 to "
                f"{self.vertices - 1} edges here; look-ahead is theirs, so that -1 is none"
            )

    def __call__(self, key: jax.Array) -> Graph:
        V = self.vertices
        pairs = [(l, k) for l in range(1, self.lookahead + 1) for k in range(1, (V - 1) // l + 1)]
        length, spokes = jnp.array(pairs)[jax.random.randint(key, (), 0, len(pairs))]
        at = jnp.arange(V)
        parent = jnp.where((at - 1) % length == 0, 0, at - 1)
        inside = (at > 0) & (at <= length * spokes)
        edge = (parent[None, :] == at[:, None]) & inside[None, :]
        return Graph(edge, jnp.zeros((), jnp.int32), length, jnp.ones((), bool))


def _most(graphs: Naive | Balanced) -> int:
    return graphs.vertices if graphs.max_edges is None else graphs.max_edges
