"""Text as one stream of tokens, cut into windows by position."""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import os
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxformer.data.base import Deferred, Epoch, Example, IndexedData
from jaxformer.data.sources.tokenizers import Tokenizer, load_tokenizer, tokenizer_files
from jaxformer.recipe import ConfigError

__all__ = ["PYTHON_STDLIB", "Corpus", "Text", "Windows", "encode_files", "load_corpus"]

PYTHON_STDLIB = "python-stdlib"
_NOT_LIBRARY = frozenset(
    ["site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"]
)


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens (T,) of the training and of the validation text, and what made them."""

    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray


def load_corpus(
    text: str | Sequence[str],
    tokenizer: str = "bytes",
    *,
    validation: float | str | Sequence[str] = 0.1,
    cache: str | Path | None = None,
) -> Corpus:
    """Read, tokenize and split text.

    `text` is a glob or several ("**" descends), or "python-stdlib": the sources of the running
    Python's own library and its language reference, about 11 MB that every machine has. Files are
    taken in sorted order, each ended by the tokenizer's end of text. `validation` is the fraction
    held out at the tail of the stream, or globs of its own files. With `cache`, a folder, tokens
    are written there once and memory-mapped afterwards, by every process that asks for the same.

    Raises `ConfigError` for text that is missing, empty or not UTF-8.
    """
    if not isinstance(validation, int | float):
        train, held_out = (_tokens(t, tokenizer, cache) for t in (text, validation))
        return Corpus(load_tokenizer(tokenizer), train, held_out)
    if not 0 <= validation < 1:
        raise ConfigError(f"data.validation: {validation}; give a fraction in [0, 1) or globs")
    tokens = _tokens(text, tokenizer, cache)
    border = len(tokens) - round(len(tokens) * validation)
    return Corpus(load_tokenizer(tokenizer), tokens[:border], tokens[border:])


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """A source of windows of `length` + 1 tokens: {"tokens": (length + 1,) int32}.

    Stride 1, for training, makes every position a start; stride `length`, for evaluation, predicts
    each token once (but for the first and a tail shorter than a window).
    """

    tokens: np.ndarray  # (T,)
    length: int
    stride: int = 1

    def __post_init__(self) -> None:
        if self.length < 1 or self.stride < 1:
            raise ConfigError(f"data.length: {self.length}, stride {self.stride}; give at least 1")
        if len(self.tokens) <= self.length:
            raise ConfigError(
                f"data.length: a window of {self.length} + 1 tokens exceeds the "
                f"{len(self.tokens)} of the text; use a shorter one or more text"
            )

    def __len__(self) -> int:
        return (len(self.tokens) - self.length - 1) // self.stride + 1

    def __getitem__(self, index: int) -> Example:
        start = index * self.stride
        return {"tokens": np.asarray(self.tokens[start : start + self.length + 1], np.int32)}


@dataclasses.dataclass(frozen=True)
class Text:
    """The text of a language model as data: read when the first batch is asked for.

    Fields are those of `load_corpus`; `vocabulary` is the model's, which the tokenizer's must not
    exceed.
    """

    text: str | tuple[str, ...]
    tokenizer: str
    vocabulary: int
    validation: float | str | tuple[str, ...] = 0.1
    cache: str | None = None

    @functools.cached_property
    def corpus(self) -> Corpus:
        corpus = load_corpus(
            self.text, self.tokenizer, validation=self.validation, cache=self.cache
        )
        if corpus.tokenizer.vocab_size > self.vocabulary:
            raise ConfigError(
                f"model.vocabulary: {self.vocabulary} is too small for data.tokenizer="
                f"{self.tokenizer!r}; give at least {corpus.tokenizer.vocab_size}"
            )
        return corpus

    def train(self, length: int, batch_size: int, seed: int) -> Deferred:
        """Shuffled windows of length + 1 tokens, from every position."""

        def make() -> IndexedData:
            return IndexedData(Windows(self.corpus.train, length), batch_size, seed)

        return Deferred(make, batch_size, {"tokens": ((length + 1,), np.int32)})

    def held_out(self, length: int, batch_size: int, limit: int | None = None) -> Deferred:
        """Windows that predict each held-out token once; or `limit` batches, spread over them."""

        def make() -> Epoch:
            tokens = self.corpus.validation
            spread = 1 if limit is None else (len(tokens) - length - 1) // (limit * batch_size)
            return Epoch(Windows(tokens, length, max(length, spread)), batch_size, limit=limit)

        row = {"tokens": ((length + 1,), np.int32), "weight": ((), np.float32)}
        return Deferred(make, batch_size, row)


def _tokens(text: str | Sequence[str], tokenizer_spec: str, cache: str | Path | None) -> np.ndarray:
    tokenizer = load_tokenizer(tokenizer_spec)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    files = _find(text)
    if cache is None:
        tokens = np.concatenate(list(_encode(_read(text, files), tokenizer, dtype)))
    else:
        folder = Path(cache).expanduser()
        path = folder / f"{_fingerprint(text, files, tokenizer_spec)}.{dtype.name}"
        if not path.exists():
            _write(path, _encode(_read(text, files), tokenizer, dtype))
        tokens = np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
    if not len(tokens):
        raise ConfigError(f"data.text: {text!r} is empty; give files with text")
    return tokens


def encode_files(text: str | Sequence[str], tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """All tokens (T,) of the files that globs name, and how many bytes of text they stand for.

    Every text begins and ends as the tokenizer has it.
    """
    pieces, size = [np.zeros(0, np.int32)], 0
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    for document in _read(text, _find(text)):
        tokens = tokenizer.encode(document)
        pieces.append(np.asarray([*tokenizer.begin_of_text, *tokens, *end], np.int32))
        size += len(document.encode())
    if not size:
        raise ConfigError(f"data.text: {text!r} is empty; give files with text")
    return np.concatenate(pieces), size


def _find(text: str | Sequence[str]) -> list[Path]:
    """The files of `text`, sorted; those of the standard library by a hash of their names."""
    if text == PYTHON_STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        files = [p for p in _walk(root) if p.relative_to(root).as_posix() != "pydoc_data/topics.py"]
        if not files:
            raise ConfigError(f"data.text: no Python sources in {root}; give globs of text files")
        # Shuffled, or the held-out tail would be the packages from w to z.
        return sorted(
            files, key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest()
        )
    matched: set[Path] = set()
    for pattern in [text] if isinstance(text, str) else text:
        found = [Path(p) for p in glob.glob(os.path.expanduser(pattern), recursive=True)]
        found = [p for p in found if p.is_file()]
        if not found:
            raise ConfigError(
                f"data.text: no file matches {pattern!r}; give globs of text files or "
                f"{PYTHON_STDLIB!r}"
            )
        matched.update(found)
    return sorted(matched)


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _NOT_LIBRARY)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def _read(text: str | Sequence[str], files: Iterable[Path]) -> Iterator[str]:
    """Documents one by one; files of the standard library that are not UTF-8 are left out."""
    if text == PYTHON_STDLIB:
        import pydoc_data.topics

        yield from (topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    for file in files:
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            if text != PYTHON_STDLIB:
                raise ConfigError(
                    f"data.text: {str(file)!r} is not UTF-8 (byte {error.start}); convert it, "
                    "or leave it out of the globs"
                ) from error
        except OSError as error:
            raise ConfigError(
                f"data.text: cannot read {str(file)!r} ({error.strerror}); check its permissions"
            ) from error


def _encode(
    documents: Iterable[str], tokenizer: Tokenizer, dtype: np.dtype
) -> Iterator[np.ndarray]:
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    yield np.zeros(0, dtype)
    for document in documents:
        if document:
            yield tokenizer.encode(document).astype(dtype)
            yield np.asarray(end, dtype)


def _fingerprint(text: str | Sequence[str], files: Iterable[Path], tokenizer_spec: str) -> str:
    """What decides the tokens: the files as they are now and the tokenizer's own file."""
    parts = [text if text == PYTHON_STDLIB else "files", tokenizer_spec]
    if tokenizer_spec != "bytes":
        content = b"".join(file.read_bytes() for file in tokenizer_files(tokenizer_spec))
        parts[1] = hashlib.sha256(content).hexdigest()
    for file in files:
        status = file.stat()
        parts.append(f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _write(path: Path, pieces: Iterable[np.ndarray]) -> None:
    """Write under another name and rename, so that no process ever maps half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    except OSError as error:
        raise ConfigError(
            f"data.cache: cannot write to {str(path.parent)!r} ({error.strerror}); give a writable "
            "folder, or None to keep tokens in memory"
        ) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            for piece in pieces:
                piece.tofile(file)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
