"""Identities of PFNs: what an answer may depend on, and that two calls give what one gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn.base import clone
from sklearn.model_selection import cross_val_score

import jaxformer
from jaxformer import paths
from jaxformer.config import presets
from jaxformer.data.base import DeviceData
from jaxformer.models.transformer import Transformer
from jaxformer.papers.pfn import priors
from jaxformer.papers.pfn.criteria import Bars, Binary, Categorical, Gaussian
from jaxformer.papers.pfn.estimators import PFNClassifier, PFNRegressor, Pretrained
from jaxformer.papers.pfn.model import answer, read_context, set_transformer
from jaxformer.papers.pfn.recipe import scaling_law_rate
from jaxformer.papers.pfn.task import PFNTask
from jaxformer.recipe import ConfigError
from jaxformer.tasks import linen
from jaxformer.train.fit import FitOptions, fit

SIZES = {"width": 16, "heads": 2, "hidden": 24, "order": "post", "position": "none"}
TRUNK, SHALLOW = Transformer(depth=2, **SIZES), Transformer(depth=1, **SIZES)
B, T, F = 2, 9, 3
N = jnp.asarray([4, 6])
MODEL = set_transformer(TRUNK, outputs=5)


def drawn(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


X, Y = drawn((B, T, F)), drawn((B, T), 1)


@functools.cache
def weights(model, integers=False, features=F):
    """Every leaf drawn, so that no branch is zero."""
    x, y = jnp.zeros((1, T, features)), jnp.zeros((1, T), jnp.int32 if integers else jnp.float32)
    shapes = jax.eval_shape(lambda: linen.init(model, jax.random.key(0), x, y, N[:1])[0])
    leaves, structure = jax.tree.flatten(shapes)
    generator = np.random.default_rng(0)
    return structure.unflatten([np.float32(generator.normal(0, 0.4, x.shape)) for x in leaves])


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, x, y, n):
    return model.apply({"params": params}, x, y, n)


def outputs(x=X, y=Y, n=N, model=MODEL):
    return apply(model, weights(model), x, y, n)


def assert_close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


# What an answer may depend on.


def test_context_is_a_set():
    order = jnp.asarray([2, 0, 3, 1, *range(4, T)])
    n = jnp.full(B, 4)
    before, after = outputs(n=n), outputs(X[:, order], Y[:, order], n)
    assert_close(after[:, 4:], before[:, 4:])
    # It is used: other labels of the context change the answers.
    assert np.abs(outputs(y=Y + 1, n=n)[:, 4:] - before[:, 4:]).max() > 1e-2


def test_queries_move_with_their_order_and_do_not_see_each_other():
    order = jnp.asarray([0, 1, 2, 3, 8, 6, 4, 7, 5])
    n = jnp.full(B, 4)
    before = outputs(n=n)
    assert_close(outputs(X[:, order], Y[:, order], n), before[:, order])
    others = outputs(X.at[:, 5:].set(7.0), n=n)
    assert_close(others[:, :5], before[:, :5])
    assert_close(outputs(X[:, :5], Y[:, :5], n)[:, 4], before[:, 4])


def test_no_label_of_a_query_leaks():
    is_query = jnp.arange(T) >= N[:, None]

    def total(y, params):
        found = apply(MODEL, params, X, y, N)
        return jnp.where(is_query[..., None], jnp.sin(found), 0).sum()

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))
    by_y, by_params = gradients(Y, weights(MODEL))
    assert (by_y[is_query] == 0).all() and np.abs(by_y[~is_query]).min() > 0
    # Not even NaN is seen, forwards or backwards.
    unknown = jnp.where(is_query, jnp.nan, Y)
    assert_close(outputs(y=unknown), outputs())
    jax.tree.map(assert_close, gradients(unknown, weights(MODEL))[1], by_params)


def test_without_context_only_x_matters():
    n = jnp.zeros(B, jnp.int32)
    found = outputs(n=n)
    assert_close(outputs(y=-5 * Y, n=n), found)
    assert_close(outputs(X[:, :1], Y[:, :1], n), found[:, :1])


@pytest.mark.parametrize("query_attends_self", [True, False])
def test_two_calls_give_what_one_gives(query_attends_self):
    """With a padded context of another length in each row, and queries in two lots."""
    model = set_transformer(TRUNK, outputs=5, query_attends_self=query_attends_self)
    params = weights(model)
    whole = outputs(model=model)
    x_q = jnp.stack([X[b, 6:] for b in range(B)])

    @jax.jit
    def calls(x, y):
        cache = read_context(model, params, x, y, N, queries=2)
        lots = [x_q[:, :2], x_q[:, 2:], x_q[:, 1:]]
        return [answer(model, params, cache, lot, N) for lot in lots]

    padded = jnp.where((jnp.arange(6) < N[:, None]), Y[:, :6], 99.0)
    first, last, again = calls(X[:, :6], padded)
    assert_close(jnp.concatenate([first, last], 1), whole[:, 6:])
    assert_close(again[:, 1], last[:, 0])


def test_a_query_may_see_itself():
    other = set_transformer(TRUNK, outputs=5, query_attends_self=False)
    found = apply(other, weights(MODEL), X, Y, N)
    assert np.abs(found - outputs()).max() > 1e-3
    first = jnp.arange(T) < N[:, None]
    assert_close(jnp.where(first[..., None], found - outputs(), 0), 0)


def test_parts_read_labels_and_unit_inputs():
    model = set_transformer(SHALLOW, outputs=3, classes=3, unit_inputs=True)
    params = weights(model, True)
    labels = jnp.arange(B * T).reshape(B, T) % 3
    plain = set_transformer(SHALLOW, outputs=3, classes=3)
    bare = {**params, "x_encoder": params["x_encoder"]["encoder"]}
    scaled = (X - 0.5) * 12**0.5
    assert_close(apply(model, params, X, labels, N), apply(plain, bare, scaled, labels, N))
    assert params["y_encoder"]["table"].shape == (3, 16)


def test_bfloat16_reads_inputs_in_full():
    model = set_transformer(dataclasses.replace(SHALLOW, dtype="bfloat16"), outputs=5)
    found = apply(model, weights(model), X, Y, N)
    assert found.dtype == jnp.float32
    # bfloat16 cannot tell 1 from 1.001: the encoder must see them before they are rounded.
    encoder = {"kernel": 1000 * jnp.eye(F, 16), "bias": jnp.full(16, -1000.0)}
    x = jnp.ones((B, T, F)).at[:, 1].add(1e-3)
    near = apply(model, {**weights(model), "x_encoder": encoder}, x, Y, 0 * N)
    assert np.abs(near[0, 0] - near[0, 1]).max() > 1e-3


# The objective.


def bars_task():
    return PFNTask(MODEL, Bars(5, priors.GP(F, outputscale=1.0, lengthscale=0.5, noise=0.1), 1000))


@pytest.fixture(scope="module")
def gp_batch():
    rows = priors.DataSets(bars_task().criterion.prior, T, priors.uniform(6))
    data = DeviceData(rows, 8)
    return jax.jit(data.draw)(data.batch(3))


def test_the_loss_is_the_mean_over_queries(gp_batch):
    task = bars_task()
    extra = {"borders": jnp.linspace(-2, 2, 6)}
    traces = []

    @jax.jit
    def loss(batch):
        traces.append(1)
        return task.loss(weights(MODEL), extra, batch, key=jax.random.key(0), train=True)

    bars = task.criterion.distribution(extra)
    for n in (0, 3, T - 1):
        batch = {**gp_batch, "n": jnp.full(8, n)}
        found = loss(batch)
        logits = apply(MODEL, weights(MODEL), batch["x"], batch["y"], batch["n"])
        nll = np.asarray(jax.jit(bars.nll)(logits, batch["target"]))[:, n:]
        np.testing.assert_allclose(found.loss, nll.mean(), rtol=1e-5)
        assert found.weight == 8 * (T - n)
    assert len(traces) == 1, "one compilation serves every n"


def test_training_starts_from_norms_alone(gp_batch):
    """At first no branch adds anything: answers depend on the query's own x."""
    task = bars_task()
    params, _ = jax.jit(task.init)(jax.random.key(0), gp_batch)
    x, y, n = (gp_batch[name] for name in ("x", "y", "n"))
    assert_close(*(apply(MODEL, params, x, labels, n)[:, 6:] for labels in (y, y + 5)))
    zero = {name for name, leaf in paths.leaves(params).items() if not leaf.any()}
    assert {"stack/block_0/mixer/out/kernel", "stack/block_1/mlp/down/bias"} <= zero
    assert not any(
        name.endswith("kernel") and "/out/" not in name and "/down/" not in name for name in zero
    )


