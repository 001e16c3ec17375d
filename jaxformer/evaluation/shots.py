"""The exam of a few-shot task: what a model answers in context, beside what it is trained to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxformer.data.sources.shots import ShotsFile
from jaxformer.errors import ConfigError
from jaxformer.evaluation.exams import Subject, wrong_kind
from jaxformer.evaluation.few_shot import FewShot, Shot, label_token
from jaxformer.evaluation.in_context import DESCENTS, Chosen, Comparison, Descent, Training, best
from jaxformer.recipe import EvalContext, Evaluator, TrainState
from jaxformer.tasks.language import LanguageTask, named_tokenizer


@dataclasses.dataclass(frozen=True)
class Settings:
    """What of a few-shot file is no text. Defaults are the paper's, where it states them.

    `trains` names parts of the model that descent is also measured with, {name: regex}. With
    `first_token` a label word may be several tokens, of which the first is asked for.
    """

    demonstrations: int = 8
    queries: int = 500  # the first of the test file
    sets: int = 1  # of demonstrations
    orders: int = 10
    rates: Sequence[float] = (1e-5, 5e-5, 1e-4, 5e-4)
    epochs: int = 200
    every: int = 20
    descents: Sequence[str] = ("full batch", "batch 1", "adam")
    trains: Mapping[str, str] = dataclasses.field(default_factory=dict)
    k: int = 10
    first_token: bool = False
    rows: int = 8  # prompts that are read at a time
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ["demonstrations", "queries", "sets", "orders", "epochs", "every", "k", "rows"]:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name}={value!r}: must be a whole number of at least 1")
        rates = self.rates
        if not isinstance(rates, list | tuple) or not rates or not all(_is_rate(x) for x in rates):
            raise ConfigError(f"rates={rates!r}: must be a list of learning rates")
        if not isinstance(self.trains, Mapping):
            raise ConfigError(f"trains={self.trains!r}: must be names and patterns of parameters")
        given = self.descents if isinstance(self.descents, list | tuple) else [self.descents]
        unknown = [name for name in given if name not in DESCENTS]
        if unknown or not self.descents:
            raise ConfigError(f"descents={self.descents!r}: must be of {', '.join(DESCENTS)}")

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Settings:
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in fields if name not in known]
        if unknown:
            raise ConfigError(f"{unknown[0]!r}: no such field; there are {', '.join(known)}")
        return cls(**fields)

    @property
    def comparison(self) -> Comparison:
        descents = {name: DESCENTS[name] for name in self.descents}
        parts = {name: Descent(trains=pattern) for name, pattern in self.trains.items()}
        return Comparison(
            self.orders,
            self.rates,
            Training(self.epochs, self.every),
            descents | parts,
            self.k,
            self.rows,
            self.seed,
        )


def _is_rate(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and x > 0


@dataclasses.dataclass(frozen=True)
class InContext:
    """Accuracy, overlap and sensitivity to order, in context and after descent.

    `file` is a task as `jaxformer.data.sources.shots` has it, with the fields of `Settings`.
    """

    file: str
    name: str = "few_shot"

    def of(self, subject: Subject) -> Evaluator:
        if not isinstance(subject.task, LanguageTask):
            raise wrong_kind(subject, "a causal language model", "few-shot")
        file, fields = ShotsFile.read(self.file)
        settings = Settings.of(fields)
        tasks = _tasks(file, settings, subject)
        return _Comparing(self.name, subject.task, tasks, settings)


def _tasks(file: ShotsFile, settings: Settings, subject: Subject) -> list[FewShot]:
    """The sets of demonstrations, drawn from the training examples, with the same queries."""
    tokenizer: Any = named_tokenizer(subject.task)
    label = {
        word: label_token(tokenizer, word, first=settings.first_token)
        for word in file.labels.values()
    }
    if len(set(label.values())) < len(label):
        raise ConfigError(f"labels: {', '.join(map(repr, label))} begin with the same token")

    def shot(example: tuple[str, str]) -> Shot:
        text, word = example
        return Shot([int(token) for token in tokenizer.encode(text)], label[word])

    train = file.examples("train")
    if len(train) < settings.demonstrations:
        raise ConfigError(
            f"demonstrations={settings.demonstrations}: there are {len(train)} examples to train on"
        )
    queries = [shot(example) for example in file.examples("test")[: settings.queries]]
    separator = [int(token) for token in tokenizer.encode(file.separator)]
    found = []
    for i in range(settings.sets):
        draw = np.random.default_rng([settings.seed, i])
        chosen = draw.choice(len(train), settings.demonstrations, replace=False)
        shots = [shot(train[j]) for j in chosen]
        begin = tuple(tokenizer.begin_of_text)
        found.append(FewShot(shots, queries, separator, subject.length or 2**30, begin))
    return found


@dataclasses.dataclass(frozen=True)
class _Comparing:
    """`InContext` of one subject."""

    name: str
    task: Any
    tasks: Sequence[FewShot]
    settings: Settings
    every: Any = "end"

    def __call__(self, state: TrainState, context: EvalContext) -> dict[str, float]:
        del context
        compare = self.settings.comparison
        found = [compare(self.task, state.params, state.extra, few) for few in self.tasks]
        icl = jax.tree.map(lambda *x: float(np.mean(x)), *[each[0] for each in found])
        curves = jax.tree.map(lambda *x: np.mean(x, axis=0), *[each[1] for each in found])
        row = {f"icl {name}": value for name, value in icl.items()}
        for name, measures in curves.items():
            row |= numbers(name, best(self.settings.rates, compare.training, measures))
            row[f"{name}: closest overlap"] = float(measures["overlap"][:, 1:].max())
        return row


def numbers(name: str, chosen: Chosen) -> dict[str, float]:
    """What is said of a descent: its best rate and moment by accuracy, and what it has there."""
    shown = ("accuracy", "sensitivity", "overlap", "cosine")
    where = {f"{name}: rate": chosen.rate, f"{name}: epochs": float(chosen.epoch)}
    return where | {f"{name}: {measure}": chosen.found[measure] for measure in shown}
