"""BiViT: identities that must hold, and errors that must be clear."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer import paths
from jaxformer.compress.binary import BinaryEinsum, mean_scale
from jaxformer.compress.intercepted import Intercepted
from jaxformer.kernels.attention import Full
from jaxformer.models.swin import swin
from jaxformer.models.transformer import Transformer
from jaxformer.models.vit import vit
from jaxformer.nn.attention import Attention, Softmax, Unfused
from jaxformer.nn.einsum import Einsum
from jaxformer.nn.make import Make
from jaxformer.papers.bivit import experiments, model
from jaxformer.papers.bivit.model import (
    BinaryRows,
    OptimalRows,
    PositiveScores,
    SoftmaxAware,
    optimal_row_binarisation,
    row_scale,
)
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import ConfigError
from jaxformer.tasks.distill import TEACHER, DistillTask
from jaxformer.train.states import abstract_states, new_state

KEY = jax.random.key(0)
EQUATIONS = {"...D,DF->...F": (6,), "...D,DHK->...HK": (2, 3), "...HK,HKD->...D": (5,)}


def rows(deviation=2.5, shape=(50, 2, 9, 16)):
    p = deviation * jax.random.normal(KEY, shape)
    return p, jax.nn.softmax(p)


# ------------------------------------------------------------------------------------- weights


def layer_and_input(equation):
    shape = (4, 3, 8) if equation.startswith("...D") else (4, 3, 2, 4)
    x = jax.random.normal(jax.random.key(1), shape)
    layer = Einsum(equation, EQUATIONS[equation])
    return layer, x, layer.init(KEY, x)["params"]


def weights_used(layer, interceptor, params, x):
    """What takes the kernel's place."""
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Look:
        def __call__(self, method, args, kwargs, context):
            if context.method_name == "contract":
                seen.append(args)
            return method(*args, **kwargs)

    Intercepted(layer, (interceptor, Look())).apply({"params": params}, x)
    return seen[0]


@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_channel_has_two_weights(equation):
    layer, x, params = layer_and_input(equation)
    x_used, w, _ = weights_used(layer, BinaryEinsum("", learned=False), params, x)
    np.testing.assert_array_equal(x_used, jnp.sign(x))
    inputs = 1 if equation.startswith("...D") else 2
    channels = np.asarray(w).reshape(int(np.prod(w.shape[:inputs])), -1).T
    kernel = np.asarray(params["kernel"]).reshape(channels.shape[::-1]).T
    for values, weights in zip(channels, kernel, strict=True):
        scale = np.abs(weights).mean()
        np.testing.assert_allclose(values, scale * np.sign(weights - weights.mean()), rtol=1e-5)
        assert len(np.unique(np.abs(values))) == 1


def test_a_weight_that_is_its_channels_mean_gives_nothing():
    kernel = jnp.array([[1.0], [2.0], [3.0]])
    layer, x = Einsum("...D,DF->...F", (1,)), jnp.ones((1, 3))
    _, w, _ = weights_used(
        layer, BinaryEinsum("", learned=False), {"kernel": kernel, "bias": jnp.zeros(1)}, x
    )
    np.testing.assert_array_equal(w[:, 0], [-2, 0, 2])


def test_scaling_a_channel_scales_its_binary_weights():
    layer, x, params = layer_and_input("...D,DF->...F")
    factor = jnp.arange(1.0, 7.0)
    interceptor = BinaryEinsum("", learned=False)
    w = weights_used(layer, interceptor, params, x)[1]
    scaled = {**params, "kernel": params["kernel"] * factor}
    np.testing.assert_allclose(
        weights_used(layer, interceptor, scaled, x)[1], w * factor, rtol=1e-5
    )


@pytest.mark.parametrize("equation", EQUATIONS)
def test_learned_scales_start_as_the_plain_ones(equation):
    layer, x, params = layer_and_input(equation)
    trained = {**params, "kernel": 3 * params["kernel"] + 0.1}
    learned = Intercepted(layer, (BinaryEinsum(""),))
    completed, extra = learned.complete(KEY, trained, {}, x)
    assert not extra and completed["scale"].shape == params["bias"].shape
    plain = Intercepted(layer, (BinaryEinsum("", learned=False),))
    np.testing.assert_array_equal(
        learned.apply({"params": completed}, x), plain.apply({"params": trained}, x)
    )


