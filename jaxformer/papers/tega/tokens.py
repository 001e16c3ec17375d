"""Queries as token sequences, and what the parse says about each token.

Ids are SQE's: special tokens below 100, then entities, then relations. Of each token there is the
part of the sequence that the parse relates it to, first and one past last position: the atom of a
relation or term, the scope of a negation, both operands of & and |, what parentheses enclose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxformer.errors import ConfigError
from jaxformer.papers.tega import lisp
from jaxformer.papers.tega.formula import EXISTENTIAL, FREE, SIGNS, Atom, Formula, Not

SPECIALS = ("(", ")", "p", "i", "u", "n", "&", "|", "!", FREE, *EXISTENTIAL, "<pad>")
FIRST_ENTITY = 100
PAD = SPECIALS.index("<pad>")
SYNTAXES = ("efo", "lisp")

KINDS = ("parenthesis", "conjunction", "disjunction", "negation", "relation", "term")
_KIND = {
    **dict.fromkeys("()", 0),
    **dict.fromkeys("i&", 1),
    **dict.fromkeys("u|", 2),
    **dict.fromkeys("n!", 3),
    "p": 4,
    **dict.fromkeys((FREE, *EXISTENTIAL), 5),
}


class Layout(NamedTuple):
    """The symbols of a query, and the span of each."""

    symbols: list[str]
    spans: list[tuple[int, int]]


def layout(query: Formula | lisp.Tree) -> Layout:
    """Of a formula in EFO, of a tree in Lisp; both begin with a parenthesis."""
    symbols: list[str] = []
    spans: list[tuple[int, int]] = []

    def put(symbol: str) -> int:
        symbols.append(symbol)
        spans.append((-1, -1))
        return len(symbols) - 1

    def span(places: Sequence[int], start: int, end: int) -> None:
        for place in places:
            spans[place] = (start, end)

    def operand(part: Formula) -> tuple[int, int]:
        if isinstance(part, Atom):
            return formula(part)
        start = put("(")
        formula(part)
        return start, closed([start], start)

    def closed(places: Sequence[int], start: int) -> int:
        end = put(")") + 1
        span([*places, end - 1], start, end)
        return end

    def formula(part: Formula) -> tuple[int, int]:
        start = len(symbols)
        if isinstance(part, Atom):
            terms = (t if isinstance(t, str) else f"s{t}" for t in part.terms)
            places = [put(symbol) for symbol in ("(", f"r{part.relation}", *terms)]
            return start, closed(places, start)
        if isinstance(part, Not):
            sign = put("!")
            span([sign], *operand(part.of))
        else:
            operand(part.left)
            sign = put(SIGNS[type(part)])
            operand(part.right)
            span([sign], start, len(symbols))
        return start, len(symbols)

    def tree(part: lisp.Tree, atom: int | None = None) -> tuple[int, int]:
        """`atom` is where the projection begins whose constant this is."""
        start = put("(")
        match part:
            case lisp.Entity(entity):
                places = [start, put(f"s{entity}")]
            case lisp.Projection(relation, of):
                places = [start, put("p"), put(f"r{relation}")]
                tree(of, start)
            case lisp.Complement(of):
                sign = put("n")
                span([sign], *tree(of))
                places = [start]
            case _:
                places = [start, put(lisp.LETTERS[type(part)])]
                for one in part.sets:
                    tree(one)
        end = closed(places, start)
        if isinstance(part, lisp.Entity) and atom is not None:
            spans[start + 1] = (atom, end + 1)  # with the parenthesis that closes the projection
        return start, end

    (formula if isinstance(query, Formula) else tree)(query)  # type: ignore[operator]
    return Layout(symbols, spans)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Ids of the symbols of a graph's queries."""

    entities: int
    relations: int

    @property
    def size(self) -> int:
        return FIRST_ENTITY + self.entities + self.relations

    def encode(self, symbols: Sequence[str]) -> list[int]:
        """Ids of symbols.

        Raises:
            ConfigError: an entity or a relation that is none of the graph's.
        """
        return [self._id(symbol) for symbol in symbols]

    def _id(self, symbol: str) -> int:
        if symbol in SPECIALS:
            return SPECIALS.index(symbol)
        letter, number = symbol[0], int(symbol[1:])
        kind, count, first = {
            "s": ("entity", self.entities, FIRST_ENTITY),
            "r": ("relation", self.relations, FIRST_ENTITY + self.entities),
        }[letter]
        if number >= count:
            raise ConfigError(f"unknown {kind} {symbol}: there are {count}; give another query")
        return first + number

    def kinds(self, split_terms: bool = False) -> np.ndarray:
        """(size,): which of `KINDS` each token is.

        With `split_terms` existential variables and the free one have kinds of their own, 6 and 7.
        """
        kinds = np.zeros(self.size, np.int32)
        for symbol, kind in _KIND.items():
            kinds[SPECIALS.index(symbol)] = kind
        kinds[FIRST_ENTITY:] = KINDS.index("term")
        kinds[FIRST_ENTITY + self.entities :] = KINDS.index("relation")
        if split_terms:
            kinds[[SPECIALS.index(e) for e in EXISTENTIAL]] = len(KINDS)
            kinds[SPECIALS.index(FREE)] = len(KINDS) + 1
        return kinds


VARIABLES = tuple(SPECIALS.index(v) for v in (FREE, *EXISTENTIAL))


def rows(
    queries: Sequence[Formula], vocabulary: Vocabulary, length: int, syntax: str = "efo"
) -> dict[str, np.ndarray]:
    """Arrays "tokens" (Q, length) int32, filled up with `PAD`, and "spans" (Q, length, 2) int32.

    Raises:
        ConfigError: a query is longer than `length`, or cannot be said in the syntax.
    """
    tokens = np.full((len(queries), length), PAD, np.int32)
    spans = np.zeros((len(queries), length, 2), np.int32)
    for i, query in enumerate(queries):
        symbols, related = layout(query if syntax == "efo" else lisp.to_tree(query))
        if len(symbols) > length:
            raise ConfigError(
                f"data.length={length}: a query has {len(symbols)} tokens; give at least that"
            )
        tokens[i, : len(symbols)] = vocabulary.encode(symbols)
        spans[i, : len(symbols)] = related
    return {"tokens": tokens, "spans": spans}


def guide_matrix(tokens_L: np.ndarray, spans_Lx2: np.ndarray) -> np.ndarray:
    """M (L, L) of one sequence: whether the parse relates token i to token j."""
    place = np.arange(len(tokens_L))
    inside = (spans_Lx2[:, :1] <= place) & (place < spans_Lx2[:, 1:])
    variable = np.isin(tokens_L, VARIABLES)
    same = (tokens_L[:, None] == tokens_L) & variable[:, None]
    return inside | same | np.eye(len(tokens_L), dtype=bool)
