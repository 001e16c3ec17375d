"""Gradient flow against what is known in closed form: a bowl, a double well, linear_icl."""

import dataclasses
import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.analyze.gradient_flow import (
    FlowUpdate,
    adaptive,
    basins,
    euler,
    flow,
    hessian,
    newton,
    settle,
    spectrum,
    trajectory,
)
from jaxformer.papers.linear_icl import model
from jaxformer.papers.mesa_optimization import model as mesa
from jaxformer.recipe import LossOutput, Phase, Recipe
from jaxformer.train.fit import FitOptions, fit

LAMBDA = np.diag([1.0, 0.5]).astype(np.float32)
N = 10
FINE = adaptive(1e-9, 1e-11)


@dataclasses.dataclass(frozen=True)
class Bowl:
    """loss = (w - 3)^2 / 2, whose flow is w = 3 - 3 exp(-t)."""

    def init(self, key, batch):
        return {"w": jnp.zeros(())}, {}

    def loss(self, params, extra, batch, *, key, train):
        return LossOutput(bowl(params), jnp.ones(()), {}, extra)


def bowl(params):
    return 0.5 * (params["w"] - 3.0) ** 2


def double_well(params):
    """Minima at x = +-1, y = 0, a saddle between them; the flow keeps the sign of x."""
    return (params["x"] ** 2 - 1) ** 2 / 4 + params["y"] ** 2


def test_a_trial_step_that_overflows_is_taken_back():
    integrator = adaptive(1e-4, 1e-6)
    law = mesa.moments("gaussian", 5)

    def field(t, w, args):  # w = a = b, from 2: the first trial gives inf, and its error NaN
        return -jax.grad(lambda w: mesa.diagonal_loss(w**2, law, 20, 5) / 10)(w)

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        integrator.solver,
        t0=0.0,
        t1=0.4,
        dt0=integrator.first_step,
        y0=jnp.asarray(2.0),
        stepsize_controller=integrator.controller,
        max_steps=200,
        throw=False,
    )
    assert solution.result == diffrax.RESULTS.successful
    np.testing.assert_allclose(solution.ys[-1] ** 2, mesa.limit_product(law, 20), rtol=1e-3)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def test_an_update_follows_its_solution(one_device):
    def w(integrator, converged=0.0, steps=4):
        update = FlowUpdate(Bowl(), 0.5, integrator, converged)
        recipe = Recipe(Bowl(), [Phase("flow", steps, update=update)])
        return fit(recipe, mesh=one_device, options=FitOptions(progress=False)).params["w"]

    assert float(w(adaptive(1e-7, 1e-9))) == pytest.approx(3 - 3 * np.exp(-2.0), abs=2e-6)
    assert float(w(euler(0.1))) == pytest.approx(3 - 3 * 0.9**20, abs=1e-5)
    # It stops where |gradient| = |w - 3| has come down to 0.5, and stays there.
    assert 2.5 <= float(w(adaptive(1e-7, 1e-9), 0.5, steps=20)) < 2.7


def test_flow_says_how_long_it_took(float64):
    end = flow(bowl, {"w": jnp.zeros(())}, 100.0, adaptive(1e-8, 1e-10), converged=0.3)
    assert float(end.time) == pytest.approx(np.log(10), abs=0.5)  # at the end of a step
    np.testing.assert_allclose(end.params["w"], 3 - 3 * np.exp(-end.time), rtol=1e-6)


def test_newton_finds_the_saddle_that_flow_leaves(float64):
    near = {"x": jnp.asarray(0.1), "y": jnp.asarray(0.3)}
    saddle = jax.jit(functools.partial(newton, double_well))(near)
    to_rest = functools.partial(settle, double_well, converged=1e-8, integrator=FINE)
    minimum = jax.jit(to_rest)(near)
    np.testing.assert_allclose([saddle.params["x"], saddle.params["y"]], 0, atol=1e-9)
    np.testing.assert_allclose([minimum.params["x"], minimum.params["y"]], [1, 0], atol=1e-6)
    assert saddle.gradient_norm < 1e-9 and minimum.gradient_norm <= 1e-8
    assert float(saddle.loss) == pytest.approx(0.25) and float(minimum.loss) < 1e-12
    np.testing.assert_allclose(spectrum(double_well, saddle.params), [-1, 2], atol=1e-9)
    np.testing.assert_allclose(hessian(double_well, minimum.params), np.diag([2, 2]), atol=1e-5)


