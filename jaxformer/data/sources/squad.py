"""SQuAD v1.1 (Rajpurkar et al. 2016, arXiv 1606.05250): questions about texts, from its JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxformer.data.base import Example
from jaxformer.errors import ConfigError

FILES = {"train": "train-v1.1.json", "dev": "dev-v1.1.json"}
QUESTION = 64  # the most pieces of a question that are read, as in BERT's run_squad.py


class Tokenizer(Protocol):
    """What is asked of a tokenizer: `jaxformer.data.sources.tokenizers`."""

    @property
    def end_of_text(self) -> int | None: ...

    @property
    def begin_of_text(self) -> tuple[int, ...]: ...

    def encode(self, text: str) -> np.ndarray: ...

    def locate(self, text: str) -> tuple[np.ndarray, np.ndarray]: ...


class Question(NamedTuple):
    """A question about the text with that number, and what people answered: at a character."""

    name: str
    text: str
    context: int
    answers: tuple[tuple[str, int], ...]


class Window(NamedTuple):
    """A part of a question's text: `count` pieces from `first` on."""

    question: int
    first: int
    count: int


def row(length: int, types: bool = True) -> Mapping[str, tuple[tuple[int, ...], Any]]:
    """{name: (shape, dtype)} of an example, known without files."""
    return {
        "inputs": ((length, 2) if types else (length,), np.int32),
        "valid": ((length,), np.bool_),
        "label": ((2,), np.int32),
    }


@dataclasses.dataclass(frozen=True)
class Squad:
    """`train` or `dev` of a folder with `train-v1.1.json` and `dev-v1.1.json`, as a source.

    Examples are windows: [CLS] question [SEP] part of the text [SEP], of `length` pieces; the next
    part begins `stride` pieces later, until the text has ended. They are {"inputs": (length, 2)
    int32, pieces and 0 or 1 for question or text; "valid": (length,) bool; "label": (2,) int32, the
    first and the last position of the first answer, or 0 twice, that of [CLS], where it is not
    whole in the window}. Without `types` "inputs" are the pieces alone. Of a question the first 64
    pieces are read, or as many as half the length.
    """

    folder: str
    split: str
    tokenizer: Tokenizer
    length: int = 384
    stride: int = 128
    types: bool = True

    def __post_init__(self) -> None:
        if self.split not in FILES:
            raise ConfigError(f"data.split={self.split!r}: must be train or dev")
        if self.length < 8:
            raise ConfigError(f"data.length={self.length}: must be at least 8")
        if self.stride < 1:
            raise ConfigError(f"data.stride={self.stride}: must be at least 1")

    @functools.cached_property
    def _read(self) -> tuple[list[str], list[Question]]:
        path = Path(self.folder).expanduser() / FILES[self.split]
        try:
            page = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"data.folder: {path} cannot be read ({error})") from error
        contexts: list[str] = []
        questions: list[Question] = []
        try:
            for article in page["data"]:
                for paragraph in article["paragraphs"]:
                    for asked in paragraph["qas"]:
                        answers = tuple((x["text"], x["answer_start"]) for x in asked["answers"])
                        found = Question(asked["id"], asked["question"], len(contexts), answers)
                        questions.append(found)
                    contexts.append(paragraph["context"])
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: after {len(questions)} questions: is not laid out as SQuAD v1.1 is "
                f"({type(error).__name__}: {error})"
            ) from error
        silent = [question.name for question in questions if not question.answers]
        if silent:
            raise ConfigError(
                f"{path}: question {silent[0]!r} has no answer; give SQuAD v1.1, where all have one"
            )
        return contexts, questions

    @property
    def contexts(self) -> Sequence[str]:
        """The texts."""
        return self._read[0]

    @property
    def questions(self) -> Sequence[Question]:
        """All of them, in the order of the file.

        Raises:
            ConfigError: the file cannot be read, or is none of SQuAD v1.1.
        """
        return self._read[1]

    @functools.cached_property
    def _pieces(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of every text its pieces, and their characters."""
        return [self.tokenizer.locate(text) for text in self.contexts]

    @functools.cached_property
    def _asked(self) -> list[np.ndarray]:
        """The pieces of every question."""
        most = min(QUESTION, self.length // 2)
        return [self.tokenizer.encode(question.text)[:most] for question in self.questions]

    @functools.cached_property
    def _special(self) -> tuple[list[int], list[int]]:
        begin, end = list(self.tokenizer.begin_of_text), self.tokenizer.end_of_text
        if len(begin) != 1 or end is None:
            raise ConfigError("data.tokenizer: SQuAD needs one with [CLS] and [SEP], as BERT's")
        return begin, [end]

    @functools.cached_property
    def windows(self) -> list[Window]:
        """All examples, question by question."""
        found = []
        for number, question in enumerate(self.questions):
            total = len(self._pieces[question.context][0])
            room = self.length - len(self._asked[number]) - 3
            first = 0
            while True:
                found.append(Window(number, first, min(room, total - first)))
                if first + room >= total:
                    break
                first += min(room, self.stride)
        return found

    def inside(self, index: int) -> tuple[int, np.ndarray]:
        """Where the text begins in an example, and the characters (n, 2) of its pieces there."""
        number, first, count = self.windows[index]
        characters = self._pieces[self.questions[number].context][1]
        return 2 + len(self._asked[number]), characters[first : first + count]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Example:
        number, first, count = self.windows[index]
        begin, end = self._special
        asked, pieces = self._asked[number], self._pieces[self.questions[number].context][0]
        parts = [*begin, *asked, *end], [*pieces[first : first + count], *end]
        used = len(parts[0]) + len(parts[1])
        inputs = np.zeros((self.length, 2), np.int32)
        inputs[:used, 0] = parts[0] + parts[1]
        inputs[len(parts[0]) : used, 1] = 1
        return {
            "inputs": inputs if self.types else inputs[:, 0],
            "valid": np.arange(self.length) < used,
            "label": self._label(index),
        }

    def _label(self, index: int) -> np.ndarray:
        begin, characters = self.inside(index)
        text, start = self.questions[self.windows[index].question].answers[0]
        stop = start + len(text.rstrip())
        start += len(text) - len(text.lstrip())
        # Pieces that share a character with the answer, which may begin or end within a word.
        at = np.flatnonzero((characters[:, 1] > start) & (characters[:, 0] < stop))
        if not at.size or characters[at[0], 0] > start or characters[at[-1], 1] < stop:
            return np.zeros(2, np.int32)
        return np.asarray([begin + at[0], begin + at[-1]], np.int32)
