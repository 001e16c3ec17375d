"""A student and its teacher, which need not be alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.nn.einsum import Einsum
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.tasks.distill import TEACHER, DistillTask, as_teacher, distribution

KEY = jax.random.key(0)
BATCH = {
    "inputs": jax.random.normal(KEY, (6, 5)),
    "label": jnp.arange(6) % 3,
    "weight": jnp.array([1.0, 1, 1, 1, 0, 2]),
}


class Plain(nn.Module):
    """A hidden layer, which is sown, and three classes."""

    width: int

    @nn.compact
    def __call__(self, x, *, train=False):
        h = Einsum("...F,FD->...D", (self.width,), name="hidden")(x)
        self.sow("intermediates", "norm", jnp.square(h).mean(-1))
        return Einsum("...D,DC->...C", (3,), name="head")(h)


def hidden(student, teacher):
    """The distance of what both have sown."""
    return jnp.abs(student.sown["norm"][0] - teacher.sown["norm"][0])


STUDENT, TEACHES = ClassifyTask(Plain(4)), ClassifyTask(Plain(7))


def loss_of(task):
    params, extra = task.init(KEY, BATCH)
    return task.loss(params, extra, BATCH, key=KEY, train=True), params, extra


def test_terms_and_labels_add_up_over_weighted_rows():
    terms = (("distill", 0.5, distribution), ("hidden", 2.0, hidden))
    out, params, extra = loss_of(DistillTask(STUDENT, TEACHES, terms, label=0.25))
    own = STUDENT.loss(params, {}, BATCH, key=KEY, train=True)
    metrics = {name: metric.value() for name, metric in out.metrics.items()}
    expected = 0.25 * own.loss + 0.5 * metrics["distill"] + 2 * metrics["hidden"]
    np.testing.assert_allclose(out.loss, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], out.loss, rtol=1e-6)
    assert out.weight == own.weight == 6 and metrics["accuracy"] == own.metrics["accuracy"].value()

    def logits(task, params):
        return task.predict(params, {}, BATCH, key=KEY)

    told = jax.nn.softmax(logits(TEACHES, extra[TEACHER]["params"]))
    each = -(told * jax.nn.log_softmax(logits(STUDENT, params))).sum(-1)
    np.testing.assert_allclose(metrics["distill"], (each * BATCH["weight"]).sum() / 6, rtol=1e-5)


def test_nothing_of_the_teacher_trains():
    task = DistillTask(STUDENT, TEACHES)
    params, extra = task.init(KEY, BATCH)

    def loss(params, extra):
        return task.loss(params, extra, BATCH, key=KEY, train=True).loss

    own, teacher = jax.grad(loss, (0, 1))(params, extra)
    assert all(np.any(x) for x in jax.tree.leaves(own))
    assert not any(np.any(x) for x in jax.tree.leaves(teacher))


def test_a_teacher_is_a_copy_without_what_an_update_keeps():
    params, extra = {"w": jnp.ones(2)}, {"ema": jnp.ones(2), "batch_stats": {"m": jnp.ones(1)}}
    found = as_teacher(params, {**extra, **as_teacher(params, {})})[TEACHER]
    assert set(found) == {"params", "batch_stats"}
    assert found["params"]["w"] is not params["w"]


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="neither `label` nor one of `terms`"):
        DistillTask(STUDENT, TEACHES, ())
    task = DistillTask(STUDENT, TEACHES)
    with pytest.raises(ConfigError, match="the state has no teacher"):
        task.loss(STUDENT.init(KEY, BATCH)[0], {}, BATCH, key=KEY, train=True)
