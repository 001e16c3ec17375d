"""Tasks that exist at any length, for one model and any variant of its attention."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from jaxformer.data.base import DeviceData, Epoch, IndexedData
from jaxformer.data.sources.image import digits
from jaxformer.data.sources.listops import CLASSES, TOKENS, ListOps
from jaxformer.data.sources.recall import Recall
from jaxformer.data.sources.text import Text
from jaxformer.data.transforms import Enlarge
from jaxformer.errors import ConfigError
from jaxformer.models.encoder import token_classifier
from jaxformer.models.lm import decoder_lm
from jaxformer.models.transformer import Transformer
from jaxformer.models.variant import Variant
from jaxformer.models.vit import vit
from jaxformer.recipe import Data, Task
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.tasks.language import LanguageTask

UNSEEN = 2**31  # added to a seed: rows that no training draws


@dataclasses.dataclass(frozen=True)
class Testbed:
    """A task, its training data and its unseen data, each for a length given.

    `task(trunk, variant, length)`; `train(length, rows, seed)`; `unseen(length, rows)`, endless or
    not. `score` names the metric that is compared, and `chance` says how well guessing does.
    """

    says: str
    score: str  # "loss" or "accuracy"
    task: Callable[[Transformer, Variant, int], Task]
    train: Callable[[int, int, int], Data]
    unseen: Callable[[int, int], Data]


def _decoder(vocabulary: int) -> Callable[[Transformer, Variant, int], Task]:
    def task(trunk: Transformer, variant: Variant, length: int) -> Task:
        parts = {"mixer": variant.mixer, "scheme": variant.scheme}
        return LanguageTask(decoder_lm(trunk, vocabulary=vocabulary, length=length, **parts))

    return task


def _lists(trunk: Transformer, variant: Variant, length: int) -> Task:
    parts = {"mixer": variant.mixer, "scheme": variant.scheme}
    sizes = {"vocabulary": len(TOKENS), "length": length, "classes": CLASSES}
    return ClassifyTask(token_classifier(trunk, **sizes, **parts))


def _image(trunk: Transformer, variant: Variant, length: int) -> Task:
    parts = {"mixer": variant.mixer, "scheme": variant.scheme}
    side = _side(length)
    return ClassifyTask(vit(trunk, image_size=side, patch=1, classes=10, pool="mean", **parts))


def _side(length: int) -> int:
    side = math.isqrt(length)
    if side * side != length or side % 8:
        raise ConfigError(
            f"lengths: {length} pixels are no square of a multiple of 8; the digits have 64, 256, "
            "576, 1024, ..."
        )
    return side


def _pairs(length: int) -> Recall:
    """A sixteenth of the sequence are keys, at most 64 of them."""
    return Recall(length, min(length // 16, 64), 257)


def _expressions(size: int, length: int, seed: int = 0) -> ListOps:
    # Lists of 2 to 6 arguments double in size with each level: these fill the length by half.
    depth = round(math.log2(length)) - 3
    return ListOps(size, length, depth, arguments=6, shortest=length // 4, seed=seed)


TEXT = Text("python-stdlib", "bytes", 257, 0.05)

TESTBEDS = {
    "lm": Testbed(
        "bytes of Python's library: nats per byte of unseen text (uniform: 5.55)",
        "loss",
        _decoder(257),
        TEXT.train,
        lambda length, rows: TEXT.held_out(length, rows),
    ),
    "recall": Testbed(
        "values of keys read before, in a causal sequence: accuracy (guessing: 0.8 %)",
        "accuracy",
        _decoder(257),
        lambda length, rows, seed: DeviceData(_pairs(length), rows, seed),
        lambda length, rows: DeviceData(_pairs(length), rows, UNSEEN),
    ),
    "listops": Testbed(
        "the value of a nested list of digits: accuracy (guessing: 10 %)",
        "accuracy",
        _lists,
        lambda length, rows, seed: IndexedData(_expressions(20_000, length), rows, seed),
        lambda length, rows: Epoch(_expressions(1000, length, seed=1), rows),
    ),
    "digits": Testbed(
        "8x8 digits, enlarged, pixel by pixel: accuracy (guessing: 10 %)",
        "accuracy",
        _image,
        lambda length, rows, seed: IndexedData(
            digits("train"), rows, seed, [Enlarge(_side(length))]
        ),
        lambda length, rows: Epoch(digits("test"), rows, transforms=[Enlarge(_side(length))]),
    ),
}
