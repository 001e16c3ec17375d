"""Training linear_icl: the flow through the loop, its measurements, and the decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer.analyze.gradient_flow import trajectory
from jaxformer.data.base import DeviceData
from jaxformer.data.sources import regression
from jaxformer.models.transformer import Transformer
from jaxformer.papers.linear_icl import model
from jaxformer.papers.linear_icl.measure import against_limit, ridge
from jaxformer.papers.linear_icl.transformer import (
    PrefixRegression,
    in_context_transformer,
    interleave,
)
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import ConfigError, Predicts
from jaxformer.train.fit import FitOptions, fit

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)
QUIET = FitOptions(progress=False)


def distance(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


# The flow.


@pytest.mark.parametrize("overrides", [{}, {"data__covariance": "exponential"}], ids=str)
def test_flow_of_the_full_matrices_reaches_the_limit(overrides, one_device):
    """Both theorems, through `fit` and diffrax, with all (d+1) x (d+1) entries free."""
    fewer = {"steps": 2, "data__covariances": 30}
    recipe = jaxformer.load("linear_icl:flow", **fewer, **overrides)
    state = fit(recipe, mesh=one_device, options=QUIET)
    limit = recipe.task.limit()
    assert distance(state.params["W_KQ"], limit["W_KQ"]) < 1e-3
    assert distance(state.params["W_PV"], limit["W_PV"]) < 1e-3
    measured = recipe.evaluators[0](state, None)
    assert measured["error"] < 1e-3 and abs(measured["excess_loss"]) < 1e-5
    assert measured["cosine"] > 0.9999 and abs(measured["balance"]) < 1e-4
    assert measured["outside"] == 0


def test_trajectory_starts_at_the_start_and_takes_the_steps_of_fit(one_device):
    recipe = jaxformer.load("linear_icl:flow", steps=3, flow__time=6.0)
    params, _ = recipe.task.init(KEY, {})
    path = jax.jit(lambda p: trajectory(recipe.phases[0].update, p, 3))(params)
    assert path["W_KQ"].shape == (4, 6, 6)
    np.testing.assert_array_equal(path["W_KQ"][0], params["W_KQ"])
    losses = jax.vmap(recipe.task.population)(path)
    assert np.all(np.diff(losses) < 0)
    started = dataclasses.replace(recipe.phases[0], enter=lambda s: s.replace(params=params))
    state = fit(dataclasses.replace(recipe, phases=[started]), mesh=one_device, options=QUIET)
    np.testing.assert_allclose(path["W_KQ"][-1], state.params["W_KQ"], rtol=1e-4, atol=1e-6)


def test_the_limit_of_one_covariance_is_that_of_the_theorem():
    Lambda = np.diag([1.0, 0.5]).astype(np.float32) + 0.2
    task = model.PopulationRegression(Lambda[None], 7, 0.1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        task.limit(),
        model.limit(jnp.asarray(Lambda), 7),
    )
    found = against_limit(task.init(KEY, {})[0], task)
    assert found["excess_loss"] > 0.1 and found["error"] > 0.5
    np.testing.assert_allclose(found["balance"], 0, atol=1e-6)


def test_ridge_without_a_penalty_solves_noiseless_prompts():
    data = DeviceData(regression.Prompts(9, regression.fixed_covariance(np.eye(3))), 8)
    batch = data.draw(data.batch(0))
    answer = ridge(batch["x"], batch["y"], batch["x_q"])
    np.testing.assert_allclose(answer, batch["y_q"], rtol=1e-3, atol=1e-4)
    shrunk = ridge(batch["x"], batch["y"], batch["x_q"], penalty=1e6)
    np.testing.assert_allclose(shrunk, 0, atol=1e-3)


# The decoder.


TRUNK = Transformer(width=16, depth=1, heads=2, mlp="gelu_tanh")
DECODER = PrefixRegression(in_context_transformer(TRUNK, positions=6))


@pytest.fixture(scope="module")
def prompts():
    data = DeviceData(regression.Prompts(5, regression.random_diagonal_covariance(3)), 4)
    return data.draw(data.batch(0))


@pytest.fixture(scope="module")
def decoder(prompts):
    """(x (B, N, d), y (B, N)) -> answers."""
    params, extra = DECODER.init(KEY, prompts)
    assert extra == {}
    return params, jax.jit(lambda x, y: DECODER.model.apply({"params": params}, x, y))


def test_tokens_alternate():
    x, y = jnp.arange(12.0).reshape(1, 4, 3), -jnp.arange(1.0, 5.0)[None]
    tokens = interleave(x, y)
    np.testing.assert_array_equal(tokens[:, ::2], x)
    np.testing.assert_array_equal(tokens[0, 1::2], [[-1, 0, 0], [-2, 0, 0], [-3, 0, 0], [-4, 0, 0]])


def test_an_answer_sees_the_pairs_before_it_and_its_own_x(decoder):
    x = jax.random.normal(KEY, (2, 6, 3))
    y = jax.random.normal(jax.random.key(1), (2, 6))
    answers = decoder[1](x, y)
    assert np.array_equal(answers[:, :4], decoder[1](x.at[:, 4:].add(1), y.at[:, 3:].add(1))[:, :4])
    assert np.all(answers[:, 3] != decoder[1](x.at[:, 3].add(1), y)[:, 3])
    assert np.all(answers[:, 3] != decoder[1](x, y.at[:, 2].add(1))[:, 3])


def test_the_query_is_the_last_point_and_padding_changes_nothing(prompts, decoder):
    params, _ = decoder
    assert isinstance(DECODER, Predicts)

    @jax.jit
    def run(batch):
        out = DECODER.loss(params, {}, batch, key=KEY, train=True)
        return out.loss, out.weight, out.metrics, DECODER.predict(params, {}, batch, key=KEY)

    loss, weight, metrics, answer = run(prompts)
    other = run({**prompts, "y_q": prompts["y_q"] + 5})
    np.testing.assert_array_equal(other[3], answer)  # it does not see its own label
    assert weight == 4 * 6 and other[0] > loss
    relative = ((answer - prompts["y_q"]) ** 2).sum() / (prompts["y_q"] ** 2).sum()
    np.testing.assert_allclose(metrics["relative_error"].value(), relative, rtol=1e-5)
    padded = {k: jnp.concatenate([v, jnp.full_like(v[:2], 7.0)]) for k, v in prompts.items()}
    padded["weight"] = jnp.asarray([1.0] * 4 + [0.0] * 2)
    longer = run(padded)
    np.testing.assert_allclose(longer[0], loss, rtol=1e-6)
    assert longer[1] == weight
    np.testing.assert_allclose(longer[2]["relative_error"].value(), relative, rtol=1e-5)


def test_a_prompt_longer_than_the_table_is_refused(decoder):
    with pytest.raises(ConfigError, match=r"length=12: shorter than a sequence of 14"):
        decoder[1](jnp.zeros((1, 7, 3)), jnp.zeros((1, 7)))


def test_decoder_takes_the_same_step_on_eight_devices(one_device):
    # Not Muon: it would blow up the rounding of gradients that are 0, like those of key biases.
    small = {"steps": 1, "batch_size": 8, "model__width": 16, "model__depth": 1, "data__N": 4}
    recipe = jaxformer.load("linear_icl:nonlinear", optim__name="sgd", **small)
    recipe = dataclasses.replace(recipe, evaluators=[])
    meshes = one_device, make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    states = [jax.device_get(fit(recipe, mesh=m, options=QUIET).params) for m in meshes]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), *states)


# What is refused.


@pytest.mark.parametrize(
    ("spec", "overrides", "says"),
    [
        ("tiny", {"experiment": "sgd"}, "experiment='sgd': must be one of prompts, flow"),
        ("tiny", {"data__covariance": "none"}, "data.covariance='none': must be one of fixed"),
        ("tiny", {"data__N": 0}, "N: 0 examples"),
        ("tiny", {"data__diagonal": (1.0, -1.0)}, "Lambda: not symmetric positive definite"),
        ("flow", {"model__width": 8}, "no field 'width'"),
        ("nonlinear", {"model__sigma": 0.1}, "no field 'sigma'"),
    ],
)
def test_a_wrong_config_is_named(spec, overrides, says):
    with pytest.raises(ConfigError, match=says):
        jaxformer.load(f"linear_icl:{spec}", **overrides)
