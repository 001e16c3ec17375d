"""Lines of JSON as examples: texts with labels, or with what to write."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxformer.data.base import Example
from jaxformer.data.sources.tokenizers import Tokenizer
from jaxformer.recipe import ConfigError

__all__ = ["Form", "JsonLines", "Labelled", "Pairs", "read_lines"]


def read_lines(path: str | Path, *fields: str) -> list[dict[str, Any]]:
    """The objects of a file, one per line, each with all `fields`.

    Raises:
        ConfigError: no such file, a line that is no JSON object, or one that lacks a field.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error}); give a JSONL file") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number}: is no JSON ({error})") from error
        missing = [name for name in fields if not isinstance(row, dict) or name not in row]
        if missing:
            raise ConfigError(f"{path}, line {number}: needs an object with {missing[0]!r}")
        rows.append(row)
    if not rows:
        raise ConfigError(f"{path}: has no lines; give one JSON object per line")
    return rows


class Form(Protocol):
    """What the fields of a line become."""

    @property
    def fields(self) -> tuple[str, ...]: ...

    @property
    def row(self) -> Mapping[str, tuple[tuple[int, ...], Any]]:
        """{name: (shape, dtype)} of an example."""
        ...

    def example(self, line: Mapping[str, Any]) -> Example: ...


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """The lines of a file as a source."""

    path: str
    form: Form

    @functools.cached_property
    def _lines(self) -> list[dict[str, Any]]:
        return read_lines(self.path, *self.form.fields)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Example:
        try:
            return self.form.example(self._lines[index])
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{self.path}, example {index}: a field is of the wrong kind ({error})"
            ) from error


@dataclasses.dataclass(frozen=True)
class Labelled:
    """{"text", "label"}: the first `length` tokens and the number of a class."""

    tokenizer: Tokenizer
    length: int
    fields = ("text", "label")

    @property
    def row(self) -> Mapping[str, tuple[tuple[int, ...], Any]]:
        tokens = ((self.length,), np.int32)
        return {"inputs": tokens, "valid": ((self.length,), np.bool_), "label": ((), np.int32)}

    def example(self, line: Mapping[str, Any]) -> Example:
        begin, end = self.tokenizer.begin_of_text, self.tokenizer.end_of_text
        tokens = [*begin, *self.tokenizer.encode(line["text"])]
        tokens = [*tokens[: self.length - 1], *([] if end is None else [end])]
        inputs, valid = _fill(tokens, self.length)
        return {"inputs": inputs, "valid": valid, "label": np.int32(line["label"])}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """{"input", "target"}: the tokens to read and those to write, after the token `start`."""

    tokenizer: Tokenizer
    length: int
    start: int = 0
    fields = ("input", "target")

    @property
    def row(self) -> Mapping[str, tuple[tuple[int, ...], Any]]:
        return {
            "inputs": ((self.length,), np.int32),
            "valid": ((self.length,), np.bool_),
            "tokens": ((self.length + 1,), np.int32),
            "weight": ((self.length,), np.float32),
        }

    def example(self, line: Mapping[str, Any]) -> Example:
        end = self.tokenizer.end_of_text
        last = [] if end is None else [end]
        read, write = (
            [*self.tokenizer.encode(line[field])[: self.length - 1], *last] for field in self.fields
        )
        inputs, valid = _fill(read, self.length)
        tokens, _ = _fill([self.start, *write], self.length + 1)
        weight = np.arange(self.length) < len(write)
        return {
            "inputs": inputs,
            "valid": valid,
            "tokens": tokens,
            "weight": weight.astype(np.float32),
        }


def _fill(tokens: list[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens padded with zeros to `length`, and which of them are there."""
    filled = np.zeros(length, np.int32)
    filled[: len(tokens)] = tokens
    return filled, np.arange(length) < len(tokens)
