"""Environments, controllers and rollouts: against NumPy, against formulas, and at their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.data.base import DeviceData
from jaxformer.decision import controllers as c
from jaxformer.decision.environments import (
    BernoulliBandit,
    LinearBandit,
    Place,
    TabularMDP,
    backward_induction,
)
from jaxformer.decision.rollouts import InContext, Trajectories, log_ratio, regret, rollout
from jaxformer.errors import ConfigError
from jaxformer.evaluation.regret import regret_curve

KEY = jax.random.key(0)
LINEAR = LinearBandit(actions=6, dimension=4, std=0.5)


def remembered(controller, arms, actions, rewards):
    """What a controller knows after a history."""

    def step(memory, seen):
        return controller.learn(memory, arms, *seen, arms), None

    return jax.lax.scan(step, controller.start(arms), (actions, rewards))[0]


@pytest.fixture(scope="module")
def history():
    """A linear problem and 200 random steps on it."""
    problem = LINEAR.draw(KEY)
    actions = jax.random.randint(jax.random.key(1), (200,), 0, 6)
    rewards = problem.means[actions] + 0.5 * jax.random.normal(jax.random.key(2), (200,))
    return problem.features, actions, rewards


# Controllers.


def test_linucb_is_ridge_regression_with_a_width(history):
    """Sherman-Morrison keeps the inverse over 200 steps; theta, values and the greedy choice."""
    arms, actions, rewards = history
    memory = jax.jit(lambda *h: remembered(c.LinUCB(), *h))(*history)
    a, x, r = np.float64(arms), np.float64(arms)[actions], np.float64(rewards)
    V = np.eye(4) + x.T @ x
    np.testing.assert_allclose(memory.inverse, np.linalg.inv(V), atol=1e-4)
    theta = np.linalg.solve(V, x.T @ r)
    np.testing.assert_allclose(memory.weights, theta, atol=1e-5)
    width = np.sqrt(np.einsum("ai,ij,aj->a", a, np.linalg.inv(V), a))
    np.testing.assert_allclose(c.LinUCB(2.0).values(memory, arms), a @ theta + 2 * width, atol=1e-4)
    assert c.LinUCB(0.0).act(memory, arms, KEY) == (a @ theta).argmax()


def test_linucb_begins_uniformly(history):
    arms, _, _ = history
    start = c.LinUCB().start(arms)
    first = jax.vmap(lambda key: c.LinUCB().act(start, arms, key))(jax.random.split(KEY, 6000))
    assert np.abs(np.bincount(first, minlength=6) / 1000 - 1).max() < 0.15


def test_thompson_draws_from_its_posterior(history):
    """Mean and covariance of 10^5 draws of w, which the chosen arm is the best for."""
    arms, actions, rewards = history
    thompson = c.LinearThompson(std=0.5)
    memory = remembered(thompson, arms, actions[:5], rewards[:5])
    mean, covariance = thompson.posterior(memory)
    x = np.float64(arms)[actions[:5]]
    A = 0.25 * np.eye(4) + x.T @ x
    np.testing.assert_allclose(mean, np.linalg.solve(A, x.T @ np.float64(rewards[:5])), atol=1e-4)
    np.testing.assert_allclose(covariance, 0.25 * np.linalg.inv(A), atol=1e-4)

    keys = jax.random.split(KEY, 100_000)
    draw = lambda key: jax.random.multivariate_normal(key, mean, covariance, method="cholesky")
    w = np.asarray(jax.vmap(draw)(keys))
    scale = np.sqrt(np.diag(covariance))
    assert np.abs((w.mean(0) - mean) / scale).max() < 0.02
    assert np.abs((np.cov(w.T) - covariance) / np.outer(scale, scale)).max() < 0.02
    chosen = jax.vmap(lambda key: thompson.act(memory, arms, key))(keys[:100])
    np.testing.assert_array_equal(chosen, (w[:100] @ np.asarray(arms).T).argmax(1))


def test_beta_thompson_and_counts():
    arms = jnp.eye(3)
    actions, rewards = jnp.array([0, 0, 2, 0]), jnp.array([1.0, 0.0, 1.0, 1.0])
    memory = remembered(c.BernoulliThompson(), arms, actions, rewards)
    alpha, beta = c.BernoulliThompson().posterior(memory)
    assert alpha.tolist() == [3, 1, 2] and beta.tolist() == [2, 1, 1]
    assert c.EmpiricalMean().act(memory, arms, KEY) == 1  # not tried yet
    assert c.EmpiricalMean(explore=False).act(memory, arms, KEY) == 2
    lost = remembered(c.EmpiricalMean(False), arms, jnp.array([0]), jnp.array([-1.0]))
    assert c.EmpiricalMean(explore=False).act(lost, arms, KEY) == 1  # untried counts as 0
    np.testing.assert_allclose(
        c.BernoulliUCB().values(memory), [2 / 4 + 1 / 2, 1, 1 / 2 + 2**-0.5], rtol=1e-6
    )


@pytest.mark.parametrize(
    "bandit, better",
    [
        (LINEAR, (c.LinUCB(), c.LinearThompson(0.5))),
        (BernoulliBandit(5), (c.BernoulliThompson(), c.BernoulliUCB(), c.EmpiricalMean())),
    ],
    ids=["linear", "bernoulli"],
)
def test_controllers_learn_and_uniform_does_not(bandit, better):
    def curve(controller):
        return np.asarray(regret_curve(bandit, controller, problems=100, steps=60, key=KEY))

    plain = curve(c.UNIFORM)
    np.testing.assert_allclose(np.diff(plain, prepend=0).mean(), plain[-1] / 60, rtol=1e-5)
    # Of U[0, 1] means the best of 5 is 5/6 and the mean 1/2.
    assert bandit is LINEAR or abs(plain[-1] / 60 - 1 / 3) < 0.05
    for controller in better:
        found = curve(controller)
        assert found[-1] < 0.6 * plain[-1]
        assert found[-1] - found[-20] < found[20] - found[0]


# Finite MDPs.


def test_backward_induction_is_value_iteration():
    mdp = TabularMDP(states=4, actions=3, horizon=5)
    problem = mdp.draw(KEY)
    q, value = np.asarray(mdp.values(problem)), np.zeros(4)
    for h in reversed(range(5)):
        wanted = np.asarray(problem.rewards) + np.asarray(problem.transitions) @ value
        np.testing.assert_allclose(q[h], wanted, atol=1e-5)
        value = wanted.max(1)
    rich = backward_induction(problem.transitions, problem.rewards + 9, 5)
    assert float(rich.max()) == 5.0  # cut at the steps that are left


def test_an_episode_begins_anew():
    mdp = TabularMDP(states=4, actions=2, horizon=5)
    found = rollout(mdp, mdp.draw(KEY), c.UCBVI(4, 2, 5), 20, KEY)
    assert found.states.h.tolist() == [0, 1, 2, 3, 4] * 4
    assert found.states.s[::5].tolist() == [0] * 4
    assert len(set(found.states.s.tolist())) > 1


def test_ucb_vi_finds_the_best_policy():
    """Its regret per episode falls to little; without data it believes in all that is left."""
    mdp = TabularMDP(states=4, actions=3, horizon=5)
    steps = 5 * 300
    found = np.asarray(
        regret_curve(mdp, c.UCBVI(4, 3, 5), problems=16, steps=steps, key=jax.random.key(3))
    )
    early, late = found[249], found[-1] - found[-250]
    assert late < 0.25 * early
    place = Place(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    np.testing.assert_array_equal(c.UCBVI(4, 3, 5).start(place).q[:, 0, 0], [5, 4, 3, 2, 1])


# Rollouts.


def test_regret_is_the_sum_of_gaps():
    problem = LINEAR.draw(KEY)
    found = rollout(LINEAR, problem, c.UNIFORM, 30, KEY)
    gaps = np.asarray(problem.means).max() - np.asarray(problem.means)[found.actions]
    np.testing.assert_allclose(regret(LINEAR, problem, found), np.cumsum(gaps), rtol=1e-5)
    residual = np.asarray(found.rewards) - np.asarray(problem.means)[found.actions]
    assert 0.3 < residual.std() < 0.7


def test_distribution_ratio():
    """R(p, p) = 1, and of fixed policies the mean over drawn trajectories is the exact product."""
    bandit, T = BernoulliBandit(2), 3
    p, q = c.Fixed((0.7, 0.3)), c.UNIFORM
    problem = bandit.draw(KEY)

    def ratios(first, second):
        def one(key):
            found = rollout(bandit, problem, first, T, key)
            each = (x.log_probabilities(problem.features) for x in (first, second))
            return jnp.exp(log_ratio(*each, found))

        return np.asarray(jax.vmap(one)(jax.random.split(KEY, 40_000)))

    np.testing.assert_allclose(ratios(p, p), 1, rtol=1e-5)
    exact = (0.7**2 / 0.5 + 0.3**2 / 0.5) ** T
    assert abs(ratios(p, q).mean() / exact - 1) < 0.02


def test_a_policy_in_context_sees_what_came_before():
    """One that reads the history as counts is the empirical mean, whatever lies behind it."""
    bandit, steps = BernoulliBandit(4), 25

    def policy(arms, actions, rewards, step):
        past = (jnp.arange(len(actions)) < step)[:, None] * jax.nn.one_hot(actions, len(arms))
        tries, total = past.sum(0), (past * rewards[:, None]).sum(0)
        wanted = c.EmpiricalMean().act(c.Counts(tries, total), arms, KEY)
        return 50.0 * jax.nn.one_hot(wanted, len(arms))

    for greedy in (True, False):
        curves = [
            regret_curve(bandit, controller, problems=20, steps=steps, key=KEY)
            for controller in (InContext(policy, steps, greedy), c.EmpiricalMean())
        ]
        np.testing.assert_allclose(*curves, rtol=1e-5)


def test_trajectories_are_rows_and_shares_hold():
    rows = Trajectories(LINEAR, (c.Fixed((1.0, *[0.0] * 5)), c.EmpiricalMean()), 8, (0.25, 0.75))
    data = DeviceData(rows, 400)
    batch = jax.jit(data.draw)(data.batch(0))
    assert batch["arms"].shape == (400, 6, 4) and batch["rewards"].shape == (400, 8)
    only_first = (batch["actions"] == 0).all(1)
    assert 0.18 < only_first.mean() < 0.32
    some = jax.jit(data.draw)(data.batch(0, slice(5, 9)))
    np.testing.assert_array_equal(some["actions"], batch["actions"][5:9])


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: LinearBandit(0, 3, 1.0), "LinearBandit.actions=0"),
        (lambda: LinearBandit(2, 3, -1.0), "LinearBandit.std=-1.0"),
        (lambda: LinearBandit(2, 3, 1.0, "beta"), "LinearBandit.prior='beta'"),
        (lambda: BernoulliBandit(0), "BernoulliBandit.actions=0"),
        (lambda: TabularMDP(2, 2, 0), "TabularMDP.horizon=0"),
        (lambda: Trajectories(LINEAR, (c.UNIFORM,), 0), "Trajectories.steps=0"),
        (lambda: Trajectories(LINEAR, (c.UNIFORM,), 5, (0.5, 0.5)), "Trajectories.shares"),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(ConfigError, match=says):
        make()
