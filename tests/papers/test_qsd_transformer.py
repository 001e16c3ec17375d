"""QSD-Transformer: identities that must hold, and errors that must be clear."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer.analyze.flops import count
from jaxformer.analyze.operations import MAPS, products, spike_energy
from jaxformer.compress.intercepted import Intercepted
from jaxformer.compress.lsq import LEAST, LearnedSteps, clamped_steps, lsq
from jaxformer.nn.batch_norm import BatchNorm, PaddedBatchNorm
from jaxformer.nn.einsum import Einsum
from jaxformer.nn.make import Make
from jaxformer.nn.spiking import IntegerLIF, Rectifier, integer_spikes, unroll
from jaxformer.papers.qsd_transformer import experiments, model
from jaxformer.papers.qsd_transformer.model import (
    ATTENTION_GAIN,
    POINTWISE,
    SpikeNetwork,
    Stage,
    floating,
    linear_attention,
    mismatch,
    quantized,
    similarity,
)
from jaxformer.recipe import ConfigError
from jaxformer.tasks.distill import TEACHER
from jaxformer.tasks.linen import Answer
from jaxformer.train.states import new_state

KEY = jax.random.key(0)
STAGES = (Stage(8, "conv", 1), Stage(16, "attention", 1))


def small(**fields):
    """A network whose blocks are visible: layer scales of 1."""
    return SpikeNetwork(STAGES, heads=4, classes=5, layer_scale=1.0, **fields)


@functools.cache
def started():
    """(network of 4 bits, its variables with statistics of a real batch, images)."""
    network = quantized(small(), 4)
    image = jax.random.uniform(KEY, (4, 8, 8, 1))

    @jax.jit
    def start():
        variables = network.init(KEY, image)
        for _ in range(3):
            _, changed = network.apply(variables, image, train=True, mutable=["batch_stats"])
            variables = {**variables, **changed}
        return variables

    return network, start(), image


# ------------------------------------------------------------------------------------- neurons


def test_spikes_are_quarters_and_halves_round_up():
    x = jnp.array([-3.0, 0.0, 0.124, 0.125, 0.25, 0.374, 0.375, 0.5, 0.875, 1.0, 7.0])
    expected = [0, 0, 0, 0.25, 0.25, 0.25, 0.5, 0.5, 1, 1, 1]
    np.testing.assert_array_equal(integer_spikes(x, 4), expected)
    grid = jnp.arange(5) / 4
    np.testing.assert_array_equal(IntegerLIF().apply({}, grid), grid)
    np.testing.assert_array_equal(IntegerLIF(gain=2.0).apply({}, x), 2 * np.array(expected))
    np.testing.assert_array_equal(IntegerLIF(levels=1).apply({}, x), x >= 0.5)


@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_spikes_pass_their_gradient_strictly_inside(gain):
    x = jnp.array([-0.1, 0.0, 0.01, 0.5, 0.99, 1.0, 1.1])
    gradient = jax.grad(lambda x: IntegerLIF(gain=gain).apply({}, x).sum())(x)
    np.testing.assert_array_equal(gradient, gain * np.array([0, 0, 1, 1, 1, 0, 0]))


def test_a_membrane_remembers_what_was_not_fired():
    neuron = IntegerLIF(levels=2, leak=0.5, steps=3)
    x = jnp.array([0.2, 0.9, 0.2, -1.0, 0.1, 0.3])  # three steps of two rows, outermost
    kept, expected = np.zeros(2), []
    for t in range(3):
        u = 0.5 * kept + np.array(x[2 * t : 2 * t + 2])
        fired = np.floor(np.clip(2 * u, 0, 2) + 0.5) / 2
        kept = u - fired
        expected += list(fired)
    np.testing.assert_allclose(neuron.apply({}, x), expected)
    memoryless = IntegerLIF(levels=2, steps=3).apply({}, x)
    np.testing.assert_array_equal(memoryless, integer_spikes(x, 2))
    assert not np.array_equal(memoryless, expected)


def test_unrolled_spikes_are_single_and_add_up():
    spikes = integer_spikes(jax.random.normal(KEY, (6, 7)), 4)
    steps = unroll(spikes, 4)
    assert set(np.unique(steps)) == {0.0, 1.0} and steps.shape == (4, 6, 7)
    np.testing.assert_array_equal(steps.mean(0), spikes)
    weight = jax.random.normal(jax.random.key(1), (7, 3))
    np.testing.assert_allclose((steps @ weight).mean(0), spikes @ weight, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class OneByOne:
    """An interceptor: maps of spikes are applied to single spikes, sub-step by sub-step."""

    levels: int
    log: list = dataclasses.field(default_factory=list, compare=False)

    def __call__(self, method, args, kwargs, context):
        layer = context.module
        if not isinstance(layer, MAPS) or context.method_name != "contract":
            return method(*args, **kwargs)
        path = "/".join(layer.path)
        fed = ("expand", "conv_1", "conv_2", "pointwise_1", "up", "down", "head", "depthwise")
        spiking = path.endswith(fed) and not path.endswith(tuple(NOT_SPIKES))
        if not spiking and path != "downsampling_1/conv":
            return method(*args, **kwargs)
        x, kernel, bias = args
        gain = ATTENTION_GAIN if path.endswith("/out/pointwise_1") else 1.0
        self.log.append((path, jnp.abs(gain * unroll(x / gain, self.levels).mean(0) - x).max()))
        parts = [gain * method(step, kernel, None) for step in unroll(x / gain, self.levels)]
        y = sum(parts) / self.levels
        return y if bias is None else y + bias


NOT_SPIKES = [f"{part}/depthwise" for part in ("query", "key", "value", "out")]


def test_the_network_of_single_spikes_is_that_of_whole_numbers():
    network, variables, image = started()
    log = []
    unrolled = Intercepted(network.model, (*network.interceptors, OneByOne(4, log)))

    def both(variables):
        del log[:]
        y = unrolled.apply(variables, image)
        return y, network.apply(variables, image), [error for _, error in log]

    single, whole, errors = jax.jit(both)(variables)
    np.testing.assert_allclose(single, whole, atol=1e-4)
    np.testing.assert_array_equal(errors, np.zeros(len(errors)))  # all their inputs are spikes
    assert len(log) == 4 + 1 + 4 + 2 + 1  # convolutions, downsampling, attention, MLP, head


@functools.cache
def beside_floats():
    """How far the logits are from those of the network of floats, by (levels, bits)."""
    image = jax.random.uniform(KEY, (4, 8, 8, 1))
    teacher = floating(small(), limit=1.0)
    variables = dict(jax.jit(teacher.init)(KEY, image))
    run = jax.jit(lambda v: teacher.apply(v, image, train=True, mutable=["batch_stats"]))
    for _ in range(3):
        variables |= run(variables)[1]
    floats = jax.jit(teacher.apply)(variables, image)

    def distance(levels, bits):
        fine = quantized(small(neuron=Make(IntegerLIF, levels=levels)), bits)

        @jax.jit
        def ours(variables):
            params, _ = fine.complete(KEY, variables["params"], variables, image)
            params = jax.tree_util.tree_map_with_path(
                lambda path, x: widest(params, path, x, bits) if path[-1].key == "scale" else x,
                params,
            )
            return fine.apply({**variables, "params": params}, image)

        return float(jnp.linalg.norm(ours(variables) - floats) / jnp.linalg.norm(floats))

    return distance


def widest(params, path, scale, bits):
    """Steps with which no weight of a channel is clipped, as the first ones of LSQ do."""
    node = params
    for key in path[:-1]:
        node = node[key.key]
    if "kernel" not in node:
        return scale  # of a norm
    kernel = jnp.abs(node["kernel"])
    most = kernel.max(tuple(range(kernel.ndim - 1))) / (2 ** (bits - 1) - 1)
    return jnp.broadcast_to(most, scale.shape)


def test_more_and_more_levels_become_the_network_of_floats():
    """New weights: 2.6 % with 64 levels and 8 bits, 1.1 % with 4096 levels, 0.05 % with 14 bits."""
    assert beside_floats()(64, 8) < 0.05
    assert beside_floats()(4096, 8) < 0.02
    assert beside_floats()(4096, 14) < 0.002


# ------------------------------------------------------------------------------------- attention


def test_attention_is_associative_and_linear_in_positions():
    q, k, v = integer_spikes(jax.random.uniform(KEY, (3, 2, 16, 4, 8)), 4)
    pairs = jnp.einsum("BNHK,BMHK->BHNM", q, k)
    np.testing.assert_allclose(
        linear_attention(q, k, v), 0.25 * jnp.einsum("BHNM,BMHE->BNHE", pairs, v), rtol=1e-5
    )

    def work(n):
        x = jax.ShapeDtypeStruct((1, n, 4, 8), jnp.float32)
        return count(linear_attention, x, x, x)

    assert work(64) == 4 * work(16)


# ------------------------------------------------------------------------------------- weights


def test_codes_are_few_and_scale_with_their_weights():
    weight = jax.random.normal(KEY, (50, 3))
    step = jnp.array([0.1, 0.2, 0.4])
    for bits in (2, 4):
        used = lsq(weight, step, bits)
        for channel, s in zip(used.T, step, strict=True):
            codes = np.unique(np.round(channel / s))
            assert len(codes) <= 2**bits
            assert codes.min() >= -(2 ** (bits - 1)) and codes.max() <= 2 ** (bits - 1) - 1
        np.testing.assert_allclose(lsq(3 * weight, 3 * step, bits), 3 * used, rtol=1e-5)
    np.testing.assert_allclose(lsq(jnp.array([0.25, 0.75]), 0.5, 4), [0.0, 1.0])  # half to even


def test_the_gradient_of_a_step():
    """Round(w) - w of what is not clipped, else the code; as in the paper, section 2.1."""
    weight, step = jax.random.normal(KEY, (40,)), jnp.float32(0.3)
    found = jax.grad(lambda s: lsq(weight, s, 4).sum())(step)
    scaled = np.asarray(weight / step)
    inside = (scaled > -8) & (scaled < 7)
    assert 0 < inside.sum() < 40
    each = np.where(inside, np.round(scaled) - scaled, np.clip(scaled, -8, 7))
    np.testing.assert_allclose(found, each.sum() / np.sqrt(40 * 7), rtol=1e-4)
    by_weight = jax.grad(lambda w: lsq(w, step, 4).sum())(weight)
    np.testing.assert_allclose(by_weight, inside.astype(np.float32), rtol=1e-6)


def test_steps_never_vanish_and_are_counted():
    weight = jnp.array([0.5, -0.5])
    np.testing.assert_array_equal(lsq(weight, jnp.float32(-1.0), 4), lsq(weight, LEAST, 4))
    assert jax.grad(lambda s: lsq(weight, s, 4).sum())(jnp.float32(-1.0)) != 0
    params = {"a": {"kernel": jnp.ones((2, 3)), "scale": jnp.array([1.0, -1.0, 0.0])}}
    assert clamped_steps({**params, "norm": {"scale": jnp.zeros(4)}}) == 2
    assert clamped_steps({"a": {"kernel": jnp.ones(2)}}) == 0


def test_steps_start_from_the_weights_there_are():
    layer = Intercepted(Einsum(POINTWISE, (3,)), (LearnedSteps(4),))
    kernel = jax.random.normal(KEY, (5, 3))
    params, _ = layer.complete(KEY, {"kernel": kernel, "bias": jnp.zeros(3)}, {}, jnp.ones((1, 5)))
    start = 2 * np.abs(kernel).mean() / np.sqrt(7)
    np.testing.assert_allclose(params["scale"], [start] * 3, rtol=1e-6)


# ------------------------------------------------------------------------------------- borders


def bordered():
    x = jax.random.normal(KEY, (2, 4, 4, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 5))
    norm = {"scale": jnp.arange(1.0, 6.0), "bias": jnp.arange(-2.0, 3.0)}
    running = {"mean": jnp.linspace(-1, 1, 5), "var": jnp.linspace(0.5, 2, 5)}
    return x, kernel, norm, running


def test_a_border_is_what_the_norm_makes_of_zeros():
    x, kernel, norm, running = bordered()
    given = {"params": {"norm": norm}, "batch_stats": {"norm": running}}
    padded = PaddedBatchNorm().apply(given, x @ kernel)
    outside = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    plain = BatchNorm().apply({"params": norm, "batch_stats": running}, outside @ kernel)
    np.testing.assert_allclose(padded, plain, atol=1e-5)


def test_a_border_is_a_constant_to_gradients():
    x, kernel, norm, running = bordered()

    def total(norm):
        given = {"params": {"norm": norm}, "batch_stats": {"norm": running}}
        return PaddedBatchNorm().apply(given, x @ kernel).sum()

    found = jax.grad(total)(norm)
    np.testing.assert_array_equal(found["bias"], np.full(5, 2 * 4 * 4))


def test_a_border_follows_the_statistics_of_its_own_call():
    x, kernel, norm, running = bordered()
    given = {"params": {"norm": norm}, "batch_stats": {"norm": running}}
    y = x @ kernel
    out, changed = PaddedBatchNorm().apply(given, y, train=True, mutable=["batch_stats"])
    new = changed["batch_stats"]["norm"]
    np.testing.assert_allclose(new["mean"], 0.9 * running["mean"] + 0.1 * y.mean((0, 1, 2)), 1e-4)
    border = norm["bias"] - new["mean"] * norm["scale"] / jnp.sqrt(new["var"] + 1e-5)
    np.testing.assert_allclose(out[0, 0, 0], border, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------- distillation


def sown(seed, rows=3):
    shape = (rows, 9, 2, 4)
    keys = jax.random.split(jax.random.key(seed))
    q, k = (integer_spikes(jax.random.uniform(key, shape), 4) for key in keys)
    return Answer(jnp.zeros((3, 5)), {"block": {"mixer": {"key": (k,), "query": (q,)}}}, {})


def test_mismatch_is_of_cosines():
    one, other = sown(0), sown(1)
    np.testing.assert_array_equal(mismatch(one, one), np.zeros(3))
    scaled = Answer(one.output, jax.tree.map(lambda x: 3 * x, one.sown), {})
    np.testing.assert_allclose(mismatch(one, scaled), np.zeros(3), atol=1e-6)
    found = np.zeros(3)
    for a, b in zip(jax.tree.leaves(one.sown), jax.tree.leaves(other.sown), strict=True):
        a, b = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6) for x in (a, b))
        ga, gb = (np.einsum("BNHK,BMHK->BHNM", x, x) for x in (a, b))
        found += np.square(ga - gb).mean((-2, -1)).sum(-1)
    np.testing.assert_allclose(mismatch(one, other), found, rtol=1e-4)
    silent = jnp.zeros((1, 2, 1, 3)).at[0, 0].set(0.25)
    slope = jax.grad(lambda x: similarity(x)[..., 0, 1].sum())(silent)
    np.testing.assert_array_equal(slope[0, 1], np.zeros((1, 3)))


def test_mismatch_is_the_mean_over_time():
    one, other = sown(0, rows=6), sown(1, rows=6)
    halves = [
        mismatch(*(Answer(a.output, jax.tree.map(lambda x, i=i: x[i], a.sown), {}) for a in pair))
        for pair in [(one, other)]
        for i in (slice(0, 3), slice(3, 6))
    ]
    np.testing.assert_allclose(mismatch(one, other), sum(halves) / 2, rtol=1e-5)


def test_the_student_begins_anew_beside_its_teacher():
    recipe = jaxformer.load("qsd_transformer:tiny")
    state = jax.jit(lambda: new_state(recipe, KEY))()
    after = jax.jit(recipe.phases[1].enter)(state)
    teacher = after.extra[TEACHER]
    jax.tree.map(np.testing.assert_array_equal, teacher["params"], state.params)
    jax.tree.map(np.testing.assert_array_equal, teacher["batch_stats"], state.extra["batch_stats"])
    assert not np.array_equal(after.params["head"]["kernel"], state.params["head"]["kernel"])
    batch = recipe.phases[0].data.batch(0)
    assert recipe.task.of(state.params, state.extra, batch) is recipe.task.stages[0]
    task = recipe.task.of(after.params, after.extra, batch)
    assert task is recipe.task.stages[1]

    @jax.jit
    def loss(extra):
        return task.loss(after.params, extra, batch, key=KEY, train=True)

    out = loss(after.extra)
    jax.tree.map(np.testing.assert_array_equal, out.extra[TEACHER], teacher)
    assert np.any(out.extra["batch_stats"]["downsampling_0"]["norm"]["mean"])
    own = out.metrics["mismatch"].value()
    assert own > 0 and out.loss > own


# ---------------------------------------------------------------------------------- energy, sizes


def test_energy_is_additions_of_spikes():
    network, variables, image = started()
    found = products(network, variables, image[:1])
    rates = experiments.firing(network, variables, image)
    named = {product.path: product.macs for product in found}
    assert len(named) == len(found) == 1 + 5 + 1 + 12 + 2 + 1
    assert set(rates) == set(named) - {"downsampling_0/conv", *(n for n in named if inner(n))}
    assert all(0 <= n <= 4 for n in rates.values()) and max(rates.values()) > 0.1
    expected = sum(m * (0.9 * rates[n] if n in rates else 4.6) for n, m in named.items()) / 1e9
    np.testing.assert_allclose(spike_energy(found, rates), expected, rtol=1e-6)
    assert spike_energy(found, rates) < spike_energy(found, {})


def inner(name):
    """Whether a map of that name has a map in front of it, not a neuron."""
    return name.endswith(("reduce", "pointwise_2", *NOT_SPIKES))


def test_the_papers_networks_have_its_parameters():
    found = experiments.size_of(jaxformer_config("paper"))
    assert 15.0 < found["float M"] < 15.5 and 1.8 < found["quantised M"] < 2.1


def jaxformer_config(preset):
    return jaxformer.config.load_config(f"qsd_transformer:{preset}")


# ------------------------------------------------------------------------------------ mistakes


def load(**fields):
    return jaxformer.load("qsd_transformer:tiny", **fields)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: load(model__heads=3), r"model\.heads=3: must divide the width 32"),
        (lambda: load(model__bits=1), r"model\.bits=1: must be at least 2"),
        (lambda: load(model__widths=(8,)), r"model\.widths=\(8,\): one for each stage"),
        (lambda: load(model__kinds=("conv", "x")), r"model\.kinds: 'x' must be one of"),
        (lambda: load(data__size=12), r"data\.size=12"),
        (lambda: IntegerLIF(levels=0).apply({}, jnp.ones(2)), r"model\.levels=0"),
        (
            lambda: IntegerLIF(leak=0.5, steps=3).apply({}, jnp.ones((4, 2))),
            r"model\.steps=3: must divide the 4 rows",
        ),
        (
            lambda: small(steps=2).init(KEY, jnp.ones((3, 1, 8, 8, 1))),
            r"model\.steps=2: the images have 3 steps",
        ),
    ],
)
def test_mistakes_are_named(act, said):
    with pytest.raises(ConfigError, match=said):
        act()


def test_steps_of_time_are_the_same_image_again():
    """Without memory more of them change nothing."""
    image = jax.random.uniform(KEY, (2, 8, 8, 1))
    variables = jax.jit(small().init)(KEY, image)
    once, twice = (jax.jit(small(steps=t).apply)(variables, image) for t in (1, 2))
    np.testing.assert_allclose(once, twice, atol=1e-5)
    clip = jnp.stack([image, image])
    np.testing.assert_allclose(jax.jit(small(steps=2).apply)(variables, clip), once, atol=1e-5)


def test_rectifiers_stand_in_for_neurons():
    x = jnp.array([-1.0, 0.5, 3.0])
    np.testing.assert_array_equal(Rectifier().apply({}, x), [0, 0.5, 3])
    np.testing.assert_array_equal(Rectifier(limit=1.0, gain=2.0).apply({}, x), [0, 1, 2])
    assert model.LAYER_SCALE == 1e-6
