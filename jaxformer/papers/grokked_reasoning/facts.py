"""Knowledge bases, what follows from them, and which of it is for training (section 2).

Tables hold one fact per row, as integers. Facts are in distribution (ID) or out of it (OOD): those
OOD are learned as facts, but nothing that follows from them is.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping

import numpy as np

from jaxformer.errors import ConfigError

Tables = Mapping[str, np.ndarray]
ATOMIC = ("id_atomic", "ood_atomic")
INFERRED = ("train_inferred", "test_inferred_iid", "test_inferred_ood")


def _join(facts: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Pairs of rows (i, j) of facts (N, 3), i in `left` and j in `right`, t_i being h_j."""
    right = right[np.argsort(facts[right, 0], kind="stable")]
    heads = facts[right, 0]
    first = np.searchsorted(heads, facts[left, 2], "left")
    count = np.searchsorted(heads, facts[left, 2], "right") - first
    i = np.repeat(left, count)
    within = np.arange(len(i)) - np.repeat(np.cumsum(count) - count, count)
    return np.stack([i, right[np.repeat(first, count) + within]], 1)


@dataclasses.dataclass(frozen=True)
class Composition:
    """(h, r1, b) and (b, r2, t) give (h, r1, r2, t). Atomic facts are rows (h, r, t).

    Every entity has `out_degree` different relations, each to a random entity, maybe itself. Of
    what follows from ID facts a share `iid` is kept for the test.

    Raises:
        ConfigError: more relations per entity than there are, or a share outside [0, 1].
    """

    entities: int
    relations: int
    out_degree: int
    ood: float = 0.05
    iid: float = 0.005

    def __post_init__(self) -> None:
        if not 1 <= self.out_degree <= self.relations:
            raise ConfigError(
                f"data.out_degree={self.out_degree}: entities have different relations, of which "
                f"data.relations={self.relations}; allowed: 1 to {self.relations}"
            )
        _check_shares(self)

    def facts(self, draw: np.random.Generator) -> np.ndarray:
        """(entities * out_degree, 3)."""
        order = draw.random((self.entities, self.relations)).argsort(1)[:, : self.out_degree]
        head = np.repeat(np.arange(self.entities), self.out_degree)
        tail = draw.integers(self.entities, size=len(head))
        return np.stack([head, order.ravel(), tail], 1)

    def tables(self, draw: np.random.Generator) -> Tables:
        """All facts and what follows from them, split at random."""
        facts = self.facts(draw)
        is_ood = np.zeros(len(facts), bool)
        is_ood[draw.permutation(len(facts))[: round(self.ood * len(facts))]] = True
        found = follow(facts, is_ood)
        is_iid = draw.random(len(found["id"])) < self.iid
        return named(facts, is_ood, found, is_iid)


def follow(facts: np.ndarray, is_ood: np.ndarray) -> Tables:
    """Two-hop facts (h, r1, r2, t) whose hops are both "id" or both "ood"; mixed ones are dropped.

    Each two-hop fact is a path; several may conclude the same of the same entities.
    """

    def hops(rows: np.ndarray) -> np.ndarray:
        i, j = _join(facts, rows, rows).T
        return np.stack([facts[i, 0], facts[i, 1], facts[j, 1], facts[j, 2]], 1)

    return {"id": hops(np.flatnonzero(~is_ood)), "ood": hops(np.flatnonzero(is_ood))}


