"""Priors draw what they say; exact inference equals the formula and scikit-learn."""

import jax
import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor, kernels

from jaxformer.data.base import DeviceData
from jaxformer.papers.pfn import classification, exact, priors
from jaxformer.recipe import ConfigError

GP = priors.GP(2, outputscale=1.3, lengthscale=np.array([0.3, 0.7]), noise=0.02)


def drawn(prior, T, rows, context=priors.fixed(0), step=0):  # noqa: B008 (pure)
    data = DeviceData(priors.DataSets(prior, T, context), rows)
    return jax.tree.map(np.asarray, jax.jit(data.draw)(data.batch(step)))


def test_gp_draws_have_the_covariance_of_the_kernel():
    """On an equidistant grid all draws share their covariance."""
    gp = priors.GP(1, priors.matern52, 1.5, 0.4, 0.1, equidistant=True)
    batch = drawn(gp, 6, 20_000)
    expected = exact.gram(gp, batch["x"][0], batch["x"][0]) + gp.noise_variance * np.eye(6)
    # A covariance of 20,000 normals has a standard error of at most 1.6 * sqrt(2 / 20,000).
    np.testing.assert_allclose(np.cov(batch["y"].T), expected, atol=5 * 0.016)
    np.testing.assert_array_equal(batch["y"], batch["target"])


def test_factors_by_columns_are_cholesky_factors():
    x = np.random.default_rng(0).normal(size=(30, 12))
    gram = np.float32(x.T @ x / 30)
    factor = jax.jit(priors.factor_by_columns)(gram)
    np.testing.assert_allclose(factor, np.linalg.cholesky(gram), atol=1e-5)


def test_context_lengths_are_shared_and_follow_their_law():
    for law, p in (
        (priors.weighted(5), 1 / (5 - np.arange(5))),
        (priors.uniform(5), np.ones(5)),
    ):
        n = np.asarray(jax.vmap(law)(jax.random.split(jax.random.key(0), 20_000)))
        np.testing.assert_allclose(np.bincount(n, minlength=5) / 20_000, p / p.sum(), atol=0.015)
    batches = [drawn(priors.Ridge(), 4, 6, priors.uniform(100), step) for step in range(3)]
    assert all(len(set(batch["n"].tolist())) == 1 for batch in batches)
    assert len({int(batch["n"][0]) for batch in batches}) > 1


def test_ridge_scores_the_noise_free_value():
    batch = drawn(priors.Ridge(2), 30, 200)
    noise = batch["y"] - batch["target"]
    assert noise.std() == pytest.approx(0.1, rel=0.05)
    w, *_ = np.linalg.lstsq(batch["x"][0], batch["target"][0])
    np.testing.assert_allclose(batch["x"][0] @ w, batch["target"][0], atol=1e-5)


def test_hyperparameters_follow_their_laws():
    hyper = priors.HyperGP(3)
    numbers = np.asarray(jax.vmap(hyper.hyper)(jax.random.split(jax.random.key(0), 20_000)))
    np.testing.assert_allclose(numbers.mean(0), [a / rate for a, rate in hyper.laws], rtol=0.05)
    assert numbers.shape == (20_000, 5) and numbers[:, 1].min() >= 1e-4


def test_outputs_can_be_mapped_and_kept_within_a_range():
    batch = drawn(priors.Mapped(priors.Within(priors.Ridge(1), -0.2, 0.2), priors.min_max), 8, 50)
    assert (batch["y"].min(1) == 0).all() and (batch["y"].max(1) > 0.999).all()
    batch = drawn(priors.Within(priors.Ridge(1), -0.2, 0.2), 8, 50)
    assert np.abs(batch["y"]).max() <= 0.2 and batch["y"].std() > 0.05


