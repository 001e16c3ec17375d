"""Knowledge graphs: triples (head, relation, tail), as files of ids and as one made of rules."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxformer.recipe import ConfigError

__all__ = [
    "Folder",
    "KnowledgeGraph",
    "observe",
    "read_folder",
    "read_map",
    "read_stats",
    "ruled_graph",
]

SPLITS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True, eq=False)
class KnowledgeGraph:
    """Distinct triples (M, 3) of ids, (head, relation, tail).

    Raises:
        ConfigError: an id that is out of range.
    """

    triples: np.ndarray
    entities: int
    relations: int

    def __post_init__(self) -> None:
        triples = np.unique(np.asarray(self.triples, np.int64).reshape(-1, 3), axis=0)
        sizes = np.array([self.entities, self.relations, self.entities])
        wrong = ((triples < 0) | (triples >= sizes)).any(1)
        if wrong.any():
            h, r, t = triples[wrong][0].tolist()
            raise ConfigError(
                f"KnowledgeGraph: triple ({h}, {r}, {t}) is out of range; there are "
                f"{self.entities} entities and {self.relations} relations"
            )
        object.__setattr__(self, "triples", triples)

    def __len__(self) -> int:
        return len(self.triples)

    def edges(self, relation: int) -> tuple[np.ndarray, np.ndarray]:
        """(heads, tails) of a relation.

        Raises:
            ConfigError: there is no such relation.
        """
        if not 0 <= relation < self.relations:
            raise ConfigError(
                f"relation {relation}: the graph has relations 0 to {self.relations - 1}"
            )
        return self._edges[relation]

    def touching(self, entity: int, end: str) -> np.ndarray:
        """The triples whose "head" or "tail" is `entity`."""
        column = {"head": 0, "tail": 2}[end]
        return self.triples[self._rows[column][entity]]

    def has(self, head: int, tail: int) -> np.ndarray:
        """The relations from `head` to `tail`."""
        out = self.touching(head, "head")
        return out[out[:, 2] == tail, 1]

    def joined(self, other: KnowledgeGraph) -> KnowledgeGraph:
        """The triples of both."""
        triples = np.concatenate([self.triples, other.triples])
        return KnowledgeGraph(triples, self.entities, self.relations)

    @functools.cached_property
    def _edges(self) -> list[tuple[np.ndarray, np.ndarray]]:
        by_relation = self.triples[np.argsort(self.triples[:, 1], kind="stable")]
        ends = np.searchsorted(by_relation[:, 1], np.arange(self.relations + 1))
        parts = [by_relation[a:b] for a, b in itertools.pairwise(ends)]
        return [(part[:, 0], part[:, 2]) for part in parts]

    @functools.cached_property
    def _rows(self) -> dict[int, list[np.ndarray]]:
        found = {}
        for column in (0, 2):
            order = np.argsort(self.triples[:, column], kind="stable")
            ends = np.searchsorted(self.triples[order, column], np.arange(self.entities + 1))
            found[column] = [order[a:b] for a, b in itertools.pairwise(ends)]
        return found


def observe(graph: KnowledgeGraph, share: float, draw: np.random.Generator) -> KnowledgeGraph:
    """A graph of that share of the triples, drawn at random.

    Raises:
        ConfigError: `share` is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigError(f"data.observed={share}: must be in (0, 1]")
    chosen = draw.permutation(len(graph))[: max(round(share * len(graph)), 1)]
    return dataclasses.replace(graph, triples=graph.triples[chosen])


RULED = 8  # relations of a `ruled_graph`


