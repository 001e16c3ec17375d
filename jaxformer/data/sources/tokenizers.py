"""Tokenizers: bytes, and the files of the Hugging Face libraries and of SentencePiece."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxformer.recipe import ConfigError


class Tokenizer(Protocol):
    """Text to tokens and back.

    `end_of_text` separates documents where the vocabulary has such a token; `begin_of_text` is
    what a model that reads one text by itself expects in front of it.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_of_text(self) -> int | None: ...

    @property
    def begin_of_text(self) -> tuple[int, ...]: ...

    def encode(self, text: str) -> np.ndarray:
        """Tokens (n,), without any that begin or end a text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str: ...


@runtime_checkable
class Locates(Protocol):
    """A tokenizer that knows where in a text its tokens are."""

    def locate(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The tokens (n,) as `encode` gives them, and the characters [first, last) (n, 2) of each.

        Characters are those of `text` as it is, whatever the tokenizer makes of it.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Bytes:
    """UTF-8 bytes as tokens 0..255, and 256 for the end of a text."""

    vocab_size: int = 257
    end_of_text: int = 256
    begin_of_text: tuple[int, ...] = ()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(int(t) for t in tokens if t < 256).decode(errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer of the Hugging Face `tokenizers` library, of its files in any of three forms.

    `tokenizer.json`; `vocab.json` and `merges.txt` (byte-level BPE); `vocab.txt` (WordPiece).
    """

    def __init__(self, *files: Path) -> None:
        self._tokenizer = _read_tokenizer(*files)
        self.vocab_size = self._tokenizer.get_vocab_size()
        # The file does not say which token ends a text; these are the names in use.
        names = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
        found = [i for i in map(self._tokenizer.token_to_id, names) if i is not None]
        self.end_of_text = found[0] if found else None
        # What its post-processor puts in front of a text, such as the <s> of LLaMA.
        special = self._tokenizer.encode("a").special_tokens_mask
        first = special.index(0) if 0 in special else 0
        self.begin_of_text = tuple(self._tokenizer.encode("a").ids[:first])

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def locate(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return np.asarray(found.ids, np.int32), np.asarray(found.offsets, np.int32).reshape(-1, 2)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode([int(t) for t in tokens])


def _read_tokenizer(*files: Path) -> Any:
    import tokenizers
    from tokenizers import implementations

    vocabulary = str(files[0])
    if len(files) == 2:
        return implementations.ByteLevelBPETokenizer.from_file(vocabulary, str(files[1]))
    if files[0].suffix == ".txt":
        return implementations.BertWordPieceTokenizer.from_file(vocabulary)
    return tokenizers.Tokenizer.from_file(vocabulary)


class SentencePieceTokenizer:
    """A SentencePiece `.model` file."""

    def __init__(self, path: str | Path) -> None:
        import sentencepiece

        self._tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self._tokenizer.vocab_size()
        begin, end = self._tokenizer.bos_id(), self._tokenizer.eos_id()
        self.end_of_text = end if end >= 0 else None
        self.begin_of_text = (begin,) if begin >= 0 else ()

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text), np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode([int(t) for t in tokens])


IN_FOLDERS = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("spiece.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
)


def tokenizer_files(spec: str | Path) -> tuple[Path, ...]:
    """The files that `spec` names: itself, or those of a folder; none where there are none."""
    path = Path(spec).expanduser()
    if not path.is_dir():
        known = path.is_file() and path.suffix in (".json", ".model", ".txt")
        return (path,) if known else ()
    for names in IN_FOLDERS:
        if all((path / name).is_file() for name in names):
            return tuple(path / name for name in names)
    return ()


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer named by `spec`: "bytes", a file, or a folder with such files.

    A `tokenizer.json`, a SentencePiece `.model` or a WordPiece `vocab.txt`; a folder may hold
    `vocab.json` and `merges.txt` instead.
    """
    if spec == "bytes":
        return Bytes()
    files = tokenizer_files(spec)
    if not files:
        raise ConfigError(
            f"data.tokenizer: {spec!r} is not a file ending in .json, .model or .txt, nor a folder "
            "with a tokenizer; give 'bytes', a Hugging Face tokenizer.json or a SentencePiece "
            ".model"
        )
    kind: Any = SentencePieceTokenizer if files[0].suffix == ".model" else HuggingFaceTokenizer
    try:
        return kind(*files)
    except Exception as error:  # both libraries raise bare Exception or RuntimeError
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"data.tokenizer: cannot read {spec!r} ({reason}); save it again or give 'bytes'"
        ) from error


@dataclasses.dataclass(frozen=True)
class NamedTokenizer:
    """The tokenizer of a spec (see `load_tokenizer`), read when it is first used."""

    spec: str

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.spec)

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    @property
    def end_of_text(self) -> int | None:
        return self._tokenizer.end_of_text

    @property
    def begin_of_text(self) -> tuple[int, ...]:
        return self._tokenizer.begin_of_text

    def encode(self, text: str) -> np.ndarray:
        return self._tokenizer.encode(text)

    def locate(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """As `Locates`.

        Raises:
            ConfigError: it is none.
        """
        if not isinstance(self._tokenizer, Locates):
            raise ConfigError(
                f"data.tokenizer={self.spec!r}: does not tell where its tokens are; give a "
                "vocab.txt or a tokenizer.json"
            )
        return self._tokenizer.locate(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens)


def save_bytes(path: str | Path) -> None:
    """Write `Bytes` as a `tokenizer.json`, for those who read only that."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # Byte-level BPE shows bytes that do not print as characters from 256 on, in order.
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in prints]
    letters = {byte: chr(byte) for byte in prints}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    vocabulary = {letter: byte for byte, letter in letters.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))
