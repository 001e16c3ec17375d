"""Complex reasoning (section 6): comparisons that only many facts together decide.

OOD facts are not given at all. What is known of an OOD entity is how it compares with some ID ones,
whose values are known.
"""

from __future__ import annotations

import numpy as np

from jaxformer.errors import ConfigError
from jaxformer.papers.grokked_reasoning.facts import Tables, label_of, sample


def training(tables: Tables, share: float, draw: np.random.Generator) -> Tables:
    """ID facts, and a share each of ID-ID ("train_inferred") and ID-OOD ("mixed") comparisons."""
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"data.share={share}: must be in [0, 1]")

    def part(name: str) -> np.ndarray:
        return sample(tables[name], round(share * len(tables[name])), draw)

    names = ("train_inferred", "mixed")
    return {"id_atomic": tables["id_atomic"]} | {name: part(name) for name in names}


def at_least(entities: int, rows: np.ndarray) -> np.ndarray:
    """(E, E): whether e1 >= e2 follows from comparisons (attribute, e1, e2, label) of one kind."""
    known = np.eye(entities, dtype=bool)
    _, e1, e2, label = rows.T
    known[e1[label > 0], e2[label > 0]] = True
    known[e2[label < 2], e1[label < 2]] = True
    for middle in range(entities):  # Warshall's closure
        known |= known[:, middle, None] & known[None, middle]
    return known


def decided(entities: int, rows: np.ndarray, among: np.ndarray) -> np.ndarray:
    """What follows of pairs of `among`: (attribute, e1, e2, label).

    If both e1 >= e2 and e2 >= e1 do, they are equal; if one does, the authors say greater (smaller)
    although equality is not ruled out.
    """
    known = at_least(entities, rows)[np.ix_(among, among)]
    i, j = np.nonzero((known | known.T) & ~np.eye(len(among), dtype=bool))
    label = 1 + known[i, j].astype(int) - known[j, i]
    return np.stack([np.full_like(i, rows[0, 0]), among[i], among[j], label], 1)


def questions(train: Tables, entities: int) -> np.ndarray:
    """Comparisons of OOD entities that are decided, but not without the values of ID entities.

    Rows (attribute, e1, e2, label) over all attributes: what follows from ID facts and ID-OOD
    comparisons, less what already follows from the given comparisons.
    """
    found = []
    for attribute in np.unique(train["id_atomic"][:, 1]):
        facts = train["id_atomic"][train["id_atomic"][:, 1] == attribute]
        mixed, inside = (
            train[name][train[name][:, 0] == attribute] for name in ("mixed", "train_inferred")
        )
        if not len(mixed):
            continue
        i, j = (x.ravel() for x in np.indices((len(facts), len(facts))))
        label = label_of(facts[i, 2], facts[j, 2])
        implied = np.stack([np.full_like(i, attribute), facts[i, 0], facts[j, 0], label], 1)
        seen = np.unique(mixed[:, 1:3])
        among = np.setdiff1d(seen, facts[:, 0])
        solvable = decided(entities, np.concatenate([implied, mixed]), among)
        easy = decided(entities, np.concatenate([inside, mixed]), among)
        easy = {tuple(row) for row in easy.tolist()}
        found += [row for row in solvable.tolist() if tuple(row) not in easy]
    return np.array(found, int).reshape(-1, 4)


def balanced(rows: np.ndarray, each: int, draw: np.random.Generator) -> np.ndarray:
    """`each` rows of every label, or as many as there are."""
    return np.concatenate([sample(rows[rows[:, 3] == label], each, draw) for label in range(3)])