def test_gradients_of_weights():
    """Through the sign where |centred| < 1, through the centring, and not through a plain scale."""
    layer = Einsum("...D,DF->...F", (3,), use_bias=False)
    kernel = 1.5 * jax.random.normal(KEY, (7, 3))
    x = jax.random.normal(jax.random.key(1), (5, 7))
    plain = Intercepted(layer, (BinaryEinsum("", binary_inputs=False, learned=False),))
    found = jax.grad(lambda k: plain.apply({"params": {"kernel": k}}, x).sum())(kernel)
    inside = np.abs(kernel - kernel.mean(0)) < 1
    assert 0 < inside.sum() < inside.size
    through = x.sum(0)[:, None] * mean_scale(kernel, layer.equation) * inside
    np.testing.assert_allclose(found, through - through.mean(0), rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------- rows of attention


def test_rows_have_their_largest_and_thresholds_follow_it():
    p, a = rows()
    mask = SoftmaxAware()(p, a)
    assert set(np.unique(mask)) == {0.0, 1.0}
    at_most = np.take_along_axis(np.asarray(mask), np.asarray(a.argmax(-1))[..., None], -1)
    assert (at_most == 1).all()
    np.testing.assert_array_equal(SoftmaxAware(1e-12)(p, a), np.ones_like(a))
    np.testing.assert_array_equal(SoftmaxAware(1.0)(p, a), a == a.max(-1, keepdims=True))
    tied = jnp.array([[0.4, 0.4, 0.1, 0.1]])  # the threshold itself is in: 0.1 = 0.25 * 0.4
    np.testing.assert_array_equal(SoftmaxAware()(tied, tied), [[1, 1, 1, 1]])


def test_rows_do_not_change_with_a_constant_and_follow_permutations():
    p, a = rows()
    mask = SoftmaxAware()(p, a)
    np.testing.assert_array_equal(SoftmaxAware()(p + 3, jax.nn.softmax(p + 3)), mask)
    order = jax.random.permutation(KEY, a.shape[-1])
    np.testing.assert_array_equal(SoftmaxAware()(p, a[..., order]), mask[..., order])


def test_the_gradient_goes_through_the_softmax():
    p, a = rows()
    weight = jax.random.normal(jax.random.key(2), a.shape)
    by_a = jax.grad(lambda a: (SoftmaxAware()(p, a) * weight).sum())(a)
    np.testing.assert_array_equal(by_a, weight)
    by_p = jax.grad(lambda p: (SoftmaxAware()(p, jax.nn.softmax(p)) * weight).sum())(p)
    through = a * (weight - (a * weight).sum(-1, keepdims=True))
    np.testing.assert_allclose(by_p, through, atol=1e-5)


def test_positive_scores_are_the_baseline():
    p = jnp.array([-2.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    np.testing.assert_array_equal(PositiveScores()(p, p), [0, 0, 0, 1, 1, 1])
    gradient = jax.grad(lambda p: PositiveScores()(p, jnp.zeros_like(p)).sum())(p)
    np.testing.assert_array_equal(gradient, [0, 1, 1, 1, 0, 0])


def test_optimal_rows_only_become_better():
    _, a = rows()
    ones = jnp.ones_like(a)
    errors = [jnp.square(a - row_scale(a, ones) * ones).sum(-1)]
    for rounds in range(1, 6):
        v, b = optimal_row_binarisation(a, rounds)
        errors.append(jnp.square(a - v * b).sum(-1))
    for before, after in itertools.pairwise(errors):
        assert (after <= before + 1e-7).all()
    assert (errors[-1] < errors[0]).any()
    _, b = optimal_row_binarisation(a)
    np.testing.assert_array_equal(OptimalRows()(a, a), v * b)


@pytest.mark.parametrize("rule", [SoftmaxAware(), OptimalRows(), PositiveScores()])
def test_what_is_not_visible_is_not_in_a_row(rule):
    """Nor in its maximum, nor does anything of it reach the result."""
    p = rows(shape=(2, 1, 3, 8))[0]
    visible = jnp.arange(8) < 5
    opened = Intercepted(Softmax(), (BinaryRows(rule, ""),))
    masked = opened.apply({}, p.at[..., 5:].set(50.0), visible)
    alone = opened.apply({}, p[..., :5], jnp.ones(5, bool))
    np.testing.assert_allclose(masked[..., :5], alone, rtol=1e-5)
    assert not masked[..., 5:].any()


# ------------------------------------------------------------------------------------ models


def tiny_vit():
    return vit(Transformer(width=16, depth=2, heads=2), image_size=8, patch=2, classes=3)


def tiny_swin():
    return swin(image_size=16, patch=2, width=8, depths=(2, 2), heads=(2, 2), window=2, classes=3)


@pytest.mark.parametrize("make", [tiny_vit, tiny_swin])
def test_embedding_merges_and_head_stay_as_they_are(make):
    """Scales are beside the maps of attention and MLPs, and nowhere else."""
    plain, side = make(), 8 if make is tiny_vit else 16
    image = jax.random.normal(KEY, (2, side, side, 1))
    attention = model.binary_attention(plain, SoftmaxAware())
    whole = model.binary_mlp(attention, binary_inputs=True)
    params = jax.jit(plain.init)(KEY, image)["params"]
    before = paths.leaves(params)

    def new(stage):
        completed = jax.jit(lambda p: stage.complete(KEY, p, {}, image)[0])(params)
        assert jnp.isfinite(jax.jit(stage.apply)({"params": completed}, image)).all()
        return {name.removesuffix("/scale") for name in paths.leaves(completed).keys() - before}

    maps = {name.removesuffix("/kernel") for name in before if name.endswith("kernel")}
    in_attention = {name for name in maps if name.split("/")[-2:][0] == "mixer"}
    in_mlp = {name for name in maps if name.split("/")[-2:][0] == "mlp"}
    blocks = 2 if make is tiny_vit else 4
    assert len(in_attention) == 4 * blocks and len(in_mlp) == 2 * blocks
    assert new(attention) == in_attention
    assert new(whole) == in_attention | in_mlp
    untouched = maps - in_attention - in_mlp
    assert {name.split("/")[-1] for name in untouched} <= {"projection", "head", "reduction"}


def test_a_sum_of_nothing_stays_nothing():
    """Masked sums of signs are whole numbers, so that sign(0) = 0 in front of the projection."""
    attention = Attention(2, core=Make(Unfused))
    x = jax.random.normal(KEY, (3, 6, 8))
    params = attention.init(KEY, x, mask=Full())["params"]
    maps = BinaryEinsum(r"^(query|key|value|out)$")
    parts = (maps, model.BinaryOperands(""), BinaryRows(SoftmaxAware(), ""))
    binary = Intercepted(attention, parts)
    sums = []

    @dataclasses.dataclass(frozen=True)
    class Look:
        def __call__(self, method, args, kwargs, context):
            if context.method_name == "contract" and context.module.name == "out":
                sums.append(args[0])
            return method(*args, **kwargs)

    completed = binary.complete(KEY, params, {}, x, mask=Full())[0]
    Intercepted(attention, (Look(), *parts)).apply({"params": completed}, x, mask=Full())
    np.testing.assert_array_equal(sums[0], np.round(sums[0]))
    assert (np.asarray(sums[0]) == 0).any()


# ------------------------------------------------------------------------------------- recipe


@functools.cache
def states():
    """The states of the tiny recipe at the start of each phase, entered one from the other."""
    recipe = jaxformer.load("bivit:tiny")
    found = [jax.jit(lambda: new_state(recipe, KEY))()]
    for phase in recipe.phases:
        found.append(jax.jit(phase.enter)(found[-1]))
    return recipe, found


def test_stages_begin_with_trained_scales_and_one_teacher():
    recipe, (_, plain, attention, both) = states()
    before, after = paths.leaves(plain.params), paths.leaves(both.params)
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])
    new = after.keys() - before.keys()
    assert {n.split("/")[-3] for n in new} == {"mixer", "mlp"}
    assert {n.split("/")[-3] for n in paths.leaves(attention.params).keys() - before.keys()} == {
        "mixer"
    }
    for name in new:
        kernel = before[name.replace("/scale", "/kernel")]
        axes = (0, 1) if "/out/" in name else 0
        np.testing.assert_allclose(after[name], jnp.abs(kernel).mean(axes), rtol=1e-6)
    for state in (attention, both):
        teacher = state.extra[TEACHER]["params"]
        jax.tree.map(np.testing.assert_array_equal, teacher, plain.params)
    batch = recipe.phases[0].data.batch(0)
    for state, task in zip((plain, attention, both), recipe.task.stages, strict=True):
        assert recipe.task.of(state.params, state.extra, batch) is task


def test_a_stage_is_a_matter_of_shapes():
    recipe = jaxformer.load("bivit:tiny")
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    last = abstract_states(recipe, mesh)[-1]
    assert {name for name in paths.leaves(last.params) if name.endswith("scale")}


def test_the_teacher_decides_and_does_not_change():
    recipe, (_, _, state, _) = states()
    task, batch = recipe.task.stages[1], recipe.phases[0].data.batch(0)
    assert isinstance(task, DistillTask)

    def loss(params, extra, labels):
        return task.loss(params, extra, {**batch, "label": labels}, key=KEY, train=True)

    out = jax.jit(loss)(state.params, state.extra, batch["label"])
    jax.tree.map(np.testing.assert_array_equal, out.extra[TEACHER], state.extra[TEACHER])
    assert out.loss == jax.jit(loss)(state.params, state.extra, (batch["label"] + 1) % 10).loss
    gradient = jax.jit(jax.grad(lambda e: loss(state.params, e, batch["label"]).loss))
    by_teacher = gradient(state.extra)
    assert not any(np.any(x) for x in jax.tree.leaves(by_teacher))
    predict = jax.jit(
        lambda task, *variables: task.predict(*variables, batch, key=KEY), static_argnums=0
    )
    told = jax.nn.softmax(predict(task.teacher, state.extra[TEACHER]["params"], {}))
    said = jax.nn.log_softmax(predict(task, state.params, state.extra))
    np.testing.assert_allclose(out.loss, -(told * said).sum(-1).mean(), rtol=1e-5)


def test_operations_and_sizes_are_the_papers():
    """DeiT-T: 0.39 G and 2.22 MB of 22.8; DeiT-B: 5.81 G and 16.8 MB of 346 (table 1)."""
    for preset, work, size, plain in (
        ("paper", 0.39, 2.22, 22.8),
        ("paper_deit_b", 5.81, 16.8, 346),
    ):
        found = experiments.cost_of(jaxformer.load(f"bivit:{preset}").config)
        np.testing.assert_allclose(
            found["binary G"], work, rtol=0.0125
        )  # the figure has two digits
        np.testing.assert_allclose(found["float MB"], plain, rtol=0.01)
        np.testing.assert_allclose(found["binary MB"], size, rtol=0.08)


# ------------------------------------------------------------------------------------ mistakes


def stage_two_alone():
    recipe, (_, plain, _, _) = states()
    recipe.phases[2].enter(plain)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: jaxformer.load("bivit:tiny", model__heads=5), r"model\.heads=5: must divide"),
        (lambda: jaxformer.load("bivit:tiny", model__beta=0.0), r"model\.beta=0\.0: .*\(0, 1\]"),
        (lambda: jaxformer.load("bivit:tiny", model__beta=1.5), r"model\.beta=1\.5: .*\(0, 1\]"),
        (lambda: jaxformer.load("bivit:tiny", model__attention="x"), r"must be one of sab"),
        (lambda: jaxformer.load("bivit:tiny", model__scale="mean"), r"model\.scale='mean'"),
        (lambda: jaxformer.load("bivit:tiny", model__mlp_inputs="x"), r"model\.mlp_inputs='x'"),
        (lambda: jaxformer.load("bivit:tiny", model__schedule="x"), r"must be one of cross_layer"),
        (lambda: jaxformer.load("bivit:tiny", data__size=12), r"data\.size=12"),
        (lambda: jaxformer.load("bivit:tiny", init_from="runs/x"), r"float_steps=40: .* give 0"),
        (stage_two_alone, r"encoder/stack/block_0/mixer/key/scale"),
    ],
)
def test_mistakes_are_named(act, said):
    with pytest.raises(ConfigError, match=said):
        act()