def ruled_graph(entities: int, out_degree: int, draw: np.random.Generator) -> KnowledgeGraph:
    """A graph in which some triples follow from others; its 8 relations are

    0, 1: `out_degree` tails for each entity, drawn at random; 2: their composition, 0 then 1;
    3, 4: their inverses; 5: the parent in a hierarchy of all entities; 6: the parent's parent; 7:
    the inverse of 5.

    Raises:
        ConfigError: fewer than 3 entities, or no such degree.
    """
    if entities < 3 or not 1 <= out_degree < entities:
        raise ConfigError(
            f"data.entities={entities}, data.out_degree={out_degree}: give at least 3 entities, "
            "and a degree from 1 to one less than that"
        )
    heads = np.repeat(np.arange(entities), out_degree)

    def random_tails() -> np.ndarray:
        ranked = np.argsort(draw.random((entities, entities)) + 2 * np.eye(entities), axis=1)
        return ranked[:, :out_degree].reshape(-1)

    first, second = random_tails(), random_tails()
    composed = second.reshape(entities, out_degree)[first]
    child = np.arange(1, entities)
    parent = np.concatenate([[-1], draw.integers(0, np.arange(1, entities))])
    renamed = draw.permutation(entities)  # or an id would tell how high an entity stands
    grand = child[parent[child] > 0]
    parts = [
        (heads, 0, first),
        (heads, 1, second),
        (np.repeat(heads, out_degree), 2, composed.reshape(-1)),
        (first, 3, heads),
        (second, 4, heads),
        (renamed[child], 5, renamed[parent[child]]),
        (renamed[grand], 6, renamed[parent[parent[grand]]]),
        (renamed[parent[child]], 7, renamed[child]),
    ]
    triples = [np.stack(np.broadcast_arrays(*part), axis=-1) for part in parts]
    return KnowledgeGraph(np.concatenate(triples), entities, RULED)


# ------------------------------------------------------------------------------------- files


class Folder(NamedTuple):
    """The triples of each split by themselves, and names by id where there are maps of them."""

    splits: Mapping[str, KnowledgeGraph]
    entity_names: Mapping[int, str]
    relation_names: Mapping[int, str]


def read_folder(folder: str | Path) -> Folder:
    """Of `train.txt`, `valid.txt` and `test.txt`, lines of ids `head<TAB>relation<TAB>tail`.

    `stats.txt` says how many entities and relations there are; `ent2id.pkl` and `rel2id.pkl`, or
    `id2ent.pkl` and `id2rel.pkl`, are read where they exist.

    Raises:
        ConfigError: a file that is missing or is not as said here.
    """
    folder = Path(folder).expanduser()
    entities, relations = read_stats(folder / "stats.txt")
    splits = {
        name: KnowledgeGraph(_triples(folder / f"{name}.txt"), entities, relations)
        for name in SPLITS
    }
    names = []
    for short in ("ent", "rel"):
        found: Mapping[int, str] = {}
        if (path := folder / f"{short}2id.pkl").exists():
            found = {int(number): str(name) for name, number in read_map(path).items()}
        elif (path := folder / f"id2{short}.pkl").exists():
            found = {int(number): str(name) for number, name in read_map(path).items()}
        names.append(found)
    return Folder(splits, *names)


def read_stats(path: str | Path) -> tuple[int, int]:
    """(entities, relations) of the lines `numentity: N` and `numrelations: M`.

    Raises:
        ConfigError: no such file, or one without these lines.
    """
    found = dict(re.findall(r"(\w+):\s*(\d+)", _text(Path(path))))
    if not {"numentity", "numrelations"} <= found.keys():
        raise ConfigError(f"{path}: needs the lines 'numentity: N' and 'numrelations: M'")
    return int(found["numentity"]), int(found["numrelations"])


class _PlainUnpickler(pickle.Unpickler):
    """Reads what needs no code: a pickle may name any function, and would have it called."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"names {module}.{name}")


def read_map(path: str | Path) -> dict[Any, Any]:
    """A pickled dictionary of numbers and texts.

    Raises:
        ConfigError: it cannot be read, or holds anything else.
    """
    try:
        found = _PlainUnpickler(io.BytesIO(Path(path).read_bytes())).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ConfigError(f"{path}: is no pickle of a plain dictionary ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds a {type(found).__name__}; needs a dictionary")
    return found


def _text(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.folder: {path} cannot be read: {error}") from error


def _triples(path: Path) -> np.ndarray:
    rows = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        parts = line.split("\t")
        if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
            raise ConfigError(
                f"{path}, line {number}: {line!r} is not 'head<TAB>relation<TAB>tail'"
            )
        rows.append([int(part) for part in parts])
    return np.array(rows, np.int64).reshape(-1, 3)