def test_borders_are_drawn_from_the_prior_with_the_parameters():
    """Equal masses are then the prior predictive, N(0, 1.1)."""
    criterion = Bars(50, priors.GP(1, outputscale=1.0, lengthscale=0.3, noise=0.1))
    init = jax.jit(criterion.init)
    extra = init(jax.random.key(0))
    q = np.linspace(0.1, 0.9, 9)
    found = criterion.distribution(extra).icdf(jnp.zeros(50), jnp.asarray(q))
    # Targets of 2,500 functions: a quantile has a standard error of about 0.02.
    np.testing.assert_allclose(found, scipy.stats.norm(0, 1.1**0.5).ppf(q), atol=0.08)
    assert (extra["borders"] != init(jax.random.key(1))["borders"]).any()


def test_criteria_are_likelihoods():
    output, target = drawn((6, 4)), drawn((6,), 1)
    mean, variance = np.asarray(output[:, 0]), np.abs(np.asarray(output[:, 1]))
    nll = -scipy.stats.norm(mean, variance**0.5).logpdf(np.asarray(target))
    np.testing.assert_allclose(Gaussian().nll({}, output[:, :2], target), nll, rtol=1e-4)
    label = jnp.asarray([0, 1, 1, 0, 1, 0])
    p = 1 / (1 + np.exp(-np.asarray(output[:, 0])))
    nll = -np.log(np.where(label == 1, p, 1 - p))
    np.testing.assert_allclose(Binary().nll({}, output[:, :1], label), nll, rtol=1e-4)
    nll = -jax.nn.log_softmax(output)[jnp.arange(6), label]
    np.testing.assert_allclose(Categorical(4).nll({}, output, label), nll, rtol=1e-4)


