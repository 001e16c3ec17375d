"""Questions that differ from given ones in one symbol and have another answer (section 4).

Where no symbol gives another answer a row stays as it is and is not valid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxformer.papers.grokked_reasoning.facts import Tables


class Perturbed(NamedTuple):
    """Rows like those given, which of them are other ones, and where their states are put in."""

    rows: np.ndarray
    valid: np.ndarray
    positions: tuple[int, ...]


def tails(facts: np.ndarray, entities: int, relations: int) -> np.ndarray:
    """(E + 1, R + 1): the tail of (h, r), or -1; the last row and column are nothing's."""
    table = np.full((entities + 1, relations + 1), -1)
    table[facts[:, 0], facts[:, 1]] = facts[:, 2]
    return table


def _one_of(allowed: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Of each row (N, C) one of its columns at random, and whether it has any."""
    return np.where(allowed, draw.random(allowed.shape), -1).argmax(1), allowed.any(1)


def _put(rows: np.ndarray, column: int, found: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    rows = rows.copy()
    rows[found[1], column] = found[0][found[1]]
    return rows


def composition(
    tables: Tables, rows: np.ndarray, entities: int, relations: int, draw: np.random.Generator
) -> Mapping[str, Perturbed]:
    """Of (h, r1, r2, t): another h, or another relation that h or the bridge has.

    A question may lead nowhere then, which is an answer other than t too.
    """
    facts = np.concatenate([tables["id_atomic"], tables["ood_atomic"]])
    tail = tails(facts, entities, relations)
    h, r1, r2, t = rows.T
    bridge = tail[h, r1]
    every = np.arange(relations)
    choices = {
        "h": (0, tail[tail[:entities, r1].T, r2[:, None]] != t[:, None]),
        "r1": (1, (tail[h, :-1] >= 0) & (tail[tail[h, :-1], r2[:, None]] != t[:, None])),
        "r2": (2, (tail[bridge, :-1] >= 0) & (tail[bridge[:, None], every] != t[:, None])),
    }
    found = {}
    for name, (column, allowed) in choices.items():
        one = _one_of(allowed, draw)
        found[name] = Perturbed(_put(rows, column, one), one[1], (column,))
    return found


def comparison(
    tables: Tables, rows: np.ndarray, shape: tuple[int, int], draw: np.random.Generator
) -> Mapping[str, Perturbed]:
    """Of (attribute, e1, e2, label): another e1 whose value is just so that the label changes.

    Its value is that of e2, or one beside it where they were equal; and the same for e2. `shape` is
    (entities, attributes); the entities put in are ID.
    """
    values = np.full(shape, -9)
    values[tables["id_atomic"][:, 0], tables["id_atomic"][:, 1]] = tables["id_atomic"][:, 2]
    a, e1, e2, label = rows.T
    found = {}
    for name, column, own, other, positions in (
        ("e1", 1, e1, e2, (2, 3)),
        ("e2", 2, e2, e1, (4,)),
    ):
        away = np.abs(values[:, a].T - values[other, a][:, None])
        allowed = away == (label == 1)[:, None]
        allowed[np.arange(len(rows)), own] = False
        allowed &= values[:, a].T >= 0
        one = _one_of(allowed, draw)
        found[name] = Perturbed(_put(rows, column, one), one[1], positions)
    return found