def test_bnn_classes_follow_a_linear_rule():
    batch = drawn(classification.BNN(2, hidden=64), 300, 8)
    assert set(np.unique(batch["y"])) == {0, 1}
    np.testing.assert_allclose(batch["x"].mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(batch["x"].std(1, ddof=1), 1, atol=1e-4)
    # Most labels of a data set lie on one side of a plane.
    x, sign = batch["x"], 2 * batch["y"] - 1
    design = np.concatenate([x, np.ones((8, 300, 1))], -1)
    hits = [
        np.mean(np.sign(d @ np.linalg.lstsq(d, s)[0]) == s)
        for d, s in zip(design, sign, strict=True)
    ]
    assert np.mean(hits) > 0.85


@pytest.fixture(scope="module")
def tables():
    return drawn(classification.Tabular(features=9), 60, 200)


def test_tables_are_balanced_padded_and_standardised(tables):
    gp = drawn(classification.tabular_gp(9), 20, 100)
    for batch in (tables, gp):
        # Labels alternate, so that every context of even size is balanced.
        assert (batch["y"][:, ::2] != batch["y"][:, 1::2]).all()
        used = (batch["x"] != 0).any(1)
        count = used.sum(-1)
        assert count.min() == 2 and count.max() == 9
        assert (used == (np.arange(9) < count[:, None])).all()
        scale = (count / 9)[:, None] if batch is gp else 1
        np.testing.assert_allclose((batch["x"].std(1, ddof=1) * scale)[used], 1, atol=1e-3)


def test_tables_can_be_learned(tables):
    """Neighbours in one half tell the labels of the other better than chance."""
    right = []
    for x, y in zip(tables["x"], tables["y"], strict=True):
        d = np.square(x[:40, None] - x[None, 40:]).sum(-1)
        votes = y[:40][np.argsort(d, 0)[:7]].mean(0)
        right.append(np.mean((votes > 0.5) == y[40:]))
    # 4,000 rows that are no better than chance reach 0.54 less than once in a million.
    assert np.mean(right) > 0.6


def test_strokes_are_images_of_their_class():
    batch = drawn(classification.Strokes(), 26, 20)
    y, x = batch["y"], batch["x"]
    assert (np.stack([(y[:, :25] == c).sum(1) for c in range(5)]) == 5).all()
    assert x.min() >= 0 and x.max() <= 1 and ((x > 0.5).sum(-1) > 3).mean() > 0.95
    d = np.square(x[:, :, None] - x[:, None]).mean(-1)
    same, other = y[:, :, None] == y[:, None], ~np.eye(26, dtype=bool)
    assert d[same & other].mean() < 0.9 * d[~same].mean()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: priors.weighted(0), "data.limit: 0"),
        (lambda: priors.GP(2, equidistant=True), "data.prior.features: 2"),
        (
            lambda: classification.Tabular()(jax.random.key(0), 21),
            "data.T: 21; classes can only alternate",
        ),
        (
            lambda: classification.Strokes()(jax.random.key(0), 20),
            "data.T: 20; 5 shots of 5 classes",
        ),
    ],
)
def test_wrong_sizes_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# Exact inference.


@pytest.fixture(scope="module")
def sets():
    rng = np.random.default_rng(0)
    x, x_q = rng.uniform(size=(3, 12, 2)), rng.uniform(size=(3, 5, 2))
    return x, rng.normal(size=(3, 12)), x_q, rng.normal(size=(3, 5))


@pytest.mark.parametrize("shape", [priors.rbf, priors.matern52])
def test_exact_inference_equals_the_formula_and_scikit_learn(sets, shape):
    x, y, x_q, y_q = sets
    gp = priors.GP(2, shape, 1.3, np.array([0.3, 0.7]), 0.02, jitter=0.0)
    mean, variance = exact.predict(gp, x, y, x_q)
    kernel = kernels.RBF([0.3, 0.7]) if shape is priors.rbf else kernels.Matern([0.3, 0.7], nu=2.5)
    kernel = 1.3 * kernel + kernels.WhiteKernel(0.02)
    for i in range(3):
        theirs = GaussianProcessRegressor(kernel, optimizer=None, alpha=0.0).fit(x[i], y[i])
        m, s = theirs.predict(x_q[i], return_std=True)
        np.testing.assert_allclose(mean[i], m, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(variance[i], s**2, rtol=1e-9)
        evidence = theirs.log_marginal_likelihood_value_
        np.testing.assert_allclose(exact.log_evidence(gp, x[i], y[i]), evidence, rtol=1e-9)
    K = exact.gram(gp, x, x) + 0.02 * np.eye(12)
    k = exact.gram(gp, x, x_q)
    direct = np.einsum("bnm,bnk,bk->bm", k, np.linalg.inv(K), y)
    np.testing.assert_allclose(mean, direct, rtol=1e-6, atol=1e-6)
    loss = -np.log(np.exp(-((y_q - mean) ** 2) / 2 / variance) / np.sqrt(2 * np.pi * variance))
    np.testing.assert_allclose(exact.nll(gp, x, y, x_q, y_q), loss, rtol=1e-9)


def test_without_context_it_is_the_prior():
    mean, variance = exact.predict(GP, np.zeros((0, 2)), np.zeros(0), np.ones((3, 2)))
    np.testing.assert_allclose(mean, 0)
    np.testing.assert_allclose(variance, 1.32, rtol=1e-5)


def test_hyperparameters_are_fitted_and_averaged():
    """Both come close to the truth from 40 rows."""
    truth = priors.GP(1, priors.matern52, 2.0, np.array([0.3]), 0.05)
    batch = drawn(truth, 60, 12)
    x, y = np.float64(batch["x"]), np.float64(batch["y"])
    ends = x[:, :40], y[:, :40], x[:, 40:], y[:, 40:]
    hyper = priors.HyperGP(1)
    best = exact.nll(truth, *ends).mean()
    fitted = [
        exact.nll(exact.fit(hyper, a, b), a, b, c, d) for a, b, c, d in zip(*ends, strict=True)
    ]
    numbers = jax.vmap(hyper.hyper)(jax.random.split(jax.random.key(1), 1000))
    some = [hyper.gp(row) for row in np.asarray(numbers)]
    averaged = exact.averaged_nll(some, *ends).mean()
    assert best < np.mean(fitted) < best + 0.2
    assert best < averaged < best + 0.2
    one = exact.averaged_nll(some[:1], *ends)
    np.testing.assert_allclose(one, exact.nll(some[0], *ends))
