"""Facts as sequences of symbols, and the authors' files of them."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxformer.errors import ConfigError
from jaxformer.papers.grokked_reasoning.facts import Comparison, Composition, Tables

SPECIAL = ("<mask>", "<sep>", "<a>", "</a>", "<q>", "</q>")
END = "</a>"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """One token for each symbol, "<e_0>", and after them one for padding. A `Tokenizer`."""

    symbols: tuple[str, ...]
    multiple: int = 1  # `size` is one of it; tokens beyond the symbols never occur

    @property
    def size(self) -> int:
        return -(-(len(self.symbols) + 1) // self.multiple) * self.multiple

    @property
    def pad(self) -> int:
        return len(self.symbols)

    @functools.cached_property
    def _ids(self) -> Mapping[str, int]:
        return {symbol: i for i, symbol in enumerate(self.symbols)}

    def encode(self, text: str) -> list[int]:
        """Symbols written one after another, "<e_1><r_2>"."""
        symbols = [f"<{name}>" for name in text.strip().strip("<>").split("><")] if text else []
        unknown = [symbol for symbol in symbols if symbol not in self._ids]
        if unknown:
            raise ConfigError(f"{unknown[0]!r}: is no symbol of the vocabulary, as in {text!r}")
        return [self._ids[symbol] for symbol in symbols]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.symbols[i] for i in tokens if 0 <= i < len(self.symbols))


# Of each table a column or a symbol in each place, and how many of them are the question.
Form = tuple[tuple[tuple[int, str] | str, ...], int]
E, R, A, V, LABEL = "<e_{}>", "<r_{}>", "<attr_{}>", "<{}>", "<attr_{}_{}>"
HOP: Form = (((0, E), (1, R), (2, E), END), 2)
TWO_HOPS: Form = (((0, E), (1, R), (2, R), (3, E), END), 3)
VALUE: Form = (((0, E), (1, A), (2, V), END), 2)
PAIR: Form = (((0, A), "<q>", (1, E), "<mask>", (2, E), (3, LABEL), END), 5)
ASKED_VALUE: Form = (("<q>", (0, E), (1, A), "<mask>", "</q>", "<a>", (2, V), END), 5)
ASKED_PAIR: Form = (
    ((0, A), "<q>", (1, E), "<mask>", (2, E), "</q>", "<a>", (3, LABEL), END),
    6,
)


@dataclasses.dataclass(frozen=True)
class Items:
    """Sequences (N, T) of tokens, `prompt` and `length` (N,) of each; padded at the right."""

    tokens: np.ndarray
    prompt: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Any) -> Items:
        return Items(self.tokens[rows], self.prompt[rows], self.length[rows])

    def arrays(self, context: int) -> dict[str, np.ndarray]:
        """What `LanguageTask` reads: "tokens" (N, context + 1), "weight" (N, context) of targets.

        Only the answer and the end count, neither the question nor the padding.

        Raises:
            ConfigError: a sequence is longer.
        """
        room = context + 1 - self.tokens.shape[1]
        if room < 0 and self.length.max(initial=0) > context + 1:
            raise ConfigError(
                f"data.context={context}: a fact has {self.length.max()} symbols, of which all "
                f"but the last are read; give at least {self.length.max() - 1}"
            )
        tokens = self.tokens[:, : context + 1]
        tokens = np.pad(tokens, ((0, 0), (0, max(room, 0))), mode="edge")
        at = 1 + np.arange(context)
        scored = (at >= self.prompt[:, None]) & (at < self.length[:, None])
        return {"tokens": tokens.astype(np.int32), "weight": scored.astype(np.float32)}


def symbols(base: Composition | Comparison) -> tuple[str, ...]:
    """The symbols of a knowledge base, in the authors' order."""
    names = [E.format(i) for i in range(base.entities)]
    if isinstance(base, Composition):
        return (*names, *(R.format(i) for i in range(base.relations)), *SPECIAL)
    names += [A.format(i) for i in range(base.attributes)]
    names += [V.format(i) for i in range(base.levels)]
    labels = [LABEL.format(a, k) for a in range(base.attributes) for k in range(3)]
    return (*names, *SPECIAL, *labels)


