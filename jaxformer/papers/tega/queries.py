"""Queries with their answers: sampled from a graph, or read from files.

An answer is known if the observed graph has it too, and to be inferred if only the full graph has.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxformer.data.sources.knowledge_graph import KnowledgeGraph
from jaxformer.errors import ConfigError
from jaxformer.papers.tega import formula, lisp, oracle
from jaxformer.papers.tega.formula import EXISTENTIAL, FREE, Atom, Formula, Not
from jaxformer.papers.tega.types import TYPES, shape


@dataclasses.dataclass(frozen=True, eq=False)
class Query:
    """A query, its answers on the full graph, and those on the observed one.

    With negation the second may have some that the first has not.
    """

    query: Formula
    answers: np.ndarray
    observed: np.ndarray

    def turned(self, change: Callable[[Formula], Formula]) -> Query:
        """The same answers of a query that says the same otherwise."""
        return dataclasses.replace(self, query=change(self.query))


Queries = Mapping[str, Sequence[Query]]  # by type


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """Queries of a type that have answers, grounded backwards from one of them.

    Negations change the answers. With `inferred` some answer of each is not known. Variables have
    names drawn at random, so that a type with two of them meets no name that training has not.
    """

    full: KnowledgeGraph
    observed: KnowledgeGraph
    inferred: bool = False
    tries: int = 400  # in a row without a new query, then there are no more

    def queries(self, kind: str, count: int, draw: np.random.Generator) -> list[Query]:
        """At most `count` different queries, fewer where no more are found.

        Raises:
            ConfigError: there is no such type, or no query of it is found.
        """
        if kind not in TYPES:
            raise ConfigError(f"data: no query type {kind!r}; there are {', '.join(TYPES)}")
        form, found = shape(TYPES[kind]), dict[Formula, Query]()
        missed = 0
        while len(found) < count and missed < self.tries:
            missed += 1
            query = ground(form, self.full, draw)
            if query is None or query in found or _repeats(query):
                continue
            if one := self._answered(query):
                found[query], missed = one, 0
        if not found:
            raise ConfigError(f"data: no query of type {kind!r} was found; give a denser graph")
        return [dataclasses.replace(q, query=_any_names(q.query, draw)) for q in found.values()]

    def _answered(self, query: Formula) -> Query | None:
        answers = oracle.answers(query, self.full)
        if not len(answers):
            return None
        if _negated(query):
            more = oracle.answers(oracle.relaxed(query), self.full)
            if len(more) == len(answers):
                return None
        known = answers
        if self.observed is not self.full:
            known = oracle.answers(query, self.observed)
        if self.inferred and not len(np.setdiff1d(answers, known)):
            return None
        return Query(query, answers, known)


def _repeats(query: Formula) -> bool:
    """Whether it says the same thing twice."""
    said = list(formula.atoms(query))
    return len(set(said)) < len(said)


def _any_names(query: Formula, draw: np.random.Generator) -> Formula:
    names = draw.permutation(EXISTENTIAL).tolist()
    return formula.renamed(query, dict(zip(EXISTENTIAL, names, strict=True)))


def ground(form: Formula, graph: KnowledgeGraph, draw: np.random.Generator) -> Formula | None:
    """A form with relations and constants that some entities make true, or None if that failed.

    Starting at an entity for f, edges that lead to what is known fill in the rest. What is negated
    is made true of another assignment to the rest, so that it takes something away.
    """
    filled: dict[int, Atom] = {}
    start = graph.triples[draw.integers(len(graph)), 2]
    values = {FREE: int(start)}
    if not _fill(_positive(form), values, graph, draw, filled):
        return None
    negated, total = _negated(form), formula.occurrences(form)
    if negated:
        rest = formula.mapped(oracle.relaxed(form), lambda atom: filled[atom.relation])
        table = oracle.assignments(rest, graph, keep=True)
    for part in negated:
        shared = {v for v, n in formula.occurrences(part).items() if v == FREE or n < total[v]}
        row = table.rows[draw.integers(len(table))]
        other = {v: int(row[table.variables.index(v)]) for v in shared}
        if not _fill(list(formula.atoms(part)), other, graph, draw, filled):
            return None
    return formula.mapped(form, lambda atom: filled[atom.relation])


def _positive(form: Formula) -> list[Atom]:
    if isinstance(form, Atom):
        return [form]
    if isinstance(form, Not):
        return []
    return [atom for part in formula.parts(form) for atom in _positive(part)]


def _negated(form: Formula) -> list[Formula]:
    if isinstance(form, Not):
        return [form.of]
    return [found for part in formula.parts(form) for found in _negated(part)]


def _fill(
    atoms: list[Atom],
    values: dict[str, int],
    graph: KnowledgeGraph,
    draw: np.random.Generator,
    filled: dict[int, Atom],
) -> bool:
    """Ground atoms, each numbered by its relation, one after another from known values."""
    atoms = list(atoms)
    while atoms:
        ready = (i for i, x in enumerate(atoms) if any(t in values for t in x.terms))
        atom = atoms.pop(next(ready))
        ends = [values.get(t) if isinstance(t, str) else None for t in atom.terms]
        if ends[0] is not None and ends[1] is not None:
            relations = graph.has(ends[0], ends[1])
            edges = np.array([(ends[0], r, ends[1]) for r in relations]).reshape(-1, 3)
        elif ends[1] is not None:
            edges = graph.touching(ends[1], "tail")
        else:
            edges = graph.touching(ends[0], "head")  # type: ignore[arg-type]
        if not len(edges):
            return False
        h, r, t = (int(x) for x in edges[draw.integers(len(edges))])
        terms = [
            end if not isinstance(term, str) else term
            for term, end in zip(atom.terms, (h, t), strict=True)
        ]
        filled[atom.relation] = Atom(r, *terms)
        values |= {v: end for v, end in zip(atom.terms, (h, t), strict=True) if isinstance(v, str)}
    return True


# ------------------------------------------------------------------------------------- files


def read_query(text: str) -> Formula:
    """A query in either syntax.

    Raises:
        ConfigError: it is in none.
    """
    stripped = text.replace(" ", "")
    if stripped[:1] == "(" and stripped[1:2] in tuple("epniu") and stripped[2:3] == ",":
        return lisp.to_formula(lisp.read(text))
    return formula.check(formula.read(text))


def read_queries(path: str | Path, known: str = "train", asked: str = "test") -> Queries:
    """A file {type: {query: answers}}; evaluation queries have `<split>_answers` of each split.

    Of those, answers of the split `known` are known, and those of `asked` all there are; a list
    alone is both. Types keep the names that they have in the file.

    Raises:
        ConfigError: no such file, or it is not as said here.
    """
    path = Path(path).expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.folder: {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(x, dict) for x in content.values()):
        raise ConfigError(f"{path}: needs {{type: {{query: answers}}}}")
    return {
        kind: [_entry(path, text, given, known, asked) for text, given in found.items()]
        for kind, found in content.items()
    }


def _entry(path: Path, text: str, given: Any, known: str, asked: str) -> Query:
    if isinstance(given, dict):
        names = [f"{split}_answers" for split in (asked, known)]
        missing = [name for name in names if name not in given]
        if missing:
            raise ConfigError(f"{path}: query {text!r} has no {missing[0]!r}")
        answers, observed = (_ids(given[name]) for name in names)
    else:
        answers = observed = _ids(given)
    return Query(read_query(text), answers, observed)


def _ids(values: Iterable[Any]) -> np.ndarray:
    return np.unique(np.array([int(x) for x in values], np.int64))


def write_queries(path: str | Path, queries: Queries, *, evaluation: bool) -> None:
    """The same, in EFO where a query is no tree."""
    content = {
        kind: {
            _text(q.query): {
                "train_answers": q.observed.tolist(),
                "valid_answers": q.observed.tolist(),
                "test_answers": q.answers.tolist(),
            }
            if evaluation
            else q.answers.tolist()
            for q in found
        }
        for kind, found in queries.items()
    }
    Path(path).write_text(json.dumps(content), encoding="utf-8")


def _text(query: Formula) -> str:
    try:
        return lisp.write(lisp.to_tree(query))
    except ConfigError:
        return formula.write(query)
