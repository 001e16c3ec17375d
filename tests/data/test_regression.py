"""Prompts of in-context regression have the law they name."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.data.base import DeviceData
from jaxformer.data.sources import regression

LAMBDA = np.array([[1.0, 0.3, 0], [0.3, 0.5, 0], [0, 0, 2.0]])


def draw(rows=4000, seed=0, **parts):
    prompts = regression.Prompts(8, **{"covariance": regression.fixed_covariance(LAMBDA), **parts})
    data = DeviceData(prompts, rows, seed)
    return data.draw(data.batch(0))


@pytest.fixture(scope="module")
def batch():
    return draw()


def test_inputs_and_query_have_the_covariance(batch):
    x, x_q = batch["x"].reshape(-1, 3), batch["x_q"]
    assert batch["x"].shape == (4000, 8, 3) and batch["y"].shape == (4000, 8)
    np.testing.assert_allclose(np.cov(x.T), LAMBDA, atol=0.05)  # 32,000 draws: sd <= 0.016
    np.testing.assert_allclose(np.cov(x_q.T), LAMBDA, atol=0.2)  # 4,000 draws: sd <= 0.045


def test_one_standard_normal_task_answers_examples_and_query(batch):
    w = np.stack([np.linalg.lstsq(x, y)[0] for x, y in zip(batch["x"], batch["y"], strict=True)])
    np.testing.assert_allclose(np.sum(w * batch["x_q"], -1), batch["y_q"], atol=1e-3)
    np.testing.assert_allclose(np.cov(w.T), np.eye(3), atol=0.1)


def test_noise_falls_on_examples_and_query():
    batch = draw(task=regression.fixed_task((0.0, 0.0, 0.0)), labels=regression.noisy_labels(0.5))
    for y in (batch["y"], batch["y_q"]):
        np.testing.assert_allclose(jnp.std(y), 0.5, rtol=0.05)


def test_random_covariances_are_new_in_every_prompt():
    batch = draw(covariance=regression.random_diagonal_covariance(3))
    power = jnp.mean(batch["x"] ** 2, axis=1)  # (prompts, d): estimates of the diagonal
    # Exponential(1) entries: E = 1; Var = Var(l) + E[2 l^2] / 8 = 1.5, against 0.25 if l were 1.
    np.testing.assert_allclose(power.mean(0), 1, atol=0.1)
    np.testing.assert_allclose(power.var(0), 1.5, atol=0.4)
