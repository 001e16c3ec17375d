"""DSFormer: identities that must hold, and errors that must be clear of layers in a model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer import paths
from jaxformer.compress import factored
from jaxformer.compress.factored import STATE, Factored, StraightThrough, Table
from jaxformer.compress.factors import FactorSpec, cut, size_of
from jaxformer.compress.intercepted import Intercepted
from jaxformer.compress.matrix import from_matrix
from jaxformer.models.encoder import token_classifier
from jaxformer.models.transformer import Transformer
from jaxformer.observe.metrics import read_jsonl
from jaxformer.papers.dsformer import model
from jaxformer.papers.dsformer.model import FactorisedTask, Method, exported
from jaxformer.recipe import ConfigError
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.tasks.distill import TEACHER
from jaxformer.tasks.linen import Answer
from jaxformer.tasks.regress import RegressTask
from jaxformer.train.fit import FitOptions, fit
from tests.papers import text_files

KEY = jax.random.key(0)
TABLE = model.table_of(8, 6, 2, 6, 3, None)
LAYERS = ("mixer/query", "mixer/key", "mixer/value", "mixer/out", "mlp/up", "mlp/down")


@functools.cache
def encoder():
    """A dense model, its parameters and a batch."""
    trunk = Transformer(width=16, depth=1, heads=2, hidden=32)
    plain = token_classifier(trunk, vocabulary=12, length=6, classes=3)
    tokens = jax.random.randint(KEY, (4, 6), 0, 12)
    batch = {"inputs": tokens, "label": jnp.asarray([0, 1, 2, 0])}
    return plain, jax.jit(plain.init)(KEY, tokens)["params"], batch


@functools.cache
def factorised(name, table=TABLE, **fields):
    """A method, its model, parameters and state."""
    plain, params, _ = encoder()
    method = Method(name, table, rounds=2, **fields)
    new, state = method.enter(params, KEY)
    return method, method.model(plain), new, state


@functools.partial(jax.jit, static_argnums=(0, 3))
def forward(found, params, state, mutable=False):
    collections = {"params": params, **({STATE: state} if state else {})}
    inputs = encoder()[2]["inputs"]
    if mutable:
        return found.apply(collections, inputs, train=True, mutable=[STATE])
    return found.apply(collections, inputs)


# -------------------------------------------------------------------------------- one function


def test_stored_factors_are_what_was_trained():
    """`weight` and `coef` as factors answer as they do, by gathering instead of by matrices."""
    plain, _, _ = encoder()
    stored = Intercepted(plain, (Factored(TABLE),))
    for name in ("weight", "coef"):
        method, found, params, state = factorised(name)
        y = forward(found, params, state)
        extra = {STATE: state} if state else {}
        new, new_state = exported(method, params, extra)
        np.testing.assert_allclose(forward(stored, new, new_state), y, atol=1e-5)
        kernels = [n for n in paths.leaves(new) if "block" in n]
        assert not [n for n in kernels if n.endswith("kernel")]


def test_all_methods_begin_at_the_same_factors():
    y = [forward(*factorised(name)[1:]) for name in ("weight", "frozen", "coef")]
    np.testing.assert_allclose(y[1], y[0], atol=1e-5)
    np.testing.assert_allclose(y[2], y[0], atol=1e-5)


def test_s_equal_to_r_at_full_width_is_the_dense_model():
    full = Table(((r"", FactorSpec(8, 8, 8)),))
    plain, params, _ = encoder()
    wanted = forward(plain, params, {})
    for name in ("weight", "frozen", "coef"):
        found = factorised(name, full)[1:]
        np.testing.assert_allclose(forward(*found), wanted, atol=1e-4)


# ------------------------------------------------------------------------------ straight through


def test_the_gradient_of_w_is_that_of_its_factors_to_the_bit():
    """At one layer whose input and cotangent are the same: dL/dW = dL/dW^."""
    _, found, params, state = factorised("weight")
    plain, _, batch = encoder()
    inner = ClassifyTask(plain)

    def materialised(params):
        named = dict(paths.leaves(params))
        for path, (spec, w) in TABLE.chosen(params).items():
            own = paths.leaves(state)
            values = jax.vmap(factored.refit)(
                cut(w, spec), own[f"{path}/basis"], own[f"{path}/indices"]
            )
            factors = factored.Factors(own[f"{path}/basis"], values, own[f"{path}/indices"])
            w = factored.materialise(factors, w.shape[0])
            name = f"{path}/kernel"
            named[name] = from_matrix(name, w, named[name].shape)
        return paths.nest(named)

    def loss(task, params, extra):
        return task.loss(params, extra, batch, key=KEY, train=False).loss

    through = jax.jit(jax.grad(lambda p: loss(ClassifyTask(found), p, {STATE: state})))(params)
    direct = jax.jit(jax.grad(lambda p: loss(inner, p, {})))(jax.jit(materialised)(params))
    for name, x in paths.leaves(through).items():
        np.testing.assert_allclose(x, paths.leaves(direct)[name], rtol=1e-4, atol=1e-6)
        assert np.any(np.asarray(x)) or name.endswith("key/bias")


def test_straight_through_is_the_identity_for_gradients_to_the_bit():
    w = jax.random.normal(KEY, (3, 4))
    cotangent = jax.random.normal(jax.random.key(1), (3, 4))
    gradient = jax.grad(lambda w: (factored.straight_through(jnp.round(w), w) * cotangent).sum())(w)
    np.testing.assert_array_equal(gradient, cotangent)


def test_supports_are_found_anew_every_so_many_steps():
    _, found, params, state = factorised("weight", every=2)
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(KEY, x.shape), params)
    name = f"{'encoder/stack/block_0/mlp/up'}/indices"
    first = forward(found, params, state, mutable=True)[1][STATE]
    assert (paths.leaves(first)[name] != paths.leaves(state)[name]).any()
    second = forward(found, params, first, mutable=True)[1][STATE]
    for leaf, x in paths.leaves(second).items():
        if not leaf.endswith("count"):
            np.testing.assert_array_equal(x, paths.leaves(first)[leaf])
    assert {int(x) for n, x in paths.leaves(second).items() if n.endswith("count")} == {2}
    # Evaluation changes nothing, and follows W on the support there is.
    np.testing.assert_array_equal(forward(found, params, second), forward(found, params, second))
    moved = jax.tree.map(lambda x: x * 1.5, params)
    assert float(jnp.abs(forward(found, moved, second) - forward(found, params, second)).max()) > 0


def test_the_gradient_of_a_latent_reaches_all_of_it():
    _, found, params, state = factorised("coef")
    batch = encoder()[2]

    def loss(params):
        return ClassifyTask(found).loss(params, {}, batch, key=KEY, train=False).loss

    gradient = paths.leaves(jax.jit(jax.grad(loss))(params))
    latent = gradient["encoder/stack/block_0/mlp/down/latent"]
    assert (latent != 0).mean() > 0.9
    assert not state
    z = paths.leaves(params)["encoder/stack/block_0/mlp/down/latent"]
    basis = paths.leaves(params)["encoder/stack/block_0/mlp/down/basis"]
    before = factored.latent_support(z, basis, 2)
    after = factored.latent_support(z - 50.0 * latent, basis, 2)
    assert (jnp.sort(before, -1) != jnp.sort(after, -1)).any()


def test_frozen_supports_stay_and_all_else_is_trained():
    _, found, params, state = factorised("frozen")
    batch = encoder()[2]
    task = ClassifyTask(found)
    grad = jax.grad(lambda p: task.loss(p, {STATE: state}, batch, key=KEY, train=False).loss)
    named = paths.leaves(jax.jit(grad)(params))
    for layer in LAYERS:
        for part in ("basis", "values"):
            assert np.any(np.asarray(named[f"encoder/stack/block_0/{layer}/{part}"]))
    assert set(paths.leaves(state)) == {f"encoder/stack/block_0/{x}/indices" for x in LAYERS}


# -------------------------------------------------------------------------------------- accounts


def test_layers_are_counted_one_by_one():
    params = encoder()[1]
    found = model.accounts(params, TABLE)
    assert set(found) == {f"encoder/stack/block_0/{x}" for x in LAYERS}
    up, square = found["encoder/stack/block_0/mlp/up"], found["encoder/stack/block_0/mixer/query"]
    assert up.values == 2 * (6 * 8 + 32 * 3) and square.values == 2 * (6 * 8 + 16 * 2)
    assert up.index_bits == 2 * 32 * 3 * 3
    assert found["encoder/stack/block_0/mlp/down"] == size_of(FactorSpec(8, 6, 2), 16, 32)
    method, _, params, state = factorised("weight")
    stored = exported(method, params, {STATE: state})[0]
    kept = sum(x.size for n, x in paths.leaves(stored).items() if n.endswith(("basis", "values")))
    assert kept == sum(size.values for size in found.values())


def test_small_is_as_much_smaller_as_it_says():
    recipe = jaxformer.load("dsformer:small")
    params = jax.eval_shape(
        lambda: recipe.task.init(
            KEY, {k: jnp.zeros(v.shape, v.dtype) for k, v in recipe.phases[0].data.spec().items()}
        )
    )[0]
    table = recipe.task.factorised.model.interceptors[0].table
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), params)
    ratio = recipe.config["factor"]["ratio"]
    found = model.ratios(zeros, table, ratio)
    assert found["dense_sparse"] >= ratio and found["svd"] >= ratio


def test_thin_factors_are_an_arm():
    _, found, params, state = factorised("svd")
    assert not state and np.isfinite(forward(found, params, state)).all()
    left = paths.leaves(params)["encoder/stack/block_0/mlp/up/left"]
    assert left.shape == (32, int(32 * 16 / (2.8 * 48)))


def test_a_state_says_whether_it_is_factorised():
    plain, params, batch = encoder()
    _method, found, _, state = factorised("weight")
    task = FactorisedTask(ClassifyTask(plain), ClassifyTask(found))
    dense = task.predict(params, {}, batch, key=KEY)
    np.testing.assert_array_equal(dense, plain.apply({"params": params}, batch["inputs"]))
    assert task.of(params, {STATE: state}) is task.factorised
    assert task.of(factorised("svd")[2], {}) is task.factorised


def test_rows_are_weighted_by_a_scoring_phase():
    recipe = jaxformer.load("dsformer:tiny", factor__weighting="fisher", factor__score_steps=2)
    assert [phase.name for phase in recipe.phases] == ["dense", "score", "factorise"]
    data = recipe.phases[0].data
    rows = data.batch(0)
    params, extra = jax.jit(recipe.task.init)(KEY, rows)
    state = jaxformer.recipe.TrainState(jnp.zeros((), jnp.int32), params, extra, {}, KEY)
    state = jax.jit(recipe.phases[1].enter)(state)
    before = paths.leaves(state.extra["fisher"])
    assert not any(np.any(np.asarray(x)) for x in before.values())
    state, _ = jax.jit(recipe.phases[1].update)(state, rows)
    after = paths.leaves(state.extra["fisher"])
    up = after["encoder/stack/block_0/mlp/up/rows"]
    assert up.shape == (64,) and (up >= 0).all() and up.any()
    shapes = jax.eval_shape(recipe.phases[2].enter, state)
    assert set(shapes.extra) == {STATE}


def test_the_dense_model_may_teach_the_factors():
    """Half of the loss is T^2 times the cross-entropy of both at T = 2."""
    recipe = jaxformer.load("dsformer:tiny", factor__distill=0.5, factor__method="frozen")
    phase, rows = recipe.phases[1], recipe.phases[0].data.batch(0)
    params, extra = jax.jit(recipe.task.init)(KEY, rows)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), params)
    state = jaxformer.recipe.TrainState(jnp.zeros((), jnp.int32), params, extra, {}, KEY)
    dense = recipe.task.dense.predict(params, extra, rows, key=KEY)
    state = jax.jit(lambda state: phase.update.init(phase.enter(state)))(state)
    own = {STATE: state.extra[STATE]}
    student = recipe.task.factorised.predict(state.params, own, rows, key=KEY)
    hard = recipe.task.factorised.loss(state.params, own, rows, key=KEY, train=False).loss
    soft = -(jax.nn.softmax(dense / 2) * jax.nn.log_softmax(student / 2)).sum(-1).mean()
    after, metrics = jax.jit(phase.update)(state, rows)
    np.testing.assert_allclose(metrics["loss"].value(), 0.5 * hard + 0.5 * 4 * soft, rtol=1e-4)
    kept = after.extra[TEACHER]["params"]
    jax.tree.map(np.testing.assert_array_equal, kept, params)
    found = recipe.task.predict(after.params, after.extra, rows, key=KEY)
    assert (found != student).any()  # factors are trained, and the teacher is in nobody's way


def test_scores_are_taught_by_their_distance():
    recipe = jaxformer.load("dsformer:tiny", data__task="sts-b", factor__distill=0.5)
    task = recipe.phases[1].update.task
    one, other = (Answer(jnp.asarray(y), {}, {}) for y in ([[1.0], [4.0]], [[3.0], [4.5]]))
    (_, weight, term), label = task.terms[0], task.label
    np.testing.assert_array_equal(term(one, other), [4.0, 0.25])
    assert weight == label == 0.5


# -------------------------------------------------------------------------------------- mistakes


def stateless():
    _, found, params, _ = factorised("weight")
    return forward(found, params, None)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: Method("sparse", TABLE), r"factor\.method='sparse': must be one of weight"),
        (
            lambda: factorised("weight", Table(((r"", FactorSpec(5, 4, 2)),))),
            r"block_0/mixer/.*: columns=5 must divide its 16 inputs",
        ),
        (
            lambda: factorised("weight", Table(((r"", FactorSpec(8, 4, 5)),))),
            r"block_0/.*: nonzeros=5 must be from 1 to the atoms=4",
        ),
        (
            lambda: factorised("weight", Table(((r"/up$", FactorSpec(8, 4, 2)),))),
            r"block_0/.*: is to be factorised, and no pattern",
        ),
        (lambda: factorised("svd", ratio=500.0), r"ratio=500\.0: is out of reach"),
        (stateless, r"block_0/mixer/query: the state has no factors/"),
        (
            lambda: exported(Method("weight", TABLE), encoder()[1], {}),
            r"block_0/.*: the state has no factors",
        ),
        (
            lambda: jaxformer.load("dsformer:tiny", init_from="runs/x"),
            r"config\.dense_steps=60: .* give 0",
        ),
        (
            lambda: jaxformer.load("dsformer:tiny", factor__distill=1.5),
            r"factor\.distill=1\.5: must be from 0 to 1",
        ),
        (
            lambda: jaxformer.load("dsformer:tiny", factor__distill=1, factor__temperature=0),
            r"Softened\.temperature=0\.0: must be over 0",
        ),
        (
            lambda: jaxformer.load("dsformer:tiny", factor__weighting="all"),
            r"factor\.weighting='all': must be one of none, fisher",
        ),
        (
            lambda: StraightThrough(dataclasses.replace(TABLE, layers="nothing")).table.chosen(
                encoder()[1]
            ),
            r"no layer fits 'nothing'",
        ),
    ],
)
def test_mistakes_are_named(act, said):
    with pytest.raises(ConfigError, match=said):
        act()


# --------------------------------------------------------------------------------- real layouts


def test_questions_of_squad_are_answered_from_factors(tmp_path, one_device):
    """A few questions, some with more windows than one, by heart; dense, then factorised."""
    fields = text_files.squad(tmp_path)
    recipe = jaxformer.load("dsformer:tiny", dense_steps=30, steps=20, batch_size=8, **fields)
    windows = recipe.evaluators[0].whole.source.windows
    assert len(windows) > 6
    options = FitOptions(progress=False, log_every=50)
    fit(recipe, workdir=tmp_path / "run", mesh=one_device, options=options)
    rows = [row for row in read_jsonl(tmp_path / "run/metrics.jsonl") if "test/exact" in row]
    assert [row["phase"] for row in rows] == ["dense", "factorise"]
    assert all(row["test/exact"] == row["test/f1"] == 1 for row in rows)
    guess = recipe.evaluators[0].whole({"answer": np.zeros((len(windows), 2, 20))})
    assert guess["exact"] < 0.5


def test_scores_of_sts_b_are_regressed():
    recipe = jaxformer.load("dsformer:tiny", data__task="sts-b")
    assert isinstance(recipe.task.dense, RegressTask)
    assert isinstance(recipe.task.factorised, RegressTask)
    assert recipe.task.dense.model.classes == 1
    assert recipe.evaluators[0].whole.names == ("pearson", "spearman")