# The recipe.


@pytest.mark.parametrize("preset", presets("pfn"))
def test_every_preset_has_a_loss(preset):
    recipe = jaxformer.load(f"pfn:{preset}")
    data, task = recipe.phases[0].data, recipe.task

    def loss(address):
        batch = data.draw(address)
        params, extra = task.init(jax.random.key(0), batch)
        return task.loss(params, extra, batch, key=jax.random.key(0), train=False).loss

    address = {name: x[:2] for name, x in data.batch(0, slice(0, 2)).items()}
    assert jax.eval_shape(loss, address).shape == ()


def test_a_rate_of_zero_is_the_authors_rule():
    recipe = jaxformer.load("pfn:tiny", optim__learning_rate=0.0, optim__schedule="constant")
    data, task = recipe.phases[0].data, recipe.task
    rate = scaling_law_rate(task, data)
    parameters = 20_000  # of `tiny`, more or less
    assert rate == pytest.approx(0.003239 - 0.0001395 * np.log(parameters), rel=0.02)
    schedule = recipe.phases[0].update.optimizer.schedule
    assert float(schedule(100)) == pytest.approx(rate, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__limit": 13}, "data.limit: 13 lets 12 of data.T=12 rows be context"),
        ({"data__prior": "gpp"}, "data.prior='gpp': must be one of"),
        ({"data__prior": "ridge"}, "data.arguments: do not fit data.prior='ridge'"),
        ({"data__context": "all"}, "data.context='all': must be one of"),
        ({"criterion__name": "mse"}, "criterion.name='mse': must be one of"),
        ({"model__heads": 5}, "model.heads=5: must divide the width 32"),
    ],
)
def test_wrong_configs_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        jaxformer.load("pfn:tiny", **overrides)


@pytest.mark.parametrize("n", [-1, T, T + 3])
def test_context_lengths_are_checked(n):
    with pytest.raises(ValueError, match=f"n: {n} rows of context; give from 0 to {T - 1}"):
        MODEL.apply({"params": weights(MODEL)}, X, Y, jnp.asarray([2, n]))


# Estimators.


@pytest.fixture(scope="module")
def pretrained():
    task = dataclasses.replace(bars_task(), model=set_transformer(SHALLOW, outputs=5))
    return Pretrained(task, weights(task.model), {"borders": jnp.linspace(-2, 2, 6)})


@pytest.fixture(scope="module")
def table():
    generator = np.random.default_rng(0)
    X = generator.normal(3.0, 5.0, size=(40, 2))
    return X, X[:, 0] - X[:, 1] > 0, X.sum(1)


