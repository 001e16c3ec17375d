"""First-order queries with one free variable, and how they are written (section 2; appendix A).

EFO: `((r1(s1,e1))&(!(r2(s2,e1))))&(r3(e1,f))`. Relations and constants have their ids as numbers,
`e1` to `e3` are existential, `f` is what is asked for. No quantifier is written: a variable is
quantified in the smallest part that holds all of its occurrences.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, NoReturn

from jaxformer.errors import ConfigError

EXISTENTIAL = ("e1", "e2", "e3")
FREE = "f"

Term = int | str  # the id of a constant, or the name of a variable


@dataclasses.dataclass(frozen=True)
class Atom:
    """r(a, b): there is an edge of the relation from a to b."""

    relation: int
    a: Term
    b: Term

    @property
    def terms(self) -> tuple[Term, Term]:
        return self.a, self.b


@dataclasses.dataclass(frozen=True)
class Not:
    of: Formula


@dataclasses.dataclass(frozen=True)
class And:
    left: Formula
    right: Formula


@dataclasses.dataclass(frozen=True)
class Or:
    left: Formula
    right: Formula


Formula = Atom | Not | And | Or
SIGNS = {And: "&", Or: "|"}


def parts(query: Formula) -> tuple[Formula, ...]:
    """The formulas that a formula is directly made of."""
    if isinstance(query, Atom):
        return ()
    return (query.of,) if isinstance(query, Not) else (query.left, query.right)


def atoms(query: Formula) -> Iterator[Atom]:
    """From left to right."""
    if isinstance(query, Atom):
        yield query
    for part in parts(query):
        yield from atoms(part)


def occurrences(query: Formula) -> Counter[str]:
    """How often each variable is written."""
    return Counter(t for atom in atoms(query) for t in atom.terms if isinstance(t, str))


def conjuncts(query: Formula) -> list[Formula]:
    """What a conjunction of conjunctions joins, or the formula itself."""
    if isinstance(query, And):
        return conjuncts(query.left) + conjuncts(query.right)
    return [query]


def conjunction(formulas: list[Formula]) -> Formula:
    """((a & b) & c) & ..."""
    query = formulas[0]
    for other in formulas[1:]:
        query = And(query, other)
    return query


def mapped(query: Formula, change: Callable[[Atom], Formula]) -> Formula:
    """The formula with every atom, from left to right, replaced."""
    if isinstance(query, Atom):
        return change(query)
    return type(query)(*(mapped(part, change) for part in parts(query)))


def renamed(query: Formula, names: Mapping[str, str]) -> Formula:
    """With other names for variables."""

    def term(t: Term) -> Term:
        return names.get(t, t) if isinstance(t, str) else t

    return mapped(query, lambda atom: Atom(atom.relation, term(atom.a), term(atom.b)))


def reversed_operands(query: Formula) -> Formula:
    """The same query with the operands of every conjunction and disjunction in the other order."""
    if isinstance(query, Atom):
        return query
    return type(query)(*(reversed_operands(part) for part in reversed(parts(query))))


def check(query: Formula, relations: int | None = None, entities: int | None = None) -> Formula:
    """The query, if it can be answered: safe, with `f` free, of known relations and entities.

    Raises:
        ConfigError: it is not; the message names the part.
    """

    def bound(part: Formula) -> set[str]:
        """The variables that a part ties to finitely many entities."""
        if isinstance(part, Atom):
            return {t for t in part.terms if isinstance(t, str)}
        if isinstance(part, Not):
            bound(part.of)
            return set()
        if isinstance(part, And):
            found = set().union(*map(bound, conjuncts(part)))
        else:
            found = bound(part.left) & bound(part.right)
        if isinstance(part, Or):
            sides = [_open(side, total) for side in parts(part)]
            if sides[0] != sides[1]:
                raise ConfigError(
                    f"query {write(part)}: the sides of | must share their variables, but have "
                    f"{_list(sides[0])} and {_list(sides[1])}"
                )
        return found

    total = occurrences(query)
    for atom in atoms(query):
        if relations is not None and not 0 <= atom.relation < relations:
            raise ConfigError(
                f"query {write(query)}: unknown relation r{atom.relation}; there are r0 to "
                f"r{relations - 1}"
            )
        for t in atom.terms:
            if isinstance(t, int) and entities is not None and not 0 <= t < entities:
                raise ConfigError(
                    f"query {write(query)}: unknown entity s{t}; there are s0 to s{entities - 1}"
                )
    if FREE not in total:
        raise ConfigError(f"query {write(query)}: the free variable f is not bound by any atom")
    _check_negations(query, total)
    if FREE not in bound(query):
        raise ConfigError(
            f"query {write(query)}: unsafe, negation alone does not bind f; add an atom of f that "
            "is not negated"
        )
    return query


def _check_negations(query: Formula, total: Counter[str]) -> None:
    """Every negation stands beside conjuncts that bind its variables."""
    beside = conjuncts(query)
    held = {v for c in beside if not isinstance(c, Not) for v in _open(c, total)}
    for part in beside:
        if isinstance(part, Not) and (loose := _open(part.of, total) - held):
            raise ConfigError(
                f"query {write(query)}: unsafe, negation alone does not bind {_list(loose)}; join "
                "it with an atom that does"
            )
        for inside in parts(part):
            _check_negations(inside, total)


def _open(part: Formula, total: Counter[str]) -> set[str]:
    """The variables of a part that are free or occur elsewhere in the query too."""
    return {v for v, n in occurrences(part).items() if v == FREE or n < total[v]}


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


# -------------------------------------------------------------------------------- as text


def write(query: Formula) -> str:
    """The query in EFO."""

    def operand(part: Formula) -> str:
        return f"({write(part)})"

    if isinstance(query, Atom):
        a, b = (t if isinstance(t, str) else f"s{t}" for t in query.terms)
        return f"r{query.relation}({a},{b})"
    if isinstance(query, Not):
        return f"!{operand(query.of)}"
    return f"{operand(query.left)}{SIGNS[type(query)]}{operand(query.right)}"


class _Word(NamedTuple):
    text: str
    at: int


def read(text: str) -> Formula:
    """The query that an EFO text says; spaces do not matter.

    Raises:
        ConfigError: it is none; the message says where.
    """
    words = [_Word(m[0], m.start()) for m in re.finditer(r"[rse]\d+|f\b|\S", text)]
    words.append(_Word("", len(text)))
    at = 0

    def wrong(why: str) -> NoReturn:
        word = words[at]
        found = f"{word.text!r} at {word.at}" if word.text else "the end"
        raise ConfigError(f"query {text!r}: {why}, found {found}")

    def take(*allowed: str, why: str = "") -> str:
        nonlocal at
        word = words[at].text
        kind = word[:1] + "#" if word[1:].isdigit() else word  # r12 is one of r#
        if not {word, kind} & set(allowed):
            wrong(why or f"needs {' or '.join(repr(a) for a in allowed)}")
        at += 1
        return word

    def term() -> Term:
        word = take("s#", "e#", FREE, why="needs a constant, s7, or a variable, e1 to e3 or f")
        if word[0] == "e" and word not in EXISTENTIAL:
            raise ConfigError(f"query {text!r}: no variable {word}; there are e1, e2, e3 and f")
        return int(word[1:]) if word[0] == "s" else word

    def unit() -> Formula:
        nonlocal at
        word = words[at].text
        if word == "(":
            at += 1
            inside = chain()
            take(")", why="unbalanced parentheses, needs ')'")
            return inside
        if word == "!":
            at += 1
            return Not(unit())
        relation = int(take("r#", why="needs '(', '!' or a relation such as r3")[1:])
        take("(")
        a = term()
        take(",")
        b = term()
        take(")", why="unbalanced parentheses, needs ')'")
        return Atom(relation, a, b)

    def chain() -> Formula:
        nonlocal at
        query, sign = unit(), words[at].text
        while words[at].text in ("&", "|"):
            if words[at].text != sign:
                wrong("& and | in a row need parentheses")
            at += 1
            query = (And if sign == "&" else Or)(query, unit())
        return query

    query = chain()
    if words[at].text:
        wrong("unbalanced parentheses" if words[at].text == ")" else "needs the end")
    return query