def forms(base: Composition | Comparison, asked: bool = False) -> tuple[Form, Form]:
    """How atomic and inferred facts are written; `asked`, as for complex reasoning."""
    if isinstance(base, Composition):
        return HOP, TWO_HOPS
    return (ASKED_VALUE, ASKED_PAIR) if asked else (VALUE, PAIR)


def texts(table: np.ndarray, form: Form) -> list[tuple[str, str]]:
    """Question and whole text of each row."""
    places, prompt = form

    def one(row: Sequence[int]) -> tuple[str, str]:
        words = [_word(place, row) for place in places]
        return "".join(words[:prompt]), "".join(words)

    return [one(row) for row in table.tolist()]


def _word(place: tuple[int, str] | str, row: Sequence[int]) -> str:
    if isinstance(place, str):
        return place
    column, name = place
    return name.format(row[0], row[column]) if name == LABEL else name.format(row[column])


def items(vocabulary: Vocabulary, table: np.ndarray, form: Form) -> Items:
    """The rows of a table as tokens."""
    return encode(vocabulary, texts(table, form))


def questions(vocabulary: Vocabulary, table: np.ndarray, form: Form) -> np.ndarray:
    """The tokens (N, P) of the questions alone: a model reads them and says the answer."""
    return items(vocabulary, table, form).tokens[:, : form[1]]


def encode(vocabulary: Vocabulary, pairs: Sequence[tuple[str, str]]) -> Items:
    """Questions and whole texts as tokens.

    Raises:
        ConfigError: an unknown symbol, or a text that does not begin with its question.
    """
    for question, text in pairs:
        if not text.startswith(question) or text == question:
            raise ConfigError(f"{text!r}: must go on from its question {question!r}")
    rows = [vocabulary.encode(text) for _, text in pairs]
    length = np.array([len(row) for row in rows], int)
    prompt = np.array([question.count("<") for question, _ in pairs], int)
    tokens = np.full((len(rows), length.max(initial=0)), vocabulary.pad)
    for row, into in zip(rows, tokens, strict=True):
        into[: len(row)] = row
    return Items(tokens, prompt, length)


def joined(parts: Sequence[Items], pad: int) -> Items:
    """Several items as one."""
    width = max(part.tokens.shape[1] for part in parts)
    tokens = [
        np.pad(p.tokens, ((0, 0), (0, width - p.tokens.shape[1])), constant_values=pad)
        for p in parts
    ]
    prompt, length = (np.concatenate([getattr(p, n) for p in parts]) for n in ("prompt", "length"))
    return Items(np.concatenate(tokens), prompt, length)


def write(
    folder: Path, vocabulary: Vocabulary, train: Tables, probes: Tables, how: tuple[Form, Form]
) -> None:
    """The authors' files: train.json, valid.json (OOD questions), test.json and vocab.json."""
    folder.mkdir(parents=True, exist_ok=True)

    def lines(tables: Tables, typed: bool) -> list[dict[str, str]]:
        return [
            {"input_text": a, "target_text": b, **({"type": name} if typed else {})}
            for name, table in tables.items()
            for a, b in texts(table, how[0] if name.endswith("atomic") else how[1])
        ]

    ood = {name: table for name, table in probes.items() if name == "test_inferred_ood"}
    for name, content in {
        "train": lines(train, typed=False),
        "valid": lines(ood, typed=False),
        "test": lines(probes, typed=True),
        "vocab": list(vocabulary.symbols),
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def read(folder: Path, multiple: int = 1) -> tuple[Vocabulary, Items, dict[str, Items]]:
    """The authors' files: the vocabulary, what is trained on, and the probes by type.

    Raises:
        ConfigError: a file is missing, is no JSON, or has a symbol that vocab.json does not know.
    """

    def load(name: str) -> Any:
        path = folder.expanduser() / f"{name}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"data.folder: {path} cannot be read: {error}") from error

    def pairs(lines: Any) -> list[tuple[str, str]]:
        return [(line["input_text"], line["target_text"]) for line in lines]

    vocabulary = Vocabulary(tuple(load("vocab")), multiple)
    by_type: dict[str, list[Any]] = {}
    for line in load("test"):
        by_type.setdefault(line["type"], []).append(line)
    probes = {name: encode(vocabulary, pairs(lines)) for name, lines in by_type.items()}
    return vocabulary, encode(vocabulary, pairs(load("train"))), probes
