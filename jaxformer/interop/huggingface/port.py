"""What a Hugging Face config becomes: a model, the layout of its tensors, and its task."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.interop.layout import Layout
from jaxformer.recipe import Batch, Params, Task
from jaxformer.tasks.answers import AnswerTask
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.tasks.language import LanguageTask, Tokenizer
from jaxformer.tasks.masked import MaskedLanguageTask
from jaxformer.tasks.rewrite import RewriteTask
from jaxformer.tasks.spans import SpanTask


@dataclasses.dataclass(frozen=True)
class Port:
    """A model and how its weights lie in the files of others.

    `task` is the class that scores it, `batch` one row (abstract) of what that reads, `length` the
    most tokens it can read, None where there is no such limit.
    """

    model: nn.Module
    layout: Layout
    task: type
    batch: Batch
    length: int | None = None

    def make_task(self, tokenizer: Tokenizer | None = None) -> Task:
        if issubclass(self.task, AnswerTask):
            return self.task(self.model)
        return self.task(self.model, tokenizer)

    def abstract(self) -> Params:
        """The shapes of the parameters."""
        task = self.make_task()
        rows = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), dict(self.batch))
        return jax.eval_shape(lambda: task.init(jax.random.key(0), rows)[0])


def language(model: nn.Module, layout: Layout, length: int) -> Port:
    """A model that continues texts."""
    return Port(model, layout, LanguageTask, {"tokens": _tokens(2)}, length)


def masked(model: nn.Module, layout: Layout, length: int) -> Port:
    """A model that fills in masked words."""
    return Port(model, layout, MaskedLanguageTask, {"tokens": _tokens(2)}, length)


def classify(model: nn.Module, layout: Layout, length: int) -> Port:
    """A model that classifies texts."""
    return Port(model, layout, ClassifyTask, {"inputs": _tokens(2)}, length)


def extract(model: nn.Module, layout: Layout, length: int) -> Port:
    """A model that finds where in a text an answer is."""
    return Port(model, layout, SpanTask, {"inputs": _tokens(2)}, length)


def look(model: nn.Module, layout: Layout, size: int, channels: int) -> Port:
    """A model that classifies square images."""
    image = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    return Port(model, layout, ClassifyTask, {"image": image})


def rewrite(model: nn.Module, layout: Layout) -> Port:
    """A model that reads one text and writes another."""
    return Port(model, layout, RewriteTask, {"inputs": _tokens(2), "tokens": _tokens(3)})


def _tokens(length: int) -> Any:
    return jax.ShapeDtypeStruct((1, length), jnp.int32)
