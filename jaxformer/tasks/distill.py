"""A student that learns from a teacher, whose variables stay as they are."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxformer.errors import ConfigError
from jaxformer.recipe import Batch, Extra, LossOutput, Mean, Metric, Params, Task
from jaxformer.tasks.answers import weights_of
from jaxformer.tasks.linen import Answer
from jaxformer.tasks.losses import soft_cross_entropy

TEACHER = "teacher"  # the entry of `extra` with {"params": ..., and the teacher's own collections}


class Answers(Task, Protocol):
    """A task that shows what its model says, and scores it apart; `ClassifyTask` is one."""

    def answer(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> Answer: ...

    def score(self, answer: Answer, batch: Batch) -> tuple[Mean, dict[str, Metric]]: ...


class Term(Protocol):
    """What the student is told by the teacher: a number for each row (B,), or each position."""

    def __call__(self, student: Answer, teacher: Answer) -> jax.Array: ...


def distribution(student: Answer, teacher: Answer) -> jax.Array:
    """-sum_c p_c log q_c of the teacher's p and the student's q: no temperature, no labels.

    Of Hinton et al. 2015, arXiv 1503.02531.
    """
    return soft_cross_entropy(student.output, teacher.output)


@dataclasses.dataclass(frozen=True)
class Softened:
    """T^2 times the cross-entropy of both distributions at a `temperature` T.

    T^2 keeps the gradient's size. Of Hinton et al. 2015, arXiv 1503.02531, section 2.
    """

    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"Softened.temperature={self.temperature}: must be over 0")

    def __call__(self, student: Answer, teacher: Answer) -> jax.Array:
        t = self.temperature
        return t**2 * soft_cross_entropy(student.output / t, teacher.output / t)


def squared(student: Answer, teacher: Answer) -> jax.Array:
    """(B,) the squared distance of the outputs, for scores, which are no distribution."""
    return jnp.square(student.output - teacher.output).sum(-1)


@dataclasses.dataclass(frozen=True)
class DistillTask:
    """`label` times the student's own objective, and each of `terms`, {name: (weight, term)}.

    The teacher answers as in evaluation, from `extra["teacher"]`, which nothing changes;
    `as_teacher` puts it there. Metrics are the student's and the terms by name. Whatever else the
    student keeps lies in `extra` as it would without a teacher.

    Raises:
        ConfigError: nothing has a weight.
    """

    student: Answers
    teacher: Answers
    terms: tuple[tuple[str, float, Term], ...] = (("distill", 1.0, distribution),)
    label: float = 0.0

    def __post_init__(self) -> None:
        if not self.label and not any(weight for _, weight, _ in self.terms):
            raise ConfigError("DistillTask: neither `label` nor one of `terms` has a weight")

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extra]:
        """The student's, beside a new teacher's; `as_teacher` puts a trained one in its place."""
        params, extra = self.student.init(key, batch)
        teacher = self.teacher.init(jax.random.fold_in(key, 1), batch)
        return params, {**extra, **as_teacher(*teacher)}

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> LossOutput:
        kept, own = self._apart(extra)
        collections = {name: tree for name, tree in kept.items() if name != "params"}
        # In evaluation mode the teacher draws nothing: the key is not used.
        teacher = self.teacher.answer(kept["params"], collections, batch, key=key, train=False)
        teacher = jax.lax.stop_gradient(teacher)
        student = self.student.answer(params, own, batch, key=key, train=train)
        objective, metrics = self.student.score(student, batch)
        loss = self.label * objective.value() if self.label else jnp.zeros((), jnp.float32)
        for name, weight, term in self.terms:
            each = term(student, teacher)
            metrics = {**metrics, name: Mean.of(each, weights_of(batch, each.ndim))}
            loss = loss + weight * metrics[name].value()
        metrics = {**metrics, "loss": Mean(loss * objective.weight, objective.weight)}
        return LossOutput(loss, objective.weight, metrics, {**student.extra, TEACHER: kept})

    def predict(self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array) -> Any:
        """The student's answer."""
        own = self._apart(extra)[1]
        return self.student.answer(params, own, batch, key=key, train=False).output

    def _apart(self, extra: Extra) -> tuple[Extra, Extra]:
        """The teacher's variables, and the others."""
        if TEACHER not in extra:
            raise ConfigError("DistillTask: the state has no teacher; `as_teacher` makes one")
        return extra[TEACHER], {name: x for name, x in extra.items() if name != TEACHER}


def as_teacher(params: Params, extra: Extra) -> Extra:
    """The variables of a trained task as the entry of `extra` that `DistillTask` reads."""
    collections = {name: x for name, x in extra.items() if name not in ("ema", TEACHER)}
    # Copies: the student often starts from the same arrays, and both are donated.
    return {TEACHER: jax.tree.map(jnp.copy, {"params": params, **collections})}
