"""Which attention a prediction owes to, and whether merging of paths explains it (section 4).

An op is that one token (`dst`) reads another (`src`) in a layer. Those that matter are found by
editing one attention weight after another, and traced back from the last token of the last layer.
What an op goes by is found by taking features away from the input: the tokens of one vertex, or one
position. Models are open to interception, with attention of one head and an `OneHot` embedding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.analyze import patching
from jaxformer.analyze.capture import BLOCKS, Edit, Run, Site, Values, capture, only, passed
from jaxformer.errors import ConfigError
from jaxformer.nn.attention import Scores
from jaxformer.papers.graph_search.model import OneHot
from jaxformer.papers.graph_search.sequences import Tokens

LOGIT = 0.4  # a fall of the logit that matters
SCORE = 1 / 20  # of a score q k of the last layer, in sqrt(D)
FEATURE = 1 / 10  # a change of a score that shows what it goes by, in sqrt(D)
SIDES = (Site(kind=Scores, argument=0), Site(kind=Scores, argument=1))  # queries and keys


class NoUnusedVertex(ValueError):
    """A sequence that uses every id: none is left to put in the place of another."""


class Op(NamedTuple):
    """In `layer` the token at `dst` reads that at `src`; if not `positive`, it must not."""

    layer: int
    dst: int
    src: int
    positive: bool = True


Feature = tuple[str, int]  # ("vertex", id) or ("position", p)


class Reason(NamedTuple):
    """What the two sides of an op go by."""

    dst: frozenset[Feature]
    src: frozenset[Feature]

    @property
    def matched(self) -> frozenset[int]:
        """The vertices that both sides go by."""
        return frozenset(x for kind, x in self.dst & self.src if kind == "vertex")


@dataclasses.dataclass(frozen=True)
class Circuit:
    """What was said, and the ops that it owes to with their reasons, from the last layer down."""

    said: int
    ops: Mapping[Op, Reason]


def extract(model: Any, variables: Any, inputs: Any) -> Circuit:
    """The circuit of a prediction for one sequence of tokens (n,).

    Raises:
        NoUnusedVertex: the sequence uses all vertices.
        ConfigError: attention of several heads.
    """
    inputs = jnp.asarray(inputs)
    spare = unused(inputs)
    depth, n = len(passed(model, variables, inputs[None], site=BLOCKS)), len(inputs)

    found = {
        (layer, to): jax.device_get(effects(model, variables, inputs, layer, to))
        for layer in range(depth)
        for to in patching.EDGES
        if layer < depth - 1 or to == "zero"
    }
    plain = found[depth - 1, "zero"]
    finals = np.flatnonzero(plain["logit"][-1] > LOGIT)
    finals = finals if len(finals) else plain["logit"][-1].argmax()[None]
    important = [op for layer in range(depth - 1) for op in _important(found, layer, finals)]
    important += [Op(depth - 1, n - 1, int(src)) for src in finals]
    ops = connected(important, n - 1)
    return Circuit(int(plain["said"]), reasons(model, variables, inputs, spare, ops))


def _run(model: Any, variables: Any, inputs: jax.Array, sites: Sequence[Site], **how: Any) -> Run:
    return capture(model, variables, inputs[None], sites=sites, **how)


def _each(values: Sequence[Values]) -> list[jax.Array]:
    """(n, K) of one example and head, from each of several sites."""
    found = [only(value) for value in values]
    if found[0].shape[2] != 1:
        raise ConfigError(f"model.heads={found[0].shape[2]}: circuits are those of one head")
    return [value[0, :, 0] for value in found]


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def effects(
    model: Any, variables: Any, inputs: jax.Array, layer: int, to: str
) -> dict[str, jax.Array]:
    """What every edit of a weight in a layer takes away, by dst and src of the weight (n, n, ...).

    "logit" is of what was said. "dst" and "src" (n, n, n) are of scores of the last token in the
    last layer, by their source, in sqrt(D), with one side of them alone as it is after the edit.
    """
    layers = passed(model, variables, inputs[None], site=BLOCKS)
    sides = [passed(model, variables, inputs[None], site=site)[-1] for site in SIDES]
    plain = _run(model, variables, inputs, sides)
    said = plain.output[0, -1].argmax()
    q, k = _each(plain.values)
    score, unit = k @ q[-1], q.shape[-1] ** 0.5

    def lost(run: Run) -> dict[str, jax.Array]:
        found = {"logit": plain.output[0, -1, said] - run.output[0, -1, said]}
        if layer < len(layers) - 1:
            q_new, k_new = _each(run.values)
            found |= {"dst": (score - k @ q_new[-1]) / unit, "src": (score - k_new @ q[-1]) / unit}
        return found

    sites = sides if layer < len(layers) - 1 else ()
    # All weights of one query at a time, as what is left of larger batches is compiled for itself.
    n = len(inputs)
    edit = functools.partial(patching.edge_effects, model, variables, inputs[None], layer=layer)
    effect = edit(to=to, measure=lost, sites=sites, batch_size=n)
    shaped = {name: x.reshape(n, n, *x.shape[1:]) for name, x in effect.items()}
    return shaped | {"said": said}


def _important(found: Mapping[Any, Any], layer: int, finals: np.ndarray) -> list[Op]:
    """The ops of a layer that matter, by the edit that needs fewer of them."""
    lists = []
    for to in patching.EDGES:
        effect = found[layer, to]
        falls = effect["logit"] > LOGIT
        for side in ("dst", "src"):
            falls |= (effect[side][:, :, finals] > SCORE).any(-1)
        lists.append([Op(layer, int(i), int(j), to == "zero") for i, j in np.argwhere(falls)])
    return min((ops for ops in lists if ops), key=len, default=[])


def connected(ops: Sequence[Op], root: int) -> list[Op]:
    """Those of `ops` from which the token at `root` learns, from the last layer down."""
    nodes, kept = {root}, []
    for layer in sorted({op.layer for op in ops}, reverse=True):
        here = [op for op in ops if op.layer == layer and op.dst in nodes]
        kept += here
        nodes |= {op.src for op in here}
    return kept


def unused(inputs: Any) -> int:
    """An id that a sequence does not use."""
    vertices = Tokens(len(inputs)).vertices
    free = set(range(1, vertices + 1)) - set(np.asarray(inputs).tolist())
    if not free:
        raise NoUnusedVertex(f"all {vertices} vertices are used; give a sequence with fewer")
    return min(free)


def reasons(
    model: Any, variables: Any, inputs: jax.Array, spare: int, ops: Sequence[Op]
) -> dict[Op, Reason]:
    """What each op goes by: features without which its score is another one.

    All attention stays what it was, so that a feature is missed only where it is read.
    """
    n = len(inputs)
    vertices = sorted({int(x) for x in inputs} & set(range(1, Tokens(n).vertices + 1)))
    features: list[Feature] = [("vertex", v) for v in vertices]
    features += [("position", p) for p in range(n)]
    swapped = [jnp.where(inputs == v, spare, inputs) for v in vertices] + [inputs] * n
    shown = np.concatenate([np.ones((len(vertices), n)), 1 - np.eye(n)])

    swapped, shown = jnp.stack(swapped), jnp.asarray(shown)
    (q, k), (q_new, k_new) = jax.device_get(
        _sides_without(model, variables, inputs, swapped, shown)
    )
    found = {}
    for op in ops:
        q_own, k_own = q[op.layer][op.dst], k[op.layer][op.src]
        changes = (
            q_new[op.layer][:, op.dst] @ k_own - q_own @ k_own,
            k_new[op.layer][:, op.src] @ q_own - q_own @ k_own,
        )
        limit = FEATURE * len(q_own) ** 0.5
        sides = (np.flatnonzero(np.abs(change) > limit) for change in changes)
        found[op] = Reason(*(frozenset(features[i] for i in side) for side in sides))
    return found


@functools.partial(jax.jit, static_argnums=0)
def _sides_without(
    model: Any, variables: Any, inputs: jax.Array, swapped_FxN: jax.Array, shown_FxN: jax.Array
) -> Any:
    """Queries and keys of all layers, and those of each input in which positions are not shown."""
    n = len(inputs)
    calls = [passed(model, variables, inputs[None], site=side) for side in SIDES]
    sites = [*calls[0], *calls[1]]
    plain = _run(model, variables, inputs, [*sites, patching.WEIGHTS])
    held = patching.held(patching.WEIGHTS, plain.values[-1])

    def sides(values: Sequence[Values]) -> tuple[list[jax.Array], list[jax.Array]]:
        each = _each(values[: len(sites)])
        return each[: len(calls[0])], each[len(calls[0]) :]

    def without(tokens: jax.Array, shown: jax.Array) -> Any:
        def hide(x_BxNxD: jax.Array) -> jax.Array:
            return x_BxNxD.at[..., -n:].multiply(shown[:, None])

        edits = [Edit(Site(kind=OneHot), hide), *held]
        return sides(_run(model, variables, tokens, sites, edits=edits).values)

    return sides(plain.values), jax.vmap(without)(swapped_FxN, shown_FxN)


class Merged(NamedTuple):
    """What merging of paths makes of a circuit."""

    explained: frozenset[Op]
    share: float  # of the ops
    finds: bool  # whether the last token comes to hold a path from the start to the goal


def check(circuit: Circuit, inputs: Any) -> Merged:
    """Whether the ops of a circuit merge paths.

    Every token holds its own vertex at first. An op is explained if both its sides go by a vertex
    that its source holds, or by the two positions of an edge, or if by the start or the goal it
    brings to the last token what is marked there. The token then holds what its source holds.
    """
    tokens = np.asarray(inputs).tolist()
    n, words = len(tokens), Tokens(len(tokens))
    holds = [{x} if 1 <= x <= words.vertices else set() for x in tokens]
    ends = {tokens[n - 4], tokens[n - 3]}
    explained = set()
    for layer in sorted({op.layer for op in circuit.ops}):
        before = [set(held) for held in holds]
        for op, reason in circuit.ops.items():
            if op.layer != layer:
                continue
            matches = bool(reason.matched & before[op.src])
            if matches or _is_step(op, reason, tokens, words) or _is_mark(op, reason, n, ends):
                explained.add(op)
                if op.positive:
                    holds[op.dst] |= before[op.src]
    kept = frozenset(connected(sorted(explained), n - 1))
    share = len(kept) / max(len(circuit.ops), 1)
    return Merged(kept, share, _has_path(tokens, holds[-1]))


def _is_step(op: Op, reason: Reason, tokens: Sequence[int], words: Tokens) -> bool:
    """Forwards or backwards along one edge, by the positions of its ends."""
    first = min(op.dst, op.src)
    adjacent = abs(op.dst - op.src) == 1 and first > 0 and tokens[first - 1] == words.edge
    return adjacent and ("position", op.dst) in reason.dst and ("position", op.src) in reason.src


def _is_mark(op: Op, reason: Reason, n: int, ends: set[int]) -> bool:
    """Into the last token, from one that knows the start or goal, or from where they stand."""
    if op.dst != n - 1:
        return False
    known = any(("vertex", v) in reason.src for v in ends)
    return known or (op.src >= n - 5 and ("position", op.src) in reason.src)


def edges_of(tokens: Sequence[int], words: Tokens) -> list[tuple[int, int]]:
    """The edges that a sequence names."""
    places = [i for i, token in enumerate(tokens) if token == words.edge]
    return [(tokens[i + 1], tokens[i + 2]) for i in places]


def _has_path(tokens: Sequence[int], held: set[int]) -> bool:
    """Whether what is held has a path from the start to the goal."""
    start, goal = tokens[-4], tokens[-3]
    inside = [(a, b) for a, b in edges_of(tokens, Tokens(len(tokens))) if {a, b} <= held]
    reached = {start} & held
    while True:
        more = {b for a, b in inside if a in reached} - reached
        if not more:
            return goal in reached
        reached |= more
