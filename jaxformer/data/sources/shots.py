r"""Few-shot tasks from files: texts with a label, and the words that ask for it and name it.

A task is a JSON file,

    {"train": "train.jsonl", "test": "test.jsonl",
     "prompt": "{premise} Question: {hypothesis} True or false? Answer:",
     "labels": {"entailment": " true", "not_entailment": " false"},
     "separator": "\n\n"}

whose files (beside it) hold one JSON object per line, with "label" and the fields that the prompt
names. With "glue": "rte" and "folder" in place of the files they are those of GLUE, whose sentences
are called "text", or "premise" and "hypothesis".
"""

from __future__ import annotations

import dataclasses
import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxformer.data.sources import glue
from jaxformer.data.sources.jsonl import read_lines
from jaxformer.data.sources.tokenizers import Bytes
from jaxformer.errors import ConfigError

_TEXTS = ("prompt", "separator", "train", "test", "glue", "folder")
_SENTENCES = {1: ("text",), 2: ("premise", "hypothesis")}


@dataclasses.dataclass(frozen=True)
class ShotsFile:
    """A few-shot task: what is asked, and where the examples are.

    `labels` are the words by the label of a line; each follows the prompt as it is, so most begin
    with a space. `separator` stands between two examples.

    Raises:
        ConfigError: a field is missing, or a part of it of the wrong kind.
    """

    prompt: str
    labels: Mapping[str, str]
    separator: str = "\n\n"
    train: str = ""
    test: str = ""
    glue: str = ""
    folder: str = ""

    def __post_init__(self) -> None:
        for name in _TEXTS:
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be text")
        words = self.labels.values() if isinstance(self.labels, Mapping) else ()
        if len(words) < 2 or not all(isinstance(word, str) and word for word in words):
            raise ConfigError(f"labels={self.labels!r}: must be two or more labels and their words")
        if not self.fields:
            raise ConfigError(f"prompt={self.prompt!r}: names no field, such as {{text}}")
        if not self.glue and not (self.train and self.test):
            raise ConfigError("train, test: name two JSONL files, or give glue and folder")

    @property
    def fields(self) -> tuple[str, ...]:
        """Those that the prompt names."""
        try:
            found = [name for _, name, _, _ in string.Formatter().parse(self.prompt)]
        except ValueError as error:
            raise ConfigError(f"prompt={self.prompt!r}: {error}; write {{{{ for {{") from None
        return tuple(dict.fromkeys(name for name in found if name is not None))

    @classmethod
    def read(cls, path: str | Path) -> tuple[ShotsFile, dict[str, Any]]:
        """The task of a file, and the fields that say something else."""
        row = _object(path)
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in ("prompt", "labels") if name not in row]
        if missing:
            raise ConfigError(f"{path}: has no {missing[0]!r}")
        beside = Path(path).expanduser().parent
        for name in ("train", "test", "folder"):
            if isinstance(row.get(name), str) and row[name]:
                row[name] = str(beside / Path(row[name]).expanduser())
        found = cls(**{name: row.pop(name) for name in names if name in row})
        return found, row

    def examples(self, split: str) -> list[tuple[str, str]]:
        """(prompt, word of the label) of all examples of "train" or "test".

        Raises:
            ConfigError: a file cannot be read, or an example lacks a field or a known label.
        """
        if self.glue:
            return self._glue("train" if split == "train" else "dev")
        path = self.train if split == "train" else self.test
        rows = read_lines(path, *self.fields, "label")
        return [self._one(row, f"{path}, example {i}") for i, row in enumerate(rows, 1)]

    def _one(self, row: Mapping[str, Any], where: str) -> tuple[str, str]:
        label = str(row["label"])
        if label not in self.labels:
            raise ConfigError(f"{where}: the label {label!r} is none of {', '.join(self.labels)}")
        return self.prompt.format(**{name: row[name] for name in self.fields}), self.labels[label]

    def _glue(self, split: str) -> list[tuple[str, str]]:
        task = glue.task_named(self.glue)
        if not task.labels:
            raise ConfigError(f"glue={self.glue!r}: has scores, and no labels to name")
        names = _SENTENCES[len(task.sentences)]
        unknown = [name for name in self.fields if name not in names]
        if unknown:
            raise ConfigError(
                f"prompt: names {unknown[0]!r}; the sentences of {self.glue} are {', '.join(names)}"
            )
        # Bytes: lines are read as text, and nothing is encoded.
        lines = glue.Glue(self.glue, self.folder, split, Bytes()).lines
        return [
            self._one(
                {**dict(zip(names, sentences, strict=True)), "label": task.labels[int(label)]},
                f"{self.folder}, example {i}",
            )
            for i, (sentences, label) in enumerate(lines, 1)
        ]


def _object(path: str | Path) -> dict[str, Any]:
    try:
        row = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a JSON file") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is no JSON ({error})") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{path}: must hold one JSON object")
    return row
