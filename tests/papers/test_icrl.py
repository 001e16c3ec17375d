"""Identities of icrl: the layout of tokens, what logits may see, and the rollout of a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.catalogue import load
from jaxformer.errors import ConfigError
from jaxformer.papers.icrl import model
from jaxformer.train.states import new_state

T, A, D = 10, 5, 3


@pytest.fixture(scope="module", params=["relu", "softmax"])
def trained(request):
    """A recipe, its first state and a batch."""
    recipe = load("icrl:tiny", model__backbone=request.param)
    data = recipe.phases[0].data
    return recipe, new_state(recipe, jax.random.key(0)), jax.jit(data.draw)(data.batch(0))


def test_tokens_are_laid_out_in_pairs(trained):
    _, _, batch = trained
    x = np.asarray(model.tokens(*model.history(batch)))
    assert x.shape == (16, 2 * T, A * D + A + 3)
    np.testing.assert_array_equal(x[:, :, -1], np.broadcast_to(np.arange(1, 2 * T + 1), (16, 20)))
    assert np.all(x[:, :, -2] == 1)
    shown, done, reward = x[..., : A * D], x[..., A * D : -3], x[..., -3]
    arms = np.asarray(batch["arms"]).reshape(16, 1, -1)
    np.testing.assert_array_equal(shown[:, ::2], np.broadcast_to(arms, (16, T, A * D)))
    assert not shown[:, 1::2].any() and not done[:, ::2].any() and not reward[:, ::2].any()
    np.testing.assert_array_equal(done[:, 1::2].argmax(-1), batch["actions"])
    np.testing.assert_array_equal(reward[:, 1::2], batch["rewards"])


def test_an_action_is_chosen_from_what_was_before(trained):
    recipe, state, batch = trained
    predict = jax.jit(functools.partial(recipe.task.predict, key=jax.random.key(0)))
    logits = predict(state.params, state.extra, batch)
    for t in (0, 4, T - 1):
        changed = {
            **batch,
            "actions": batch["actions"].at[:, t:].set(0),
            "rewards": batch["rewards"].at[:, t:].set(9.0),
        }
        found = predict(state.params, state.extra, changed)
        np.testing.assert_allclose(found[:, : t + 1], logits[:, : t + 1], atol=1e-5)
        if t < T - 1:
            assert np.abs(found - logits)[:, t + 1].max() > 1e-4


def test_a_padded_history_gives_what_a_growing_one_gives(trained):
    recipe, state, batch = trained
    task = recipe.task
    arms, actions, rewards = (x[0] for x in model.history(batch))
    policy = jax.jit(task.policy(state.params, state.extra))
    for step in (0, 3, 7):
        past = jnp.arange(T) < step
        padded = policy(arms, jnp.where(past, actions, 0), jnp.where(past, rewards, 0.0), step)
        # One step more than was taken: its first token shows the arms again.
        grown = {
            "arms": arms[None],
            "actions": actions[None, : step + 1],
            "rewards": rewards[None, : step + 1],
        }
        wanted = task.predict(state.params, state.extra, grown, key=jax.random.key(0))[0, -1]
        np.testing.assert_allclose(padded, wanted, atol=1e-5)


def test_labels():
    batch = {
        "arms": jnp.zeros((1, 3, 2)),
        "actions": jnp.array([[0, 0, 1, 2]]),
        "rewards": jnp.array([[1.0, -1.0, 0.5, 0.2]]),
        "best": jnp.array([2]),
    }
    assert model.logged(batch).tolist() == [[0, 0, 1, 2]]
    assert model.optimal(batch).tolist() == [[2] * 4]
    assert model.estimated(batch).tolist() == [[1] * 4]
    untried = {**batch, "actions": jnp.array([[0, 0, 0, 0]]), "rewards": -jnp.ones((1, 4))}
    assert model.estimated(untried).tolist() == [[0] * 4]


def test_loss_is_of_the_labels(trained):
    recipe, state, batch = trained
    logits = recipe.task.predict(state.params, state.extra, batch, key=jax.random.key(0))
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["actions"][..., None], -1)
    found = recipe.task.loss(state.params, state.extra, batch, key=jax.random.key(0), train=False)
    np.testing.assert_allclose(found.loss, -chosen.mean(), rtol=1e-5)


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"environment__kind": "bernoulli"}, "environment.dimension=3"),
        ({"data__steps": 13}, "model.positions=24"),
        ({"data__labels": "expert"}, "data.labels='expert'"),
        ({"data__controllers": ("oracle",)}, "data.controllers='oracle'"),
        ({"data__shares": (0.5,)}, "shares"),
        ({"model__backbone": "conv"}, "model.backbone='conv'"),
        ({"environment__kind": "contextual"}, "environment.kind='contextual'"),
    ],
)
def test_bad_configs_are_named(fields, says):
    with pytest.raises(ConfigError, match=says):
        load("icrl:tiny", **fields)


def test_rewards_that_are_not_numbers_are_refused():
    rewards = jnp.array([[0.0, jnp.nan]])
    with pytest.raises(ConfigError, match="NaN"):
        model.tokens(jnp.zeros((1, 2, 3)), jnp.zeros((1, 2), jnp.int32), rewards)
    with pytest.raises(ConfigError, match=r"LearnedPosition.length=4"):
        trunk, mixer = model.relu_trunk(8, 1)
        network = model.bandit_transformer(trunk, mixer, 4)
        zeros = jnp.zeros((1, 3))
        network.init(jax.random.key(0), jnp.zeros((1, 2, 3)), zeros.astype(jnp.int32), zeros)