def test_basins_are_where_starts_end(float64):
    x = jnp.asarray([-2.0, -0.1, 0.2, 1.5, 3.0, 0.0])
    starts = {"x": x, "y": jnp.ones(6)}
    found = basins(functools.partial(settle, double_well), starts)
    np.testing.assert_array_equal(found.labels, [1, 1, 0, 0, 0, 2])
    np.testing.assert_allclose(found.ends.params["x"][found.attractors], [1, -1, 0], atol=1e-5)
    np.testing.assert_allclose(found.shares(), [1 / 2, 1 / 3, 1 / 6])


@pytest.fixture(scope="module")
def in_context():
    """The exact loss of a linear layer, and where the theorem says that its flow ends."""
    Lambda = jnp.asarray(LAMBDA)
    loss = lambda params: model.population_loss(params, Lambda, N)
    return loss, Lambda


def test_the_limit_of_linear_icl_is_a_minimum_on_a_manifold(in_context, float64):
    """The spectrum: nothing below 0, and the scaling u -> c u, U -> U / c costs nothing."""
    loss, Lambda = in_context
    limit = model.limit(Lambda.astype(float), N)
    values = jax.jit(functools.partial(spectrum, loss))(limit)
    assert len(values) == 18 and values[0] > -1e-9
    # W_PV has 6 entries that are never read, W_KQ 3; the scaling is one direction more.
    assert np.sum(values < 1e-9) == 10
    # Across that direction the Hessian of the two blocks is known: w.r.t. U alone it is
    # u^2 (Gamma Lambda) x Lambda, diagonal here.
    d = 2
    U, u, _ = model.blocks(limit)
    reduced = lambda U: model.reduced_loss(U, u, Lambda, N)
    of_U = jax.jit(functools.partial(hessian, reduced))(U)
    G = jnp.diagonal(model.gamma(Lambda, N))
    lambdas = jnp.diagonal(Lambda)
    known = u**2 * jnp.outer(G * lambdas, lambdas)
    np.testing.assert_allclose(of_U, jnp.diag(known.ravel()), atol=1e-10)
    assert of_U.shape == (d * d, d * d)


def test_linear_icl_settles_where_the_theorem_says_from_both_sides(in_context, float64):
    """Flow and Newton find the limit; a start and its mirror image end at one predictor."""
    loss, Lambda = in_context
    Lambda = Lambda.astype(float)
    limit = model.limit(Lambda, N)
    start = model.random_start(jax.random.key(0), 0.3, np.asarray(Lambda), N)
    mirrored = jax.tree.map(jnp.negative, start)
    starts = jax.tree.map(lambda *x: jnp.stack(x), start, mirrored)

    def predictor(params):
        U, u, _ = model.blocks(params)
        return u * U

    to_rest = functools.partial(settle, loss, converged=1e-7, longest=1e3, integrator=FINE)
    found = basins(to_rest, starts, predictor, within=1e-4)
    np.testing.assert_array_equal(found.labels, [0, 0])
    both = found.ends.params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, atol=1e-5), both, limit)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], -b, atol=1e-5), both, limit)
    np.testing.assert_allclose(found.ends.loss, model.minimum_loss(Lambda, N), rtol=1e-9)
    # Newton from nearby: the same predictor; along the manifold it stays where it is.
    nudged = jax.tree.map(lambda w: w + 0.01 * jnp.sign(w), limit)
    refined = jax.jit(functools.partial(newton, loss))(nudged)
    assert refined.gradient_norm < 1e-10
    np.testing.assert_allclose(predictor(refined.params), predictor(limit), atol=1e-9)


def test_the_origin_of_linear_icl_is_a_saddle(in_context, float64):
    """Its way out is known: d^2 L = -2 u tr(Lambda^2 U), so +-||Lambda^2||_F."""
    loss, Lambda = in_context
    zero = jax.tree.map(jnp.zeros_like, model.limit(Lambda.astype(float), N))
    values = jax.jit(functools.partial(spectrum, loss))(zero)
    out = float(jnp.linalg.norm(Lambda @ Lambda))
    assert values[0] == pytest.approx(-out, rel=1e-6) and values[-1] == pytest.approx(out, rel=1e-6)


def test_a_trajectory_is_the_solution_at_equal_times(float64):
    path = trajectory(FlowUpdate(Bowl(), 0.5, adaptive(1e-8, 1e-10)), {"w": jnp.zeros(())}, 4)
    np.testing.assert_allclose(path["w"], 3 - 3 * np.exp(-0.5 * np.arange(5)), atol=1e-6)
