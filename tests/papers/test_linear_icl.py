"""Identities of linear_icl: closed forms against the full layer, the flow and Monte Carlo."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.data.base import DeviceData
from jaxformer.data.sources import regression
from jaxformer.papers.linear_icl import model
from jaxformer.recipe import ConfigError

D, N = 4, 12
LAMBDA = np.diag([1.0, 0.7, 0.4, 0.2]) + 0.1 * np.outer([1, -1, 1, 0], [1, -1, 1, 0])
PROMPTS = regression.Prompts(N, regression.fixed_covariance(LAMBDA))


@pytest.fixture(scope="module")
def batch():
    data = DeviceData(PROMPTS, 16)
    return data.draw(data.batch(0))


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def relative(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


# The layer.


def test_full_layer_at_the_limit_is_the_closed_form(batch):
    params = model.limit(jnp.asarray(LAMBDA), N)
    output = model.layer(params, model.embedding(batch["x"], batch["y"], batch["x_q"]))
    moment = jnp.einsum("bn,bni->bi", batch["y"], batch["x"]) / N
    inverse = jnp.linalg.inv(model.gamma(jnp.asarray(LAMBDA), N))
    expected = jnp.einsum("bi,ij,bj->b", batch["x_q"], inverse, moment)
    np.testing.assert_allclose(output[:, -1, -1], expected, atol=1e-5)
    predicted = model.predict(params, batch["x"], batch["y"], batch["x_q"])
    np.testing.assert_allclose(predicted, expected, atol=1e-5)


def test_prediction_is_the_last_entry_for_any_parameters(batch):
    keys = jax.random.split(jax.random.key(1))
    w_kq, w_pv = (jax.random.normal(key, (D + 1, D + 1)) for key in keys)
    params = {"W_KQ": w_kq, "W_PV": w_pv}
    output = model.layer(params, model.embedding(batch["x"], batch["y"], batch["x_q"]))
    predicted = model.predict(params, batch["x"], batch["y"], batch["x_q"])
    np.testing.assert_allclose(output[:, -1, -1], predicted, rtol=1e-4, atol=1e-4)


def test_order_does_not_matter_and_labels_enter_linearly(batch):
    x, y, x_q = batch["x"], batch["y"], batch["x_q"]
    # Only with w21^PV = 0, as on the whole path, is the prediction linear in the labels.
    params = model.limit(jnp.asarray(LAMBDA), N)
    yhat = model.predict(params, x, y, x_q)
    order = jax.random.permutation(jax.random.key(2), N)
    np.testing.assert_allclose(
        model.predict(params, x[:, order], y[:, order], x_q), yhat, atol=1e-5
    )
    other = jax.random.normal(jax.random.key(3), y.shape)
    combined = model.predict(params, x, 2 * y - 3 * other, x_q)
    parts = 2 * yhat - 3 * model.predict(params, x, other, x_q)
    np.testing.assert_allclose(combined, parts, atol=1e-5)


# The flow.


def test_reduced_flow_is_minus_the_gradient_of_the_reduced_loss(float64):
    U, u = jax.random.normal(jax.random.key(0), (D, D)), jnp.asarray(0.7)
    gradients = jax.grad(model.reduced_loss, (0, 1))(U, u, jnp.asarray(LAMBDA), N)
    for flow, gradient in zip(
        model.reduced_flow(U, u, jnp.asarray(LAMBDA), N), gradients, strict=True
    ):
        np.testing.assert_allclose(flow, -gradient, rtol=1e-10, atol=1e-12)


def test_reduced_loss_is_least_where_the_theorem_says(float64):
    Lambda = jnp.asarray(LAMBDA)
    least = model.minimum_loss(Lambda, N)
    params = model.limit(Lambda, N)
    U, u = params["W_KQ"][:D, :D], params["W_PV"][D, D]
    loss = jax.jit(lambda U, u: model.reduced_loss(U, u, Lambda, N))
    np.testing.assert_allclose(loss(U, u), least, rtol=1e-6)
    np.testing.assert_allclose(u**2, jnp.linalg.norm(U) ** 2, rtol=1e-12)
    np.testing.assert_allclose(model.mean_risk(Lambda, N, N), 2 * least, rtol=1e-10)
    for key in jax.random.split(jax.random.key(4), 20):
        step = 0.1 * jax.random.normal(key, (D, D + 1))
        assert loss(U + step[:, :D], u + step[0, D]) > least


@pytest.fixture(scope="module")
def any_matrices():
    keys = jax.random.split(jax.random.key(6))
    w_kq, w_pv = (0.5 * jax.random.normal(key, (D + 1, D + 1)) for key in keys)
    return {"W_KQ": w_kq, "W_PV": w_pv}


@pytest.mark.parametrize("n", [2, N])
def test_population_loss_is_the_mean_over_prompts_for_any_matrices(n, any_matrices):
    """Its value and gradient, within the errors of 2 * 10^5 prompts."""
    task = model.InContextRegression(LAMBDA, n, sigma=0.1)

    def statistic(batch):
        def loss(p):
            return task.loss(p, {}, batch, key=jax.random.key(0), train=True).loss

        value, gradient = jax.value_and_grad(loss)(any_matrices)
        return jnp.append(jax.flatten_util.ravel_pytree(gradient)[0], value)

    prompts = regression.Prompts(n, regression.fixed_covariance(LAMBDA))
    mean, error = sample(statistic, prompts, chunks=20)
    value, gradient = jax.value_and_grad(model.population_loss)(any_matrices, LAMBDA, n)
    expected = jnp.append(jax.flatten_util.ravel_pytree(gradient)[0], value)
    # The largest of 51 t-values with 19 degrees of freedom stays below 5 in 99.8 % of draws.
    assert np.abs(np.asarray(mean - expected) / (np.asarray(error) + 1e-6)).max() < 5
    assert error[-1] < 0.02 * value


def test_population_loss_on_the_two_blocks_is_the_reduced_one(float64):
    """Also its gradient, which has no part outside of them: the flow stays inside."""
    Lambda, U, u = jnp.asarray(LAMBDA), jax.random.normal(jax.random.key(0), (D, D)), 0.7
    params = model.weights(U, jnp.asarray(u))
    loss, gradient = jax.value_and_grad(model.population_loss)(params, Lambda, N)
    np.testing.assert_allclose(loss, model.reduced_loss(U, u, Lambda, N), rtol=1e-12)
    inside = model.weights(*(-g for g in model.reduced_flow(U, jnp.asarray(u), Lambda, N)))
    rows = {"W_KQ": np.s_[:, :D], "W_PV": np.s_[D]}  # the entries that are read
    for name, read in rows.items():
        np.testing.assert_allclose(gradient[name][read], inside[name][read], atol=1e-12)
        assert not np.any(np.asarray(gradient[name].at[read].set(0)))


@pytest.mark.parametrize(("n", "m"), [(12, 12), (5, 40)])
def test_population_loss_of_the_limit_is_half_its_mean_risk(n, m, float64):
    Lambda = jnp.asarray(LAMBDA)
    loss = model.population_loss(model.limit(Lambda, n), Lambda, m)
    np.testing.assert_allclose(2 * loss, model.mean_risk(Lambda, n, m), rtol=1e-12)


def start(sigma):
    Theta = jax.random.normal(jax.random.key(5), (D, D))
    Theta = Theta / jnp.sqrt(jnp.linalg.norm(Theta @ Theta.T))
    params = model.initial_parameters(Theta, sigma, jnp.asarray(LAMBDA), N)
    return params["W_KQ"][:D, :D], params["W_PV"][D, D]


def flow(point):
    return model.reduced_flow(*point, jnp.asarray(LAMBDA), N)


def rk4(point, dt):
    def along(slope, h):
        return jax.tree.map(lambda p, s: p + h * s, point, slope)

    k1 = flow(point)
    k2 = flow(along(k1, dt / 2))
    k3 = flow(along(k2, dt / 2))
    k4 = flow(along(k3, dt))
    return jax.tree.map(
        lambda p, a, b, c, d: p + dt / 6 * (a + 2 * b + 2 * c + d), point, k1, k2, k3, k4
    )


def euler(point, dt):
    return jax.tree.map(lambda p, s: p + dt * s, point, flow(point))


@pytest.mark.parametrize(
    ("method", "dt", "steps", "drift_below", "drift_above"),
    [(rk4, 0.05, 20_000, 1e-6, 0.0), (euler, 2e-3, 500_000, 2e-3, 1e-4)],
)
def test_flow_reaches_the_limit(method, dt, steps, drift_below, drift_above, float64):
    end = jax.jit(lambda p: jax.lax.fori_loop(0, steps, lambda i, p: method(p, dt), p))(start(0.1))
    U, u = end
    params = model.limit(jnp.asarray(LAMBDA), N)
    inverse = jnp.linalg.inv(model.gamma(jnp.asarray(LAMBDA), N))
    drift = abs(float(u**2 - jnp.linalg.norm(U) ** 2))
    assert drift_above <= drift < drift_below
    assert relative(u * U, inverse) < 1e-9
    assert relative(model.weights(U, u)["W_KQ"], params["W_KQ"]) < 1e-3
    assert relative(model.weights(U, u)["W_PV"], params["W_PV"]) < 1e-3


# Sampled prompts.


def sample(statistic, prompts, chunks, rows=10_000):
    """The mean of `statistic(batch)` over chunks * rows prompts, and its standard error."""
    data = DeviceData(prompts, rows, seed=7)
    one = jax.jit(lambda address: statistic(data.draw(address)))
    means = jnp.stack([one(data.batch(k)) for k in range(chunks)])
    return means.mean(0), means.std(0, ddof=1) / chunks**0.5


def squared_error(params):
    def statistic(batch):
        yhat = model.predict(params, batch["x"], batch["y"], batch["x_q"])
        return jnp.mean((yhat - batch["y_q"]) ** 2)

    return statistic


TASK = (0.5, -1.0, 1.5, 0.3)


@pytest.mark.parametrize(
    ("labels", "law"),
    [
        (regression.linear_labels, model.linear_label_law),
        (regression.noisy_labels(0.5), lambda w, L: model.linear_label_law(w, L, 0.5)),
        (regression.quadratic_labels(0.5), lambda w, L: model.quadratic_label_law(w, L, 0.5)),
    ],
    ids=["linear", "noisy", "quadratic"],
)
@pytest.mark.parametrize(("n", "m"), [(12, 12), (5, 40)])
def test_risk_formula_against_monte_carlo(labels, law, n, m):
    Lambda = jnp.asarray(LAMBDA)
    prompts = regression.Prompts(
        m, regression.fixed_covariance(LAMBDA), regression.fixed_task(TASK), labels
    )
    measured, error = sample(squared_error(model.limit(Lambda, n)), prompts, chunks=20)
    expected = model.risk(law(jnp.asarray(TASK), Lambda), Lambda, n, m)
    assert error < 0.01 * expected  # else 3 % would mean little
    np.testing.assert_allclose(measured, expected, rtol=0.03)


@pytest.mark.parametrize(("n", "m"), [(12, 12), (5, 40), (40, 5)])
def test_mean_risk_is_the_average_over_tasks(n, m):
    Lambda = jnp.asarray(LAMBDA)
    prompts = regression.Prompts(m, regression.fixed_covariance(LAMBDA))
    measured, _ = sample(squared_error(model.limit(Lambda, n)), prompts, chunks=20)
    np.testing.assert_allclose(measured, model.mean_risk(Lambda, n, m), rtol=0.03)


@pytest.fixture(scope="module")
def gradient():
    """(params) -> the mean gradient of the sampled loss over 2 * 10^5 prompts, in errors."""
    task = model.InContextRegression(LAMBDA, N, sigma=0.1)

    def measure(params):
        loss = lambda p, b: task.loss(p, {}, b, key=jax.random.key(0), train=True).loss
        flat = lambda b: jax.flatten_util.ravel_pytree(jax.grad(loss)(params, b))[0]
        mean, error = sample(flat, PROMPTS, chunks=20)
        return np.abs(mean) / (error + 1e-12)

    return measure


def test_sampled_gradient_vanishes_at_the_limit_and_only_there(gradient):
    params = model.limit(jnp.asarray(LAMBDA), N)
    # The largest of 50 t-values with 19 degrees of freedom stays below 5 in 99.8 % of draws.
    assert gradient(params).max() < 5
    assert gradient({**params, "W_PV": 1.1 * params["W_PV"]}).max() > 20


def test_task_starts_where_the_theorem_does_and_ignores_padding(batch):
    task = model.InContextRegression(LAMBDA, N, sigma=0.1)
    params, extra = jax.jit(task.init)(jax.random.key(0), batch)
    np.testing.assert_allclose(jnp.linalg.norm(params["W_KQ"]), 0.1, rtol=1e-5)
    np.testing.assert_allclose(params["W_KQ"], params["W_KQ"].T, atol=1e-7)
    assert params["W_PV"][D, D] == np.float32(0.1) and jnp.count_nonzero(params["W_PV"]) == 1

    def loss(batch):
        return task.loss(params, extra, batch, key=jax.random.key(0), train=True)

    padded = {k: jnp.concatenate([v, jnp.full_like(v[:3], jnp.nan)]) for k, v in batch.items()}
    weight = jnp.asarray([1.0] * 16 + [0.0] * 3)
    np.testing.assert_allclose(loss({**padded, "weight": weight}).loss, loss(batch).loss, rtol=1e-6)
    assert loss({**padded, "weight": weight}).weight == 16


# Random covariances.


def test_random_covariance_limit_is_stationary(float64):
    lambdas = jax.random.exponential(jax.random.key(0), (200, D))
    covariances = jax.vmap(jnp.diag)(lambdas)
    params = model.balanced_weights(model.random_covariance_limit(covariances, N))

    def loss(U, u):
        return jax.vmap(lambda L: model.reduced_loss(U, u, L, N))(covariances).mean()

    gradients = jax.grad(loss, (0, 1))(params["W_KQ"][:D, :D], params["W_PV"][D, D])
    assert max(float(jnp.abs(g).max()) for g in gradients) < 1e-12


def test_exponential_covariances_tend_to_a_third():
    lambdas = jax.random.exponential(jax.random.key(0), (1_000_000, 3))
    B = model.random_covariance_limit(jax.vmap(jnp.diag)(lambdas), 10**6)
    np.testing.assert_allclose(B, jnp.eye(3) / 3, rtol=0.01)


# Shifts (section 4.2), at lengths where the 1/N and 1/M terms are small.


def shifted(covariance, N=2000, **parts):
    data = DeviceData(regression.Prompts(N, covariance, **parts), 64)
    batch = data.draw(data.batch(0))
    return batch, lambda params: model.predict(params, batch["x"], batch["y"], batch["x_q"])


def test_query_shift_is_tolerated():
    batch, predict = shifted(
        regression.fixed_covariance(LAMBDA), query=regression.scaled_query(3.0)
    )
    yhat = predict(model.limit(jnp.asarray(LAMBDA), 2000))
    assert jnp.std(batch["y_q"]) > 3
    assert jnp.mean((yhat - batch["y_q"]) ** 2) < 0.01 * jnp.var(batch["y_q"])


def test_covariate_shift_is_not():
    identity = np.eye(D)
    batch, predict = shifted(regression.fixed_covariance(4.0 * identity))
    yhat = predict(model.limit(jnp.asarray(identity), 2000))  # examples scaled by c = 2
    slope = jnp.vdot(yhat, batch["y_q"]) / jnp.vdot(batch["y_q"], batch["y_q"])
    np.testing.assert_allclose(slope, 4.0, rtol=0.02)  # c^2, not 1


def test_a_query_orthogonal_to_the_examples_is_answered_by_zero():
    batch, predict = shifted(
        regression.fixed_covariance(np.eye(D)), N=2, query=regression.orthogonal_query
    )
    yhat = predict(model.limit(jnp.eye(D), 2))
    np.testing.assert_allclose(yhat, 0, atol=1e-5)
    assert jnp.abs(batch["y_q"]).mean() > 0.3


# What is refused.


UNIT = np.eye(D) / D**0.25  # ||Theta Theta^T||_F = 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: model.gamma(jnp.eye(D), 0), "N: 0 examples"),
        (lambda: regression.Prompts(0, regression.fixed_covariance(LAMBDA)), "N: 0 examples"),
        (lambda: regression.fixed_covariance(-np.eye(D)), "Lambda: not symmetric positive"),
        (lambda: regression.fixed_covariance(np.triu(np.ones((D, D)))), "Lambda: not symmetric"),
        (lambda: regression.fixed_covariance(np.ones((2, 3))), r"Lambda: shape \(2, 3\)"),
        (lambda: model.initial_parameters(UNIT, 0.1, -np.eye(D), N), "Lambda: not symmetric"),
        (lambda: model.initial_parameters(2 * UNIT, 0.1, LAMBDA, N), r"Theta\^T\|\|_F is 4"),
        (lambda: model.initial_parameters(UNIT, -0.1, LAMBDA, N), "sigma: -0.1"),
        (lambda: model.layer(model.limit(jnp.eye(1), N), jnp.ones((2, 3))), "E: the last label"),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def test_large_sigma_is_warned_of():
    with pytest.warns(UserWarning, match=r"sigma: 2\.0 gives .* proven below 2 only"):
        model.initial_parameters(UNIT, 2.0, LAMBDA, N)
