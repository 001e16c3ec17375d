"""Exams: measurements that any model of the right kind can take, whatever it was trained on."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxformer.data.base import Epoch, Example, Source, Transform
from jaxformer.data.sources.image import ImageFolder, digits
from jaxformer.data.sources.jsonl import read_lines
from jaxformer.data.sources.text import Windows, encode_files
from jaxformer.data.sources.tfds import PreparedDataset
from jaxformer.data.transforms import Enlarge, Normalize
from jaxformer.errors import ConfigError
from jaxformer.evaluation.batch import rows_that_fit
from jaxformer.evaluation.evaluators import MeanEvaluator, perplexity
from jaxformer.parallel.sharding import place_batch
from jaxformer.recipe import Batch, EvalContext, Evaluator, Task, TrainState
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.tasks.language import LanguageTask, named_tokenizer
from jaxformer.tasks.masked import MaskedLanguageTask


@dataclasses.dataclass(frozen=True)
class Subject:
    """A checkpoint in memory, ready to be examined.

    `row` is one (abstract) row of what its task reads, `length` the most tokens it can read,
    `labels` the names of its classes and `pixels` the mean and deviation it wants images
    normalised by, where these are known.
    """

    name: str
    step: int
    task: Task
    state: TrainState
    mesh: Mesh
    row: Batch
    evaluators: Sequence[Evaluator] = ()
    phase: str = ""
    workdir: Path | None = None
    length: int | None = None
    labels: tuple[str, ...] = ()
    pixels: tuple[Sequence[float], Sequence[float]] | None = None

    def take(self, exam: Exam | Evaluator) -> dict[str, float]:
        """{"exam/metric": value}."""
        evaluator = exam.of(self) if isinstance(exam, Exam) else exam
        context = EvalContext(self.mesh, self.phase, self.workdir)
        with jax.set_mesh(self.mesh):
            found = evaluator(self.state, context)
        return {f"{evaluator.name}/{name}": float(value) for name, value in found.items()}


@runtime_checkable
class Exam(Protocol):
    """A measurement of subjects of a kind."""

    def of(self, subject: Subject) -> Evaluator:
        """The measurement of this one.

        Raises:
            ConfigError: it is not of that kind.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well text is predicted: nats per token, perplexity, and bits per byte of the text.

    The last compares models with different tokenizers. `text` is a glob, or several; every text
    begins and ends as the tokenizer has it, and windows of `length` tokens (the most the model
    reads, at most 1024, when None) predict each token once.
    """

    text: str | tuple[str, ...]
    length: int | None = None
    batch: int | None = None  # rows; None: as many as fit, at most 32
    name: str = "text"

    def of(self, subject: Subject) -> Evaluator:
        if not isinstance(subject.task, LanguageTask | MaskedLanguageTask):
            raise wrong_kind(subject, "a language model", "text")
        length = self.length or min(subject.length or 1024, 1024)
        if subject.length is not None and length > subject.length:
            raise ConfigError(
                f"length={length}: {subject.name} reads at most {subject.length} tokens"
            )
        tokenizer = named_tokenizer(subject.task)
        tokens, size = encode_files(self.text, tokenizer)
        source = Windows(tokens, min(length, len(tokens) - 1), length)
        rows = self.batch or _rows(subject, source)
        data = Epoch(source, rows)
        nats_per_bit_byte = len(tokens) / size / math.log(2)

        def bits_per_byte(values: Mapping[str, float]) -> float:
            return values["loss"] * nats_per_bit_byte

        derived = {"perplexity": perplexity, "bits_per_byte": bits_per_byte}
        return MeanEvaluator(subject.task, data, self.name, derived=derived)


@dataclasses.dataclass(frozen=True)
class ImageAccuracy:
    """The share of images whose class is found.

    `images` is a folder with a sub-folder per class, "digits", or the folder of a prepared TFDS
    dataset with its split behind a colon. Where the sub-folders bear the model's own names of its
    classes they are matched by name, else by sorted order.
    """

    images: str
    batch: int | None = None
    name: str = "images"

    def of(self, subject: Subject) -> Evaluator:
        data = image_epoch(subject, self.images, self.batch)
        return MeanEvaluator(subject.task, data, self.name)


def image_epoch(
    subject: Subject, where: str, batch: int | None = None, split: Literal["train", "test"] = "test"
) -> Epoch:
    """The images that `where` names, as a subject wants them; of the digits those of `split`.

    Raises:
        ConfigError: it reads no images, or there are none.
    """
    if not isinstance(subject.task, ClassifyTask) or "image" not in subject.row:
        raise wrong_kind(subject, "an image classifier", "images")
    _, height, _, channels = subject.row["image"].shape
    source = _images(where, height, channels, subject.labels, split)
    transforms: list[Transform] = [] if subject.pixels is None else [Normalize(*subject.pixels)]
    if where == "digits" and height != 8:
        transforms.insert(0, Enlarge(height))
    return Epoch(source, batch or _rows(subject, source, transforms), transforms=transforms)


def _images(
    where: str, size: int, channels: int, labels: tuple[str, ...], of_digits: Any
) -> Source:
    folder, _, split = where.partition(":")
    if where == "digits":
        return digits(of_digits)
    if (Path(folder) / "dataset_info.json").is_file():
        return Prepared(PreparedDataset(folder, split or "test", ("image", "label")), size)
    source = ImageFolder(where, size, "RGB" if channels == 3 else "L")
    if set(source.classes) <= set(labels):
        return Relabelled(source, tuple(labels.index(name) for name in source.classes))
    return source


@dataclasses.dataclass(frozen=True)
class Relabelled:
    """A source whose label i is called `numbers[i]`."""

    source: Source
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        return {**example, "label": np.int32(self.numbers[int(example["label"])])}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """uint8 images of any size as float32 (size, size, C) in [0, 1]."""

    source: Source
    size: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        from PIL import Image, ImageOps

        example = self.source[index]
        pixels = np.asarray(example["image"])
        picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        picture = ImageOps.fit(picture, (self.size, self.size), Image.Resampling.BILINEAR)
        image = np.asarray(picture, np.float32).reshape(self.size, self.size, -1) / 255
        return {"image": image, "label": np.int32(example["label"])}


@dataclasses.dataclass(frozen=True)
class MultipleChoice:
    """Which of several answers a language model finds likeliest.

    `file` holds lines {"question", "choices", "answer"}; the answer is the number of a choice, its
    letter or its text. A choice scores the log-likelihood of its tokens after the question
    (`accuracy`), or that divided by its bytes (`accuracy_by_length`). Of a question too long for
    the model the end is read.
    """

    file: str
    batch: int | None = None
    name: str = "choices"

    def of(self, subject: Subject) -> Evaluator:
        if not isinstance(subject.task, LanguageTask):
            raise wrong_kind(subject, "a causal language model", "choices")
        questions = [
            _question(self.file, number, row)
            for number, row in enumerate(read_lines(self.file, "question", "choices", "answer"))
        ]
        return _Choosing(self, subject, questions)


class _Question(tuple):
    """(question, choices, number of the answer)."""


def _question(file: str, number: int, row: Mapping[str, Any]) -> _Question:
    choices, answer = row["choices"], row["answer"]
    good = (
        isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) for c in choices)
    )
    if not good or not isinstance(row["question"], str):
        raise ConfigError(
            f"{file}, question {number}: needs a text and a list of two or more texts"
        )
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    elif isinstance(answer, str) and len(answer) == 1 and answer.isalpha():
        answer = ord(answer.upper()) - ord("A")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ConfigError(
            f"{file}, question {number}: answer {row['answer']!r} must be the number (from 0), the "
            f"letter or the text of one of its {len(choices)} choices"
        )
    return _Question((row["question"], choices, answer))


@dataclasses.dataclass(frozen=True)
class _Choosing:
    """`MultipleChoice` of one subject."""

    exam: MultipleChoice
    subject: Subject
    questions: Sequence[_Question]
    every: Any = "end"

    @property
    def name(self) -> str:
        return self.exam.name

    def __call__(self, state: TrainState, context: EvalContext) -> dict[str, float]:
        rows, scored = self._rows()
        found = self._scores(state, context, rows, scored)
        right = by_length = 0
        at = 0
        for _, choices, answer in self.questions:
            scores = found[at : at + len(choices)]
            sizes = np.array([max(len(choice.encode()), 1) for choice in choices])
            right += int(np.argmax(scores) == answer)
            by_length += int(np.argmax(scores / sizes) == answer)
            at += len(choices)
        count = len(self.questions)
        return {"accuracy": right / count, "accuracy_by_length": by_length / count}

    def _rows(self) -> tuple[list[list[int]], list[int]]:
        """The tokens of every question with every choice, and how many of them are the choice."""
        tokenizer = named_tokenizer(self.subject.task)
        longest = (self.subject.length or 2**30) + 1
        rows, scored = [], []
        for question, choices, _ in self.questions:
            before = len(tokenizer.encode(question))
            for choice in choices:
                between = "" if question[-1:].isspace() or choice[:1].isspace() else " "
                # Encoded together: a word that both would share is one token of the choice.
                tokens = [int(t) for t in tokenizer.encode(question + between + choice)]
                count = max(len(tokens) - before, 1)
                tokens = [*tokenizer.begin_of_text, *tokens]
                if len(tokens) == count:  # nothing in front to predict it from
                    end = tokenizer.end_of_text
                    tokens = [0 if end is None else end, *tokens]
                if count >= longest:
                    raise ConfigError(
                        f"{self.exam.file}: a choice has {count} tokens; {self.subject.name} "
                        f"reads at most {longest - 1}"
                    )
                rows.append(tokens[-longest:])
                scored.append(count)
        return rows, scored

    def _scores(
        self, state: TrainState, context: EvalContext, rows: list[list[int]], scored: list[int]
    ) -> np.ndarray:
        """The log-likelihood of each row's last tokens, in batches of rows of like length."""
        order = np.argsort([len(row) for row in rows], kind="stable")
        lengths = [-(-len(row) // 32) * 32 for row in rows]  # few shapes to compile for
        size = self.exam.batch or 16
        ways = context.mesh.shape["data"] * context.mesh.shape["fsdp"]
        size = -(-size // ways) * ways
        found = np.zeros(len(rows))
        for start in range(0, len(rows), size):
            chosen = order[start : start + size]
            length = max(lengths[i] for i in chosen)
            if self.subject.length is not None:
                length = min(length, self.subject.length + 1)
            tokens = np.zeros((size, length), np.int32)
            weight = np.zeros((size, length - 1), np.float32)
            for r, i in enumerate(chosen):
                tokens[r, : len(rows[i])] = rows[i]
                weight[r, len(rows[i]) - 1 - scored[i] : len(rows[i]) - 1] = 1
            batch = place_batch({"tokens": tokens, "weight": weight}, context.mesh, size)
            found[chosen] = np.asarray(self._score(state.params, state.extra, batch))[: len(chosen)]
        return found

    @functools.cached_property
    def _score(self) -> Any:
        def score(params: Any, extra: Any, batch: Batch) -> jax.Array:
            key = jax.random.key(0)
            logits = self.subject.task.predict(params, extra, batch, key=key)  # type: ignore[attr-defined]
            logits = jax.nn.log_softmax(logits.astype(jnp.float32))
            targets = batch["tokens"][:, 1:, None]
            return (jnp.take_along_axis(logits, targets, -1)[..., 0] * batch["weight"]).sum(-1)

        return jax.jit(score)


def _rows(subject: Subject, source: Source, transforms: Sequence[Transform] = ()) -> int:
    """Rows of a batch of this source that fit, at most 32, a multiple of the devices."""
    ways = subject.mesh.shape["data"] * subject.mesh.shape["fsdp"]
    most = min(32, -(-len(source) // ways) * ways)
    example = source[0]
    for transform in transforms:
        example = transform(example, np.random.default_rng(0))
    example = {**example, "weight": np.float32(1)}
    return rows_that_fit(subject.task, subject.state, example, subject.mesh, most)


def wrong_kind(subject: Subject, needed: str, exam: str) -> ConfigError:
    return ConfigError(
        f"{exam}: needs {needed}; {subject.name} is scored by {type(subject.task).__name__}"
    )