def named(facts: np.ndarray, is_ood: np.ndarray, found: Tables, is_iid: np.ndarray) -> Tables:
    """The five tables of a split; `is_iid` says which of what follows from ID facts is a test."""
    return {
        "id_atomic": facts[~is_ood],
        "ood_atomic": facts[is_ood],
        "train_inferred": found["id"][~is_iid],
        "test_inferred_iid": found["id"][is_iid],
        "test_inferred_ood": found["ood"],
    }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two values of one attribute give a label: 0 if v1 < v2, 1 if equal, 2 if greater.

    Atomic facts are rows (entity, attribute, value), what follows is (attribute, e1, e2, label).
    For each attribute another share `ood` of the entities is OOD. A pair is in a split in both
    orders; pairs of an ID and an OOD entity are in none, but in the table "mixed".
    """

    entities: int
    attributes: int
    levels: int  # values are 0 .. levels - 1
    ood: float = 0.1
    iid: float = 0.1

    def __post_init__(self) -> None:
        for name in ("entities", "levels"):
            if getattr(self, name) < 2:
                raise ConfigError(f"data.{name}={getattr(self, name)}: must be at least 2")
        _check_shares(self)

    def facts(self, draw: np.random.Generator) -> np.ndarray:
        """(entities, attributes): the values."""
        return draw.integers(self.levels, size=(self.entities, self.attributes))

    def tables(self, draw: np.random.Generator) -> Tables:
        """All facts and what follows from them, split at random."""
        values = self.facts(draw)
        ood = self.entities - round((1 - self.ood) * self.entities)
        is_ood = draw.random(values.shape).argsort(0) < ood
        is_iid = draw.random((self.attributes, self.entities, self.entities)) < self.iid
        return compare(values, is_ood, np.triu(is_iid, 1))


def label_of(v1: np.ndarray, v2: np.ndarray) -> np.ndarray:
    """0 if v1 < v2, 1 if equal, 2 if greater."""
    return 1 + np.sign(v1 - v2)


def compare(values: np.ndarray, is_ood: np.ndarray, is_iid: np.ndarray) -> Tables:
    """The tables of values (E, A) under a split (E, A) and coins (A, E, E) of pairs e1 < e2."""
    entities, attributes = values.shape
    entity, attribute = (x.ravel() for x in np.indices(values.shape))
    atomic = np.stack([entity, attribute, values.ravel()], 1)
    found = {"id_atomic": atomic[~is_ood.ravel()], "ood_atomic": atomic[is_ood.ravel()]}

    a, e1, e2 = (x.ravel() for x in np.indices((attributes, entities, entities)))
    rows = np.stack([a, e1, e2, label_of(values[e1, a], values[e2, a])], 1)
    out = is_ood[e1, a].astype(int) + is_ood[e2, a]
    iid = (is_iid | is_iid.swapaxes(1, 2)).ravel()
    pair = e1 != e2
    return found | {
        "train_inferred": rows[pair & (out == 0) & ~iid],
        "test_inferred_iid": rows[pair & (out == 0) & iid],
        "test_inferred_ood": rows[pair & (out == 2)],
        "mixed": rows[pair & (out == 1)],
    }


def sample(table: np.ndarray, count: int, draw: np.random.Generator, what: str = "") -> np.ndarray:
    """`count` different rows, or all there are, with a warning if they are for `what`."""
    if count >= len(table):
        if what and count > len(table):
            warnings.warn(f"{what}: asks for {count} rows of {len(table)}", stacklevel=2)
        return table
    return table[draw.permutation(len(table))[:count]]


def training(tables: Tables, phi: float, draw: np.random.Generator) -> Tables:
    """What is trained on: all atomic facts, and `phi` times as many inferred as ID atomic ones.

    Where there are not so many all are taken, with a warning.
    """
    if phi < 0:
        raise ConfigError(f"data.phi={phi}: must be at least 0")
    count = round(phi * len(tables["id_atomic"]))
    inferred = sample(tables["train_inferred"], count, draw, f"data.phi={phi}")
    return {name: tables[name] for name in ATOMIC} | {"train_inferred": inferred}


def _check_shares(base: Composition | Comparison) -> None:
    for name in ("ood", "iid"):
        if not 0.0 <= getattr(base, name) <= 1.0:
            raise ConfigError(f"data.{name}={getattr(base, name)}: must be in [0, 1]")
