"""The few-shot harness: prompts, descent on demonstrations, and what is compared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import paths
from jaxformer.data.sources.tokenizers import Bytes
from jaxformer.evaluation import few_shot
from jaxformer.evaluation.few_shot import FewShot, Shot
from jaxformer.models.lm import decoder_lm
from jaxformer.models.transformer import Transformer
from jaxformer.recipe import ConfigError
from jaxformer.tasks.language import LanguageTask
from jaxformer.train import optim
from jaxformer.train.updates import GradientUpdate

V, CONTEXT = 16, 24
SHOTS = [Shot([1, 2], 8), Shot([3], 9), Shot([4, 5], 8), Shot([6, 7], 10)]
QUERIES = [Shot([1], 8), Shot([3, 4, 5], 9)]
FEW = FewShot(SHOTS, QUERIES, [15], CONTEXT)
KEY = jax.random.key(0)


def draw(key, queries=5):
    return jax.nn.softmax(3 * jax.random.normal(jax.random.key(key), (queries, V)))


# Prompts.


def test_prompts_hold_the_demonstrations_in_order_and_then_the_query():
    tokens, last = FEW.prompts([1, 0, 2, 3])
    start = [3, 9, 15, 1, 2, 8, 15, 4, 5, 8, 15, 6, 7, 10, 15]
    np.testing.assert_array_equal(tokens[0], [*start, 1, 0, 0])
    np.testing.assert_array_equal(tokens[1], [*start, 3, 4, 5])
    np.testing.assert_array_equal(last, [15, 17])
    zero, last = FEW.prompts([])
    np.testing.assert_array_equal(zero, [[1, 0, 0], [3, 4, 5]])
    np.testing.assert_array_equal(last, [0, 2])
    np.testing.assert_array_equal(FEW.labels, [8, 9])


def test_all_that_is_read_has_the_same_beginning():
    few = FewShot(SHOTS, QUERIES, [15], CONTEXT, begin=(14,))
    np.testing.assert_array_equal(
        few.prompts([1])[0], [[14, 3, 9, 15, 1, 0, 0], [14, 3, 9, 15, 3, 4, 5]]
    )
    batch = few.examples()
    np.testing.assert_array_equal(batch["tokens"][1], [14, 3, 9, 0])
    np.testing.assert_array_equal(batch["weight"][1], [0, 1, 0])


def test_training_examples_weigh_their_label_alone():
    batch = FEW.examples()
    np.testing.assert_array_equal(batch["tokens"], [[1, 2, 8], [3, 9, 0], [4, 5, 8], [6, 7, 10]])
    np.testing.assert_array_equal(batch["weight"], [[0, 1], [1, 0], [0, 1], [0, 1]])


def test_orders_are_different_and_as_many_as_asked():
    found = few_shot.orders(24, 4, seed=1)
    assert len({tuple(order) for order in found}) == 24
    assert all(sorted(order) == [0, 1, 2, 3] for order in found)


# A model.


@pytest.fixture(scope="module")
def model():
    trunk = Transformer(width=16, depth=2, heads=2)
    task = LanguageTask(decoder_lm(trunk, vocabulary=V, length=CONTEXT))
    params, extra = jax.jit(task.init)(KEY, {"tokens": jnp.zeros((1, CONTEXT + 1), jnp.int32)})
    return task, params, extra


@pytest.fixture(scope="module")
def trained(model):
    """(rows, groups) -> answers and parameters of 3 epochs in 4 orders, (orders, epochs, ...)."""
    task, params, extra = model
    zero = FEW.prompts([])

    def run(rows, groups=()):
        optimizer = optim.optimizer(optim.sgd(), optim.schedule(0.3, 9), groups=groups)
        update = GradientUpdate(task, optimizer)

        def observe(params, extra):
            return few_shot.answers(task, params, extra, zero), params

        def one(order):
            return few_shot.descend(
                update, params, extra, FEW.examples(), order, observe, epochs=3, rows=rows
            )

        return jax.jit(jax.vmap(one))(jnp.asarray(few_shot.orders(4, 4)))

    return functools.lru_cache(run)


def test_answers_are_those_after_the_last_token(model):
    task, params, extra = model
    p = few_shot.answers(task, params, extra, FEW.prompts([]))
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)
    alone = task.predict(params, extra, {"tokens": jnp.asarray([[1, 0]])}, key=KEY)[:, -1]
    np.testing.assert_allclose(p[0], jax.nn.softmax(alone)[0], rtol=1e-4)


def test_no_step_is_zero_shot_and_steps_teach_the_labels(model, trained):
    task, params, extra = model
    p, _ = trained(4)
    assert p.shape == (4, 4, 2, V)
    zero = few_shot.answers(task, params, extra, FEW.prompts([]))
    np.testing.assert_allclose(p[:, 0], jnp.broadcast_to(zero, p[:, 0].shape), rtol=1e-5)
    labels = jnp.asarray(FEW.labels)
    likelihood = p[:, :, jnp.arange(2), labels].mean(-1)
    assert np.all(likelihood[:, -1] > 1.5 * likelihood[:, 0])


def test_full_batches_do_not_see_the_order_and_single_rows_do(trained):
    full, single = (few_shot.sensitivity(trained(rows)[0][:, -1]) for rows in (4, 1))
    assert full < 1e-6 and single > 1e-4
    assert few_shot.sensitivity(trained(1)[0][:1, -1]) == 0  # one order


def test_a_subset_leaves_all_else_as_it_is(model, trained):
    _, params, _ = model
    pattern = r"block_1/.*value/kernel"
    _, ends = trained(1, few_shot.only(pattern))
    start = paths.leaves(params)
    changed = {
        name
        for name, leaf in paths.leaves(ends).items()
        if not np.array_equal(leaf[0, -1], start[name])
    }
    assert len(changed) == 1 and "block_1" in changed.pop()


def test_targets_other_than_labels_change_nothing(model):
    task, params, extra = model
    batch = {name: jnp.asarray(value) for name, value in FEW.examples().items()}

    @jax.jit
    def gradient(tokens):
        # Targets alone are changed: those after the last token that the model reads up to a label.
        def loss(params):
            output = task.loss(params, extra, {**batch, "tokens": tokens}, key=KEY, train=True)
            return output.loss

        return jax.grad(loss)(params)

    beyond = batch["tokens"].at[1, 2].set(11)  # behind the label of the short one
    same, other = gradient(batch["tokens"]), gradient(beyond)
    jax.tree.map(np.testing.assert_array_equal, same, other)
    label = gradient(batch["tokens"].at[1, 1].set(11))
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(label), strict=True)
    )


# What is compared.


@pytest.mark.parametrize("penalty", ["none", "product", "topk"])
def test_overlaps_of_one_distribution_and_of_strangers(penalty):
    p = draw(0)
    cosine = functools.partial(few_shot.overlap_cosine, k=4, penalty=penalty)
    assert few_shot.token_overlap(p, p, 4) == 1
    np.testing.assert_allclose(cosine(p, p), 1, rtol=1e-6)
    left, right = jnp.eye(V)[:1] + 0.01 * jnp.arange(V), jnp.arange(V, 0, -1.0)[None]
    left = left.at[:, 0].set(0)
    assert few_shot.token_overlap(left, right, 4) == 0 and cosine(left, right) == 0


@pytest.mark.parametrize("penalty", ["none", "product"])
def test_overlaps_are_symmetric_and_the_cosine_has_no_scale(penalty):
    p, q = draw(0), draw(1)
    assert few_shot.token_overlap(p, q) == few_shot.token_overlap(q, p)
    assert 0 <= few_shot.token_overlap(p, q) <= 1
    one = few_shot.overlap_cosine(p, q, 10, penalty)
    np.testing.assert_allclose(one, few_shot.overlap_cosine(q, p, 10, penalty), rtol=1e-6)
    np.testing.assert_allclose(one, few_shot.overlap_cosine(7 * p, q, 10, penalty), rtol=1e-6)
    assert 0 < one < 1


def test_the_overlap_cosine_by_hand():
    p = jnp.asarray([[0.5, 0.3, 0.2, 0.0]])
    q = jnp.asarray([[0.1, 0.6, 0.0, 0.3]])
    # The two likeliest are 0, 1 and 1, 3: one in common.
    assert few_shot.token_overlap(p, q, 2) == 0.5
    assert few_shot.overlap_cosine(p, q, 2, "none") == 1
    own = np.hypot(0.5, 0.3) * np.hypot(0.6, 0.3)
    np.testing.assert_allclose(few_shot.overlap_cosine(p, q, 2, "topk"), 0.18 / own, rtol=1e-6)
    # The three likeliest share 0 and 1, and one each is missing: the factor is 1; of 2 it is 2.
    three = 0.5 * 0.1 + 0.3 * 0.6
    sizes = (0.5**2 + 0.3**2) * (0.1**2 + 0.6**2)
    found = few_shot.overlap_cosine(p, q, 3, "product")
    np.testing.assert_allclose(found, three / np.sqrt(sizes), rtol=1e-6)
    apart = jnp.asarray([[0.5, 0.4, 0.1, 0.0, 0.0]]), jnp.asarray([[0.5, 0.0, 0.0, 0.4, 0.1]])
    np.testing.assert_allclose(few_shot.overlap_cosine(*apart, 3), 1 / np.sqrt(2), rtol=1e-6)


def test_sensitivity_and_accuracy_by_hand():
    p = jnp.asarray([[[0.2, 0.8], [0.5, 0.5]], [[0.6, 0.4], [0.5, 0.5]]])
    np.testing.assert_allclose(few_shot.sensitivity(p), (0.2 + 0.2) / 2, rtol=1e-6)
    q = jnp.asarray([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]])
    labels = jnp.asarray([1, 2])
    assert few_shot.accuracy(q, labels) == 0.5
    assert few_shot.accuracy(q, labels, jnp.asarray([1, 2])) == 1


def test_sparsity_is_the_share_of_small_entries():
    params = {"a": {"query": jnp.asarray([0.0, 1.0])}, "b": {"query": jnp.asarray([1e-4, 1e-5])}}
    found = few_shot.sparsity(params, "query", (1e-3, 1e-6))
    assert found == {1e-3: 0.75, 1e-6: 0.25}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FewShot([], QUERIES, [15], 9), "demonstrations: none"),
        (lambda: FewShot(SHOTS, [], [15], 9), "queries: none"),
        (lambda: FewShot(SHOTS, QUERIES, [15], 9), "context: 18 tokens of a prompt, .* reads 9"),
        (lambda: few_shot.label_token(Bytes(), " yes"), "label: ' yes' is . tokens"),
        (lambda: few_shot.orders(7, 3), "3 demonstrations have 6 orders, 7 are asked for"),
        (lambda: few_shot.token_overlap(draw(0), draw(1), V + 1), f"k: {V + 1} of a vocabulary"),
        (lambda: few_shot.overlap_cosine(draw(0), draw(1), 4, "sum"), "penalty='sum'"),
        (lambda: few_shot.sparsity({"a": jnp.ones(2)}, "query"), "pattern: 'query' fits no"),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def test_the_first_token_of_a_label_must_be_asked_for():
    word = " yes"
    assert few_shot.label_token(Bytes(), word, first=True) == Bytes().encode(word)[0]
