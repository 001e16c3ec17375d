"""GLUE (Wang et al. 2018, arXiv 1804.07461): its nine tasks from their TSV files."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxformer.data.base import Example
from jaxformer.data.sources.tokenizers import Tokenizer
from jaxformer.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class GlueTask:
    """How the files of a task lie: columns by header, or by number where there is none.

    `labels` are the words of the label column in order of their numbers; without any it is a
    score. `ragged` files have a few lines that lack columns, which everybody leaves out. `scores`
    are what the benchmark judges the task by, over all of its dev set (table 1): "accuracy", or
    names of `jaxformer.evaluation.scores`.
    """

    sentences: tuple[str | int, ...]
    label: str | int
    labels: tuple[str, ...] = ("0", "1")
    dev: str = "dev.tsv"
    ragged: bool = False
    scores: tuple[str, ...] = ("accuracy",)

    @property
    def header(self) -> bool:
        return isinstance(self.label, str)


_ENTAILMENT = ("entailment", "not_entailment")
_MNLI = GlueTask(
    ("sentence1", "sentence2"),
    "gold_label",
    ("contradiction", "entailment", "neutral"),
    dev="dev_matched.tsv",
)
TASKS: Mapping[str, GlueTask] = {
    "cola": GlueTask((3,), 1, scores=("matthews",)),
    "sst-2": GlueTask(("sentence",), "label"),
    "mrpc": GlueTask(("#1 String", "#2 String"), "Quality", scores=("accuracy", "f1")),
    "sts-b": GlueTask(("sentence1", "sentence2"), "score", (), scores=("pearson", "spearman")),
    "qqp": GlueTask(
        ("question1", "question2"), "is_duplicate", ragged=True, scores=("accuracy", "f1")
    ),
    "mnli": _MNLI,
    "mnli-mm": dataclasses.replace(_MNLI, dev="dev_mismatched.tsv"),
    "qnli": GlueTask(("question", "sentence"), "label", _ENTAILMENT),
    "rte": GlueTask(("sentence1", "sentence2"), "label", _ENTAILMENT),
    "wnli": GlueTask(("sentence1", "sentence2"), "label"),
}


def task_named(name: str) -> GlueTask:
    """One of the tasks.

    Raises:
        ConfigError: there is no such task.
    """
    if name not in TASKS:
        raise ConfigError(f"data.task={name!r}: must be one of {', '.join(TASKS)}")
    return TASKS[name]


def row(name: str, length: int, types: bool = True) -> Mapping[str, tuple[tuple[int, ...], Any]]:
    """{name: (shape, dtype)} of an example, known without files."""
    label = np.int32 if task_named(name).labels else np.float32
    return {
        "inputs": ((length, 2) if types else (length,), np.int32),
        "valid": ((length,), np.bool_),
        "label": ((), label),
    }


@dataclasses.dataclass(frozen=True)
class Glue:
    """`train` or `dev` of the task `name` in its folder, as a source.

    Examples are {"inputs": (length, 2) int32, word pieces and the number of their sentence;
    "valid": (length,) bool; "label": int32, or float32 for a score}. They read [CLS] a [SEP] b
    [SEP]; of a pair that is too long the longer sentence loses its last pieces. Without `types`,
    for models that have none, "inputs" are the pieces alone.
    """

    name: str
    folder: str
    split: str
    tokenizer: Tokenizer
    length: int = 128
    types: bool = True

    def __post_init__(self) -> None:
        task_named(self.name)
        if self.split not in ("train", "dev"):
            raise ConfigError(f"data.split={self.split!r}: must be train or dev")
        if self.length < 5:
            raise ConfigError(f"data.length={self.length}: must be at least 5")

    @functools.cached_property
    def lines(self) -> list[tuple[tuple[str, ...], int | float]]:
        """Sentences and label of every example.

        Raises:
            ConfigError: no such file, a column that is missing, or an unknown label.
        """
        task = TASKS[self.name]
        path = Path(self.folder).expanduser() / ("train.tsv" if self.split == "train" else task.dev)
        try:
            # Fields are not quoted: a quotation mark is a quotation mark. And a line ends with
            # "\n" alone: sentences have other characters that `splitlines` would break at.
            rows = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.folder: {path} cannot be read ({error})") from error
        cells = [line.rstrip("\r").split("\t") for line in rows]
        wanted = [*task.sentences, task.label]
        if task.header:
            missing = [column for column in wanted if column not in cells[0]]
            if missing:
                raise ConfigError(f"{path}: has no column {missing[0]!r}; has {cells[0]}")
            columns = [cells[0].index(str(column)) for column in wanted]
            cells = cells[1:]
        else:
            columns = [int(column) for column in wanted]
        found = []
        for number, line in enumerate(cells, 1 + task.header):
            if len(line) <= max(columns):
                if task.ragged:
                    continue
                raise ConfigError(f"{path}, line {number}: has {len(line)} columns, too few")
            *sentences, label = (line[column] for column in columns)
            found.append((tuple(sentences), self._label(label, f"{path}, line {number}")))
        return found

    def _label(self, word: str, where: str) -> int | float:
        labels = TASKS[self.name].labels
        if labels and word in labels:
            return labels.index(word)
        try:
            if not labels:
                return float(word)
        except ValueError:
            pass
        allowed = f"one of {', '.join(labels)}" if labels else "a number"
        raise ConfigError(f"{where}: the label {word!r} is not {allowed}")

    def __len__(self) -> int:
        return len(self.lines)

    @functools.cached_property
    def _special(self) -> tuple[list[int], list[int]]:
        begin, end = list(self.tokenizer.begin_of_text), self.tokenizer.end_of_text
        if not begin or end is None:
            raise ConfigError("data.tokenizer: GLUE needs one with [CLS] and [SEP], as BERT's")
        return begin, [end]

    def __getitem__(self, index: int) -> Example:
        sentences, label = self.lines[index]
        begin, end = self._special
        parts = [[int(t) for t in self.tokenizer.encode(text)] for text in sentences]
        room = self.length - len(begin) - len(parts)
        while sum(map(len, parts)) > room:
            max(parts, key=len).pop()
        tokens, types = list(begin), [0] * len(begin)
        for number, part in enumerate(parts):
            tokens += [*part, *end]
            types += [number] * (len(part) + 1)
        inputs = np.zeros((self.length, 2), np.int32)
        inputs[: len(tokens)] = np.stack([tokens, types], 1)
        kind = np.int32 if TASKS[self.name].labels else np.float32
        return {
            "inputs": inputs if self.types else inputs[:, 0],
            "valid": np.arange(self.length) < len(tokens),
            "label": kind(label),
        }
