"""Identities of mesa_optimization: the layer, its exact loss, and the theorems on its flow."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer.analyze.gradient_flow import adaptive, flow, settle, spectrum, trajectory
from jaxformer.data.base import DeviceData
from jaxformer.data.sources.rotations import STARTS, Rotations, quadrature, rotated
from jaxformer.papers.mesa_optimization import Projected, model
from jaxformer.recipe import ConfigError
from jaxformer.train import optim
from jaxformer.train.updates import GradientUpdate

KEY = jax.random.key(0)
FINE = adaptive(1e-9, 1e-11)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def sequences(count, d, T, start, scale=1.0, seed=0):
    data = DeviceData(Rotations(d, T, start, scale), count, seed)
    return jax.jit(data.draw)(data.batch(0))["x"]


def anything(d, scale=0.5):
    """Matrices without any structure, as parameters."""
    kq, pv = jax.random.split(jax.random.key(7))
    return {
        "W_KQ": scale * jax.random.normal(kq, (2, 2 * d, 2 * d)),
        "W_PV": scale * jax.random.normal(pv, (2, d, 2 * d)),
    }


def answer(params, x):
    return model.predict(*model.complex_matrices(params), model.embedding(x))


def population(d, T, start, scale=1.0):
    task = model.Population(model.Autoregression(0.5, 1.5), quadrature(d, T, start, scale))
    return task.population


# Data.


@pytest.mark.parametrize("start", STARTS)
def test_sequences_turn_by_one_diagonal_matrix(start):
    x = np.asarray(sequences(6, 3, 5, start, scale=2.0))
    assert x.shape == (6, 3, 5) and x.dtype == np.complex64
    assert not np.any(x[..., 0].imag)
    alive = np.abs(x[..., 0]) > 0
    ratio = x[..., 1:][alive] / x[..., :-1][alive]
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), atol=1e-4)
    np.testing.assert_allclose(np.abs(ratio), 1, atol=1e-5)
    first = x[..., 0].real
    if start == "sparse":
        np.testing.assert_array_equal(np.sort(np.abs(first))[:, -1], 2)
        assert np.all(np.sum(first != 0, axis=1) == 1)
    elif start == "full_one":
        np.testing.assert_array_equal(first, 1)
    else:
        assert np.all(first != 0)


@pytest.mark.parametrize("start", STARTS)
def test_moments_are_those_of_the_law(start):
    """Within four standard errors of 2 * 10^5 draws."""
    d, scale = 3, 1.5
    x = np.asarray(sequences(200_000, d, 3, start, scale)[..., 0].real, np.float64)
    of = model.moments(start, d, scale)
    first, others = x[:, 0] ** 2, x[:, 1:] ** 4
    drawn = [first, first**2, first**3, first * others.sum(1)]
    for values, expected in zip(drawn, of, strict=True):
        error = values.std() / len(values) ** 0.5
        assert abs(values.mean() - expected) <= 4 * error + 1e-9


# The layer.


def test_a_diagonal_layer_is_one_step_of_descent(float64):
    for d, T in ((1, 3), (2, 7), (4, 30)):
        x = rotated(jax.random.uniform(KEY, (3, d)) * 6, jax.random.normal(KEY, (3, d)), T)
        yhat = answer(model.diagonal(0.7, 1.3, d), x)
        step = model.mesa_optimizer(0.7 * 1.3, x)
        assert yhat.shape == (3, d, T - 2) and yhat.dtype == jnp.complex128
        np.testing.assert_allclose(yhat, step, atol=1e-12)
    # The step itself, on the OLS problem of the last prefix, by its gradient.
    past, known = x[0, :, : T - 2], x[0, :, 1 : T - 1]

    def ols(pair):
        W = jax.lax.complex(*pair)
        return 0.5 * jnp.sum(jnp.abs(known - W @ past) ** 2)

    gradient = jax.lax.complex(*jax.grad(ols)(jnp.zeros((2, d, d))))
    W_hat = -0.7 * 1.3 / (T - 2) * gradient
    np.testing.assert_allclose(yhat[0, :, -1], W_hat @ x[0, :, T - 2], atol=1e-12)


def test_single_precision_agrees():
    x = sequences(4, 3, 12, "gaussian")
    np.testing.assert_allclose(
        answer(model.diagonal(0.7, 1.3, 3), x), model.mesa_optimizer(0.91, x), atol=1e-5
    )


@pytest.mark.parametrize("T", [6, 40])  # by scores, by running sums
def test_each_answer_is_that_of_its_prefix_alone(T, float64):
    d = 2
    x = rotated(jax.random.uniform(KEY, (2, d)) * 6, jax.random.normal(KEY, (2, d)), T)
    w_kq, w_pv = model.complex_matrices(anything(d))
    E = np.asarray(model.embedding(x))
    np.testing.assert_array_equal(E[:, d:, 0], 0)
    yhat = np.asarray(model.predict(w_kq, w_pv, E))
    for t in range(2, T):
        prefix = E[..., :t]
        outer = prefix @ prefix.conj().swapaxes(-1, -2)
        expected = (w_pv @ outer @ w_kq @ prefix[..., -1:])[..., 0] / (t - 1)
        np.testing.assert_allclose(yhat[..., t - 2], expected, atol=1e-12)
    later = np.asarray(model.predict(w_kq, w_pv, E + (np.arange(T) >= 4) * (3 + 1j)))
    np.testing.assert_array_equal(later[..., :3], yhat[..., :3])  # t = 2, 3, 4
    assert not np.any(np.isclose(later[..., 3:], yhat[..., 3:]))


def test_a_common_phase_passes_through(float64):
    x = rotated(jax.random.uniform(KEY, (2, 3)) * 6, jax.random.normal(KEY, (2, 3)), 7)
    turn = jnp.exp(0.8j)
    params = anything(3)
    np.testing.assert_allclose(answer(params, turn * x), turn * answer(params, x), atol=1e-11)


@pytest.mark.parametrize("c", [0.5, 1.0, 2.0])
def test_a_sparse_start_is_recovered_at_every_step(c):
    x = sequences(16, 4, 25, "sparse", c)
    np.testing.assert_allclose(answer(model.diagonal(1 / c, 1 / c, 4), x), x[..., 2:], atol=2e-5)
    of = model.moments("sparse", 4, c)
    for T in (3, 10, 100):
        assert model.limit_product(of, T) == pytest.approx(1 / c**2)


# The population loss.


@pytest.mark.parametrize("start", STARTS)
def test_the_quadrature_is_the_mean_over_sequences(start):
    """Value and gradient at matrices without structure, within the errors of 10^5 sequences."""
    d, T, parts = 2, 5, 20
    params = anything(d)
    task = model.Autoregression(1.0, 1.0)

    @jax.jit
    def part(seed):
        data = DeviceData(Rotations(d, T, start, 0.8), 5000)
        x = data.draw({**data.batch(0), "seed": jnp.full(5000, seed, jnp.uint32)})
        loss = lambda p: task.loss(p, {}, x, key=KEY, train=True).loss
        value, gradient = jax.value_and_grad(loss)(params)
        return jnp.append(jax.flatten_util.ravel_pytree(gradient)[0], value)

    drawn = np.stack([part(seed) for seed in range(parts)])
    error = drawn.std(0, ddof=1) / parts**0.5
    value, gradient = jax.jit(jax.value_and_grad(population(d, T, start, 0.8)))(params)
    exact = np.append(jax.flatten_util.ravel_pytree(gradient)[0], value)
    # The largest of 49 t-values with 19 degrees of freedom stays below 5 in 99.8 % of draws.
    assert np.max(np.abs(drawn.mean(0) - exact) / (error + 1e-5 * np.abs(exact) + 1e-6)) < 5
    assert error[-1] < 0.05 * value


@pytest.mark.parametrize("start", STARTS)
def test_on_the_diagonal_the_loss_is_a_parabola_of_the_product(start, float64):
    d, T, scale = 2, 6, 0.7
    exact, of = jax.jit(population(d, T, start, scale)), model.moments(start, d, scale)
    for a, b in ((0.3, 0.4), (1.2, 0.1), (2.0, 1.5)):
        expected = model.diagonal_loss(a * b, of, T, d)
        np.testing.assert_allclose(exact(model.diagonal(a, b, d)), expected, rtol=1e-9)


def test_the_minimum_of_drawn_sequences_is_at_the_closed_form():
    """Three points of the parabola in c = a b, on 2 * 10^5 sequences: within 3 %."""
    d, T = 3, 8
    x = sequences(200_000, d, T, "gaussian", 1.0)

    @jax.jit
    def loss(c):
        return model.sequence_loss(model.mesa_optimizer(c, x), x).mean()

    points = np.array([0.0, 0.2, 0.4])
    second, first, _ = np.polyfit(points, [float(loss(c)) for c in points], 2)
    closed = model.limit_product(model.moments("gaussian", d), T)
    assert -first / (2 * second) == pytest.approx(closed, rel=0.03)


# The flow (Theorem 4.1).


@pytest.mark.parametrize("start", ["gaussian", "sparse"])
def test_the_gradient_stays_on_the_two_diagonals(start, float64):
    d, T = 2, 6
    params, of = model.diagonal(0.3, 0.4, d), model.moments(start, d)
    gradient = jax.jit(jax.grad(population(d, T, start)))(params)
    along = model.diagonal(*(-s for s in model.diagonal_flow(0.3, 0.4, of, T, d)), d)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), gradient, along)


def test_from_ones_it_leaves_the_diagonals(float64):
    """Outside of the assumption: the off-diagonal gradient is there from the first step on."""
    gradient = jax.jit(jax.grad(population(2, 6, "full_one")))(model.diagonal(0.3, 0.4, 2))
    assert float(model.off_diagonal(gradient)) > 0.01


def test_the_flow_of_two_numbers_ends_at_the_closed_form(float64):
    """From every start (a, b), for all three laws; a^2 - b^2 stays as it was."""
    d, T = 5, 20
    inits = np.array([(0.1, 0.1), (0.5, 1.5), (2.0, 2.0)])
    laws = [model.moments(start, d, 0.9) for start in STARTS]
    of = jax.tree.map(lambda *x: jnp.asarray(x, float), *laws)
    at = {"a": jnp.asarray(inits[:, 0]), "b": jnp.asarray(inits[:, 1])}

    def rest(of, at):
        loss = lambda at: model.diagonal_loss(at["a"] * at["b"], of, T, d) / d
        return settle(loss, at, 1e-7, integrator=FINE).params

    ends = jax.jit(jax.vmap(jax.vmap(rest, (None, 0)), (0, None)))(of, at)
    for i, law in enumerate(laws):
        for j, init in enumerate(inits):
            a, b = ends["a"][i, j], ends["b"][i, j]
            np.testing.assert_allclose([a, b], model.limit(law, T, *init), rtol=1e-5)
            np.testing.assert_allclose(a**2 - b**2, init[0] ** 2 - init[1] ** 2, atol=1e-6)
            assert float(a * b) == pytest.approx(model.limit_product(law, T), rel=1e-6)


def test_the_closed_form_of_gaussian_starts():
    for s in (0.5, 1.0, 2.0):
        of, H = model.moments("gaussian", 5, s), model.harmonic_mean_length(20)
        expected = 1 / (5 * s**2 + 4 * s**2 * H)
        assert model.limit_product(of, 20) == pytest.approx(expected)
        assert model.limit_product(of, 10**6) == pytest.approx(1 / (5 * s**2), rel=1e-3)


@pytest.mark.parametrize(("start", "time"), [("gaussian", 8.0), ("sparse", 40.0)])
def test_the_flow_of_all_entries_ends_at_the_closed_form(start, time, float64):
    """And that is a minimum of the loss of all of them, not only on the diagonals."""
    d, T, init = 2, 4, (0.5, 1.5)
    loss = population(d, T, start)
    params = jax.jit(lambda p: flow(loss, p, time).params)(model.diagonal(*init, d))
    end = model.diagonal(*model.limit(model.moments(start, d), T, *init), d)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, end)
    values = jax.jit(functools.partial(spectrum, loss))(end)
    assert values[0] > -1e-8 and values[-1] > 1


def test_descent_keeps_the_balance(float64):
    """a^2 - b^2 drifts by less than 1 % with a small step, on the way to the closed form."""
    d, T, init = 2, 5, (0.5, 1.5)
    task = model.Population(model.Autoregression(*init), quadrature(d, T, "gaussian"))
    update = GradientUpdate(
        task, optim.optimizer(optim.sgd(), optim.schedule(2e-3, 400, kind="constant"))
    )
    path = jax.jit(lambda p: trajectory(update, p, 400))(model.diagonal(*init, d))
    w_32, w_12 = jax.vmap(model.blocks)(path)
    a, b = (jnp.diagonal(w, axis1=1, axis2=2).real.mean(1) for w in (w_32, w_12))
    difference = a**2 - b**2
    assert np.max(np.abs(difference / difference[0] - 1)) < 0.01
    closed = model.limit_product(model.moments("gaussian", d), T)
    np.testing.assert_allclose(jax.vmap(model.product)(path)[-1], closed, rtol=1e-3)


def test_kept_diagonal_ones_end_at_their_closed_form(float64):
    d, T = 2, 6
    task = model.Population(model.Autoregression(0.5, 0.5), quadrature(d, T, "full_one"))
    rate = optim.schedule(0.05, 300, kind="constant")
    update = Projected(
        GradientUpdate(task, optim.optimizer(optim.sgd(), rate)), model.without_off_diagonals
    )
    end = jax.jit(lambda p: trajectory(update, p, 300))(model.diagonal(0.5, 0.5, d))
    end = jax.tree.map(lambda w: w[-1], end)
    closed = model.limit_product(model.moments("full_one", d), T)
    assert float(model.off_diagonal(end)) == 0
    assert float(model.product(end)) == pytest.approx(closed, rel=0.02)
    free = jax.jit(lambda p: flow(task.population, p, 15.0).params)(model.diagonal(0.5, 0.5, d))
    assert float(model.off_diagonal(free)) > 0.02
    assert task.population(free) < task.population(end) - 0.01


# Capability (section 4.3).


@pytest.mark.parametrize("T", [10, 200])
def test_gaussian_starts_are_answered_by_a_fraction(T):
    """E yhat_j / x_j = a b sigma^2 at every length, in the limit 1/5; within its error."""
    d, sigma = 3, 1.4
    product = model.limit_product(model.moments("gaussian", d, sigma), T)
    x = sequences(20_000, d, T, "gaussian", sigma)
    ratio = np.asarray((model.mesa_optimizer(product, x)[..., -1] / x[..., -1]).real, np.float64)
    error = ratio.mean(1).std() / len(ratio) ** 0.5
    assert abs(ratio.mean() - product * sigma**2) < 4 * error + 1e-4
    assert error < 0.01
    assert product * sigma**2 == pytest.approx(0.2, rel=0.3 if T == 10 else 0.05)


def test_long_prefixes_answer_the_cube_of_the_start():
    """yhat_j -> kappa_1 / kappa_2 lambda_j^t x_1j^3, of order T^{-1/2} by the other entries."""
    d, T = 2, 3000
    x_1 = jnp.asarray([[0.5, -1.5]])
    x = rotated(jnp.asarray([[0.7, 2.9]]), x_1, T)
    of = model.moments("gaussian", d)
    yhat = model.mesa_optimizer(model.limit_product(of, T), x)[..., -1]
    expected = of.kappa_1 / of.kappa_2 * x[..., -1] * x_1**2
    np.testing.assert_allclose(yhat, expected, atol=5e-3)


# The task, and what is refused.


def test_a_task_ignores_padding_and_starts_diagonal():
    task = model.Autoregression(0.3, 0.4)
    batch = {"x": sequences(8, 2, 6, "gaussian")}
    params, _ = task.init(KEY, batch)
    jax.tree.map(np.testing.assert_array_equal, params, model.diagonal(0.3, 0.4, 2))
    w_kq, w_pv = model.complex_matrices(params)
    assert w_kq.shape == (4, 4) and w_pv.shape == (2, 4) and w_kq[2, 0] == np.float32(0.3)
    padded = {"x": jnp.concatenate([batch["x"], jnp.full((2, 2, 6), jnp.nan + 0j)])}
    padded["weight"] = jnp.asarray([1.0] * 8 + [0.0] * 2)
    plain, longer = (task.loss(params, {}, b, key=KEY, train=True) for b in (batch, padded))
    np.testing.assert_allclose(plain.loss, longer.loss, rtol=1e-6)


REAL = jnp.zeros((2, 4, 5))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Rotations(2, 2, "gaussian"), "T: 2 steps"),
        (lambda: Rotations(0, 5, "gaussian"), "d: 0 dimensions"),
        (lambda: Rotations(2, 5, "uniform"), "start: 'uniform' is unknown"),
        (lambda: quadrature(2, 5, "sparse", -1.0), "scale: -1.0"),
        (lambda: model.moments("uniform", 2), "start: 'uniform' is unknown"),
        (lambda: model.Autoregression(0.0, 1.0), "a: 0.0; give a positive"),
        (lambda: model.embedding(REAL), "x: float32; give a complex"),
        (lambda: model.embedding(REAL[..., :2] + 0j), "x: T=2 steps"),
        (lambda: model.predict(jnp.eye(4), jnp.eye(4)[:2] + 0j, REAL + 0j), "W_KQ: float32"),
        (lambda: jaxformer.load("mesa_optimization:tiny", experiment="x"), "experiment='x'"),
        (lambda: jaxformer.load("mesa_optimization:tiny", data__T=2), "T: 2 steps"),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def test_the_flow_is_a_recipe():
    recipe = jaxformer.load("mesa_optimization:flow", steps=2, data__T=4)
    assert dataclasses.is_dataclass(recipe.task)
    params, _ = recipe.task.init(KEY, {})
    end = jax.jit(lambda p: trajectory(recipe.phases[0].update, p, 2))(params)
    closed = model.limit_product(model.moments("gaussian", 2), 4)
    assert float(model.product(jax.tree.map(lambda w: w[-1], end))) == pytest.approx(
        closed, rel=1e-3
    )