@pytest.mark.slow
def test_regressor_is_one_call_on_prepared_rows(pretrained, table):
    x, _, y = table
    regressor = PFNRegressor(pretrained).fit(x[:30], y[:30])
    prepared = np.zeros((1, 40, F), np.float32)
    prepared[0, :, :2] = (x - x[:30].mean(0)) / (x[:30].std(0, ddof=1) + 1e-6)
    model, params = pretrained.task.model, pretrained.params
    logits = apply(model, params, prepared, jnp.asarray(y)[None], jnp.asarray([30]))[0, 30:]
    bars, found = regressor.predict_dist(x[30:])
    np.testing.assert_allclose(found, logits, atol=2e-5)
    mean, std = regressor.predict(x[30:], return_std=True)
    np.testing.assert_allclose(mean, bars.mean(logits), atol=1e-4)
    np.testing.assert_allclose(std, bars.variance(logits) ** 0.5, atol=1e-4)
    q = regressor.quantiles(x[30:], (0.2, 0.7))
    np.testing.assert_allclose(
        bars.cdf(logits[:, None], q), np.tile([0.2, 0.7], (10, 1)), atol=1e-4
    )
    many = np.repeat(x[30:], 13, axis=0)  # more rows than one call takes
    assert_close(regressor.predict(many), np.repeat(mean, 13))


def test_features_can_be_rescaled_or_left_alone(pretrained, table):
    x, _, y = table
    rescaled = PFNRegressor(pretrained, rescale=True).fit(x, y)
    by_hand = (x - x.mean(0)) / x.std(0, ddof=1) / (2 / F)
    plain = PFNRegressor(pretrained, standardize=False).fit(by_hand, y)
    np.testing.assert_allclose(rescaled.predict(x), plain.predict(by_hand), atol=1e-4)


def test_classifiers_give_chances_of_the_labels_they_saw(table):
    x, above, _ = table
    labels = np.where(above, "yes", "no")
    model = set_transformer(SHALLOW, outputs=1)
    binary = Pretrained(PFNTask(model, Binary()), weights(model), {})
    classifier = PFNClassifier(binary).fit(x, labels)
    chances = classifier.predict_proba(x)
    logit = classifier._outputs(x)[:, 0]
    np.testing.assert_allclose(chances[:, 1], jax.nn.sigmoid(logit), rtol=1e-5)
    assert list(classifier.classes_) == ["no", "yes"]
    assert (classifier.predict(x) == np.where(chances[:, 1] > 0.5, "yes", "no")).all()
    model = set_transformer(SHALLOW, outputs=4, classes=4)
    several = Pretrained(PFNTask(model, Categorical(4)), weights(model, True), {})
    chances = PFNClassifier(several).fit(x, np.arange(40) % 3).predict_proba(x)
    assert chances.shape == (40, 3)
    np.testing.assert_allclose(chances.sum(1), 1, rtol=1e-5)


def test_scikit_learn_can_handle_them(pretrained, table):
    x, _, y = table
    regressor = clone(PFNRegressor(pretrained))
    assert regressor.pretrained is pretrained
    assert np.isfinite(cross_val_score(regressor, x, y, cv=3)).all()
    assert regressor.set_params(rescale=True).get_params()["rescale"]


@pytest.mark.slow
def test_a_run_becomes_an_estimator(tmp_path, table, one_device):
    recipe = jaxformer.load("pfn:tiny", steps=1, model__depth=1, criterion__samples=320)
    recipe = dataclasses.replace(recipe, evaluators=[])
    state = fit(recipe, workdir=tmp_path, mesh=one_device, options=FitOptions(progress=False))
    found = Pretrained.from_run(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found.params, jax.device_get(state.params))
    np.testing.assert_array_equal(found.extra["borders"], state.extra["borders"])
    x, _, y = table
    assert np.isfinite(PFNRegressor(found).fit(x[:, :1], y).predict(x[:, :1])).all()


def test_wrong_rows_are_named(pretrained, table):
    x, above, y = table
    regressor = PFNRegressor(pretrained)
    with pytest.raises(ValueError, match="X: 4 features, but the model was trained with at most 3"):
        regressor.fit(np.tile(x, 2), y)
    with pytest.raises(ValueError, match="NaN"):
        regressor.fit(x, np.where(above, np.nan, y))
    with pytest.raises(ValueError, match="NaN"):
        regressor.fit(np.where(x > 0, np.nan, x), y)
    with pytest.raises(ValueError, match="X: 1 features; fit saw 2"):
        regressor.fit(x, y).predict(x[:, :1])
    with pytest.raises(ValueError, match="use PFNRegressor"):
        PFNClassifier(pretrained).fit(x, above)
    binary = Pretrained(
        PFNTask(set_transformer(SHALLOW, outputs=1), Binary()), pretrained.params, {}
    )
    with pytest.raises(ValueError, match="y: 3 classes; the model tells from 2 to 2"):
        PFNClassifier(binary).fit(x, np.arange(40) % 3)
    with pytest.raises(ValueError, match="use PFNClassifier"):
        PFNRegressor(binary).fit(x, y)
