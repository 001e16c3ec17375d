"""Exact answers: EFO queries by joins over variables, trees by sets of entities.

Two procedures that share nothing but the graph, so that each is the other's test.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxformer.data.sources.knowledge_graph import KnowledgeGraph
from jaxformer.papers.tega.formula import (
    FREE,
    And,
    Atom,
    Formula,
    Not,
    Or,
    check,
    conjunction,
    conjuncts,
    occurrences,
    parts,
)
from jaxformer.papers.tega.lisp import Complement, Entity, Intersection, Projection, Tree, Union


@dataclasses.dataclass(frozen=True)
class Table:
    """The assignments (M, variables) that make a formula true, each once."""

    variables: tuple[str, ...]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, variable: str) -> np.ndarray:
        return self.rows[:, self.variables.index(variable)]

    def keys(self, variables: tuple[str, ...], entities: int) -> np.ndarray:
        """A number (M,) for the values of some variables, the same for the same values."""
        key = np.zeros(len(self), np.int64)
        for variable in variables:
            key = key * entities + self.column(variable)
        return key

    def kept(self, variables: tuple[str, ...]) -> Table:
        """Without the other variables, of which some value will do."""
        if variables == self.variables:
            return self
        rows = self.rows[:, [self.variables.index(v) for v in variables]]
        if not variables:
            return Table((), rows[:1])
        return Table(variables, np.unique(rows, axis=0))


def joined(a: Table, b: Table, entities: int) -> Table:
    """The assignments that agree with one of each: a sort-merge join."""
    common = tuple(v for v in a.variables if v in b.variables)
    more = [i for i, v in enumerate(b.variables) if v not in common]
    keys_a, keys_b = a.keys(common, entities), b.keys(common, entities)
    order = np.argsort(keys_b, kind="stable")
    low, high = (np.searchsorted(keys_b[order], keys_a, side) for side in ("left", "right"))
    count = high - low
    from_a = np.repeat(np.arange(len(a)), count)
    starts = np.cumsum(count) - count
    from_b = order[np.arange(count.sum()) - np.repeat(starts - low, count)]
    rows = np.concatenate([a.rows[from_a], b.rows[from_b][:, more]], axis=1)
    return Table((*a.variables, *(b.variables[i] for i in more)), rows)


def without(a: Table, b: Table, entities: int) -> Table:
    """The assignments of `a` that none of `b` agrees with; `a` has all variables of `b`."""
    found = np.isin(a.keys(b.variables, entities), b.keys(b.variables, entities))
    return Table(a.variables, a.rows[~found])


def answers(query: Formula, graph: KnowledgeGraph) -> np.ndarray:
    """The entities (A,), in order, for which the query is true.

    Raises:
        ConfigError: it cannot be answered (`formula.check`).
    """
    check(query, graph.relations, graph.entities)
    return np.sort(assignments(query, graph).column(FREE))


def assignments(query: Formula, graph: KnowledgeGraph, keep: bool = False) -> Table:
    """What makes a query true: values of f, with `keep` of all variables that it conjoins."""
    total = occurrences(query)

    def table(part: Formula) -> Table:
        if isinstance(part, Atom):
            found = _edges(part, graph)
        elif isinstance(part, Or):
            left, right = (table(side) for side in (part.left, part.right))
            rows = np.concatenate([left.rows, right.kept(left.variables).rows])
            found = Table(left.variables, np.unique(rows, axis=0))
        else:
            beside = conjuncts(part)
            tables = [table(c) for c in beside if not isinstance(c, Not)]
            negated = [table(c.of) for c in beside if isinstance(c, Not)]
            found = tables.pop(min(range(len(tables)), key=lambda i: len(tables[i])))
            while tables:
                found = joined(found, tables.pop(_next(found, tables)), graph.entities)
            for other in negated:
                found = without(found, other, graph.entities)
        if part is query and keep:
            return found
        inside = occurrences(part)
        outside = (v for v in found.variables if v == FREE or inside[v] < total[v])
        return found.kept(tuple(outside))

    return table(query)


def _next(found: Table, tables: list[Table]) -> int:
    """The smallest of the tables that share a variable, so that no product is made needlessly."""

    def cost(i: int) -> tuple[bool, int]:
        return not set(found.variables) & set(tables[i].variables), len(tables[i])

    return min(range(len(tables)), key=cost)


def _edges(atom: Atom, graph: KnowledgeGraph) -> Table:
    heads, tails = graph.edges(atom.relation)
    keep = np.ones(len(heads), bool)
    for ends, term in ((heads, atom.a), (tails, atom.b)):
        if isinstance(term, int):
            keep &= ends == term
    if atom.a == atom.b and isinstance(atom.a, str):
        loops = keep & (heads == tails)
        return Table((atom.a,), heads[loops][:, None])
    columns = [(t, ends) for t, ends in ((atom.a, heads), (atom.b, tails)) if isinstance(t, str)]
    rows = np.stack([ends[keep] for _, ends in columns], axis=1) if columns else None
    if rows is None:
        rows = np.zeros((int(keep.any()), 0), np.int64)
    return Table(tuple(t for t, _ in columns), rows)


def members(tree: Tree, graph: KnowledgeGraph) -> np.ndarray:
    """The set that a tree describes, (N,) bool."""
    match tree:
        case Entity(entity):
            return np.arange(graph.entities) == entity
        case Projection(relation, of):
            heads, tails = graph.edges(relation)
            found = np.zeros(graph.entities, bool)
            found[tails[members(of, graph)[heads]]] = True
            return found
        case Complement(of):
            return ~members(of, graph)
        case Intersection(sets):
            return np.logical_and.reduce([members(one, graph) for one in sets])
        case Union(sets):
            return np.logical_or.reduce([members(one, graph) for one in sets])


def relaxed(query: Formula) -> Formula:
    """The query without its negated conjuncts."""
    if isinstance(query, Atom):
        return query
    if isinstance(query, And):
        return conjunction([relaxed(c) for c in conjuncts(query) if not isinstance(c, Not)])
    return type(query)(*(relaxed(part) for part in parts(query)))
