"""The same queries as trees of set operators, in a Lisp-like text (section 2; SQE's format).

`(p,(3),(i,(p,(1),(e,(7))),(n,(p,(2),(e,(4))))))`: projections by a relation, of intersections `i`,
unions `u` and complements `n`, from entities `e`. Queries whose variables form no tree, that is
those with cycles, several edges between two variables or existential leaves, cannot be said so.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import NoReturn

from jaxformer.errors import ConfigError
from jaxformer.papers.tega.formula import (
    EXISTENTIAL,
    FREE,
    And,
    Atom,
    Formula,
    Not,
    Or,
    Term,
    conjunction,
    conjuncts,
    occurrences,
)
from jaxformer.papers.tega.formula import write as write_efo


@dataclasses.dataclass(frozen=True)
class Entity:
    entity: int


@dataclasses.dataclass(frozen=True)
class Projection:
    """All tails of a relation whose heads are in a set."""

    relation: int
    of: Tree


@dataclasses.dataclass(frozen=True)
class Complement:
    of: Tree


@dataclasses.dataclass(frozen=True)
class Intersection:
    sets: tuple[Tree, ...]


@dataclasses.dataclass(frozen=True)
class Union:
    sets: tuple[Tree, ...]


Tree = Entity | Projection | Complement | Intersection | Union
MANY = {"i": Intersection, "u": Union}
LETTERS = {cls: letter for letter, cls in MANY.items()}


def write(tree: Tree) -> str:
    """The tree as text."""
    match tree:
        case Entity(entity):
            return f"(e,({entity}))"
        case Projection(relation, of):
            return f"(p,({relation}),{write(of)})"
        case Complement(of):
            return f"(n,{write(of)})"
    return f"({LETTERS[type(tree)]},{','.join(map(write, tree.sets))})"


def read(text: str) -> Tree:
    """The tree that a text says; spaces do not matter.

    Raises:
        ConfigError: it is none; the message says where.
    """
    words = [(m[0], m.start()) for m in re.finditer(r"\d+|\S", text)] + [("", len(text))]
    at = 0

    def wrong(why: str) -> NoReturn:
        word, place = words[at]
        found = f"{word!r} at {place}" if word else "the end"
        raise ConfigError(f"query {text!r}: {why}, found {found}")

    def take(fits: Callable[[str], bool], why: str) -> str:
        nonlocal at
        word = words[at][0]
        if not fits(word):
            wrong(why)
        at += 1
        return word

    def sign(one: str) -> None:
        take(lambda word: word == one, f"unbalanced parentheses or commas, needs {one!r}")

    def number() -> int:
        sign("(")
        found = int(take(str.isdigit, "needs the number of a relation or an entity"))
        sign(")")
        return found

    def tree() -> Tree:
        sign("(")
        letter = take(lambda word: word in tuple("epniu"), "needs one of e, p, n, i, u")
        sign(",")
        found: Tree
        if letter == "e":
            found = Entity(number())
        elif letter == "p":
            relation = number()
            sign(",")
            found = Projection(relation, tree())
        elif letter == "n":
            found = Complement(tree())
        else:
            sets = [tree()]
            while words[at][0] == ",":
                sign(",")
                sets.append(tree())
            if len(sets) < 2:
                wrong(f"({letter}, ...) needs two sets or more")
            found = MANY[letter](tuple(sets))
        sign(")")
        return found

    found = tree()
    if words[at][0]:
        wrong("unbalanced parentheses, needs the end")
    return found


def to_formula(tree: Tree) -> Formula:
    """The query in EFO, with variables numbered from the constants on.

    Raises:
        ConfigError: it needs more variables than there are.
    """
    names = iter(EXISTENTIAL)

    def said(tree: Tree, target: Term) -> Formula:
        match tree:
            case Projection(relation, Entity(entity)):
                return Atom(relation, entity, target)
            case Projection(relation, of):
                between = next(names, None)
                if between is None:
                    raise ConfigError(
                        f"query {write(top)}: EFO has variables e1 to e{len(EXISTENTIAL)} only"
                    )
                return And(said(of, between), Atom(relation, between, target))
            case Complement(of):
                return Not(said(of, target))
            case Intersection(sets):
                return conjunction([said(one, target) for one in sets])
            case Union(sets):
                first, *others = (said(one, target) for one in sets)
                for other in others:
                    first = Or(first, other)
                return first
        raise ConfigError(f"query {write(top)}: an entity alone is no query; project it")

    top = tree
    return said(tree, FREE)


def to_tree(query: Formula) -> Tree:
    """The query as a tree of set operators.

    Raises:
        ConfigError: its variables form no tree.
    """
    total = occurrences(query)

    def impossible(why: str) -> NoReturn:
        raise ConfigError(
            f"query {write_efo(query)}: {why}, which set operators cannot say; use EFO"
        )

    def told(part: Formula) -> str:
        """The variable whose set a part tells of."""
        match part:
            case Atom(_, _, b):
                if not isinstance(b, str):
                    impossible(f"r{part.relation} leads to the constant s{b}")
                return b
            case Not(of):
                return told(of)
            case Or(left, right):
                if told(left) != told(right):
                    impossible("a disjunction about two variables")
                return told(left)
        here = conjuncts(part)
        used = {a for c in here if isinstance(c, Atom) and isinstance(a := c.a, str)}
        ends = {told(c) for c in here} - used
        if len(ends) != 1:
            impossible("a cycle or an existential leaf")
        return ends.pop()

    def scope(part: Formula) -> Tree:
        """What a part says of its variable, all other variables being its own."""
        given, used = conjuncts(part), set[int]()
        inside = occurrences(part)
        if any(inside[v] < total[v] for v in inside if v not in (FREE, told(part))):
            impossible("a part reads a variable of another")

        def set_of(variable: str) -> Tree:
            own = [i for i, c in enumerate(given) if told(c) == variable]
            if not own or used & set(own):
                impossible(f"{variable} is read more than once, or nothing leads to it")
            used.update(own)
            sets = tuple(one(given[i]) for i in own)
            return sets[0] if len(sets) == 1 else Intersection(sets)

        def one(c: Formula) -> Tree:
            match c:
                case Atom(relation, a, _):
                    of = Entity(a) if isinstance(a, int) else set_of(a)
                    return Projection(relation, of)
                case Not(of):
                    return Complement(scope(of))
            return Union(tuple(scope(side) for side in disjuncts(c)))

        found = set_of(told(part))
        if len(used) < len(given):
            impossible("a cycle or an existential leaf")
        return found

    def disjuncts(part: Formula) -> list[Formula]:
        if isinstance(part, Or):
            return [*disjuncts(part.left), part.right]
        return [part]

    return scope(query)
