"""Tasks of language, classes, scores and spans: the objective, its weights, what they answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxformer.models.encoder import Classifier, token_classifier
from jaxformer.models.lm import decoder_lm
from jaxformer.models.transformer import Transformer
from jaxformer.nn.heads import EveryPosition, SpanHead
from jaxformer.nn.make import Make
from jaxformer.recipe import ConfigError, Generates, Predicts
from jaxformer.tasks import linen
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.tasks.language import LanguageTask
from jaxformer.tasks.losses import cross_entropy
from jaxformer.tasks.regress import RegressTask
from jaxformer.tasks.spans import SpanTask

KEY = jax.random.key(0)
TRUNK = Transformer(width=16, depth=1, heads=2)
TOKENS = jax.random.randint(jax.random.key(1), (4, 7), 0, 11)
LM = LanguageTask(decoder_lm(TRUNK, vocabulary=11, length=6))
CLASSIFY = ClassifyTask(
    token_classifier(TRUNK, vocabulary=11, length=7, classes=3), label_smoothing=0.1
)
REGRESS = RegressTask(token_classifier(TRUNK, vocabulary=11, length=7, classes=1))
SPANS = SpanTask(
    Classifier(CLASSIFY.model.encoder, 2, pool=Make(EveryPosition), head=Make(SpanHead))
)
CASES = {
    "language": (LM, {"tokens": TOKENS}),
    "classify": (CLASSIFY, {"inputs": TOKENS, "label": jnp.asarray([0, 2, 1, 1])}),
    "regress": (REGRESS, {"inputs": TOKENS, "label": jnp.asarray([0.5, 2.0, 5.0, 3.2])}),
    "spans": (SPANS, {"inputs": TOKENS, "label": jnp.asarray([[1, 4], [0, 0], [6, 6], [2, 3]])}),
}


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_cross_entropy_and_its_smoothing():
    logits = jax.random.normal(KEY, (5, 4)) * 3
    labels = jnp.asarray([0, 3, 2, 2, 1])
    log_p = log_softmax(logits)
    one_hot = np.eye(4)[labels]
    for smoothing in (0.0, 0.2):
        target = (1 - smoothing) * one_hot + smoothing / 4
        expected = -(target * log_p).sum(-1)
        np.testing.assert_allclose(
            cross_entropy(logits, labels, smoothing), expected, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("name", CASES)
def test_rows_of_weight_zero_change_nothing(name, weights):
    task, batch = CASES[name]
    params, extra = weights(task.init, batch)
    assert extra == {}
    assert isinstance(task, Predicts)
    padding = jax.tree.map(lambda x: jnp.concatenate([x, x[:2] * 0 + 1]), batch)
    padding["weight"] = jnp.asarray([1.0] * 4 + [0.0] * 2)

    @jax.jit
    def run(params, batch):
        def score(params):
            out = task.loss(params, {}, batch, key=KEY, train=True)
            return out.loss, out

        return jax.grad(score, has_aux=True)(params)

    grad, out = run(params, batch)
    padded_grad, padded = run(params, padding)
    for a, b in zip(
        jax.tree.leaves((grad, out)), jax.tree.leaves((padded_grad, padded)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert set(out.metrics) == {"loss", *(["accuracy"] if name != "regress" else [])}
    np.testing.assert_allclose(out.metrics["loss"].value(), out.loss)


def test_language_loss_is_the_weighted_mean_over_next_tokens(weights):
    params, _ = weights(LM.init, {"tokens": TOKENS})
    weight = jax.random.uniform(KEY, (4, 6))
    batch = {"tokens": TOKENS, "weight": weight}
    logits, out = jax.jit(
        lambda: (
            LM.predict(params, {}, batch, key=KEY),
            LM.loss(params, {}, batch, key=KEY, train=False),
        )
    )()
    log_p = np.take_along_axis(log_softmax(logits), np.asarray(TOKENS)[:, 1:, None], -1)[..., 0]
    right = np.asarray(logits).argmax(-1) == TOKENS[:, 1:]
    np.testing.assert_allclose(out.loss, -(log_p * weight).sum() / weight.sum(), rtol=1e-5)
    np.testing.assert_allclose(out.weight, weight.sum(), rtol=1e-6)
    accuracy = (right * weight).sum() / weight.sum()
    np.testing.assert_allclose(out.metrics["accuracy"].value(), accuracy, rtol=1e-5, atol=1e-6)


def test_language_task_needs_a_tokenizer_only_for_text():
    assert isinstance(LM, Generates)
    with pytest.raises(ConfigError, match=r"LanguageTask\.tokenizer=None: needed for text"):
        LM.encode("abc")


def test_classify_task_names_what_it_reads():
    with pytest.raises(ConfigError, match=r"needs 'image' or 'inputs', got \['label', 'pixels'\]"):
        CLASSIFY.init(KEY, {"pixels": TOKENS, "label": TOKENS[:, 0]})
    with pytest.raises(ConfigError, match=r"label_smoothing=1.0: must be in \[0, 1\)"):
        ClassifyTask(CLASSIFY.model, label_smoothing=1.0)


def test_classify_task_hands_on_what_is_valid(weights):
    batch = {"inputs": TOKENS, "label": TOKENS[:, 0] % 3, "valid": jnp.arange(7) < 5 + 0 * TOKENS}
    params, _ = weights(CLASSIFY.init, batch)
    other = {**batch, "inputs": TOKENS.at[:, 5:].set(0)}
    predict = jax.jit(lambda batch: CLASSIFY.predict(params, {}, batch, key=KEY))
    first, second = predict(batch), predict(other)
    np.testing.assert_array_equal(first, second)


def test_a_score_is_the_output_itself(weights):
    batch = CASES["regress"][1]
    params, _ = weights(REGRESS.init, batch)
    y = np.asarray(REGRESS.predict(params, {}, batch, key=KEY))
    assert y.shape == (4, 1)
    out = REGRESS.loss(params, {}, {**batch, "weight": jnp.ones(4)}, key=KEY, train=False)
    np.testing.assert_allclose(out.loss, np.square(y[:, 0] - batch["label"]).mean(), rtol=1e-5)
    with pytest.raises(ConfigError, match=r"RegressTask\.model: gives \(3,\) for a row"):
        RegressTask(CLASSIFY.model).loss(
            *weights(CLASSIFY.init, batch), batch, key=KEY, train=False
        )


def test_a_span_is_two_positions_that_are_there(weights):
    valid = jnp.arange(7) < jnp.asarray([5, 7, 7, 4])[:, None]
    batch = {**CASES["spans"][1], "valid": valid}
    params, _ = weights(SPANS.init, batch)
    logits = np.array(SPANS.predict(params, {}, batch, key=KEY))
    assert logits.shape == (4, 2, 7)
    out = SPANS.loss(params, {}, batch, key=KEY, train=False)
    each = []
    for row, label in enumerate(batch["label"]):
        shown = logits[row][:, np.asarray(valid[row])]  # padding takes part in no softmax
        each.append(-log_softmax(shown)[np.arange(2), label].mean())
    np.testing.assert_allclose(out.loss, np.mean(each), rtol=1e-5)
    answers = np.where(valid[:, None], logits, -np.inf).argmax(-1)
    answers[0, 1] = answers[0, 1] + 1 - 2 * (answers[0, 1] == 4)  # one of two is wrong
    out = SPANS.loss(params, {}, {**batch, "label": answers}, key=KEY, train=False)
    assert out.metrics["accuracy"].value() == 0.75


class Counting(nn.Module):
    """Counts its calls in a collection of its own."""

    @nn.compact
    def __call__(self, x, train=False):
        count = self.variable("counts", "calls", jnp.zeros, ())
        if train:
            count.value = count.value + 1
        return x * self.param("scale", jax.nn.initializers.ones, ())


def test_extra_variables_pass_through_and_change_only_in_training():
    model = Counting()
    params, extra = linen.init(model, KEY, jnp.ones(2))
    assert extra == {"counts": {"calls": 0.0}}
    extra = {**extra, "ema": {"scale": jnp.ones(())}, "skipped": jnp.zeros((), jnp.int32)}

    def run(train):
        return linen.apply(model, params, extra, jnp.ones(2), key=KEY, train=train)[1]

    assert run(False) is extra
    assert run(True) == {**extra, "counts": {"calls": 1.0}}
