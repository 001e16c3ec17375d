"""Flowformer: identities that must hold, and errors that must be clear."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer.analyze.flops import count
from jaxformer.kernels.attention import Causal, Full, KeyPadding, Window
from jaxformer.nn.cache import DecodeUnsupported
from jaxformer.papers.flowformer.model import (
    EPSILON,
    FlowAttention,
    State,
    attend,
    attend_causally,
    conserve,
)
from jaxformer.recipe import ConfigError
from jaxformer.tasks import linen
from jaxformer.train.states import on_device

KEY = jax.random.key(0)


def features(batch=2, sinks=11, sources=11, heads=3, size=5):
    shapes = [(batch, n, heads, size) for n in (sinks, sources, sources)]
    q, k, v = (jax.random.normal(jax.random.fold_in(KEY, i), s) for i, s in enumerate(shapes))
    return jax.nn.sigmoid(q), jax.nn.sigmoid(k), v


def test_flows_are_conserved():
    """With e = 0 the sinks together take m, the sources give n."""
    q, k, _ = features(sinks=11, sources=7)
    flow = conserve(q, k, epsilon=0.0)
    np.testing.assert_allclose(flow.sink_BxLxH.sum(1), 7.0, rtol=1e-4)
    np.testing.assert_allclose(flow.source_BxSxH.sum(1), 11.0, rtol=1e-4)


@pytest.mark.parametrize(("sinks", "sources"), [(11, 11), (9, 14)])
def test_equals_the_quadratic_form(sinks, sources):
    """R = a * (A (c * V)), A = q k^T / I with rows that sum to 1."""
    q, k, v = features(sinks=sinks, sources=sources)
    flow = conserve(q, k)
    weights = jnp.einsum("bihk,bjhk->bhij", q, k) / flow.incoming_BxLxH.swapaxes(1, 2)[..., None]
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-4)
    share = sources * jax.nn.softmax(flow.source_BxSxH.clip(-1, 1), axis=1)
    np.testing.assert_allclose(share.sum(1), sources, rtol=1e-5)
    gate = jax.nn.sigmoid(flow.sink_BxLxH * sinks / sources)
    expected = jnp.einsum("bhij,bjhk->bihk", weights, share[..., None] * v) * gate[..., None]
    np.testing.assert_allclose(attend(q, k, v), expected, atol=1e-5)
    # Of ones, without competition, only the gate is left.
    ones = attend(q, k, jnp.ones_like(v), compete=False)
    np.testing.assert_allclose(ones, jnp.broadcast_to(gate[..., None], ones.shape), rtol=1e-4)
    plain = attend(q, k, v, compete=False, allocate=False)
    np.testing.assert_allclose(plain, jnp.einsum("bhij,bjhk->bihk", weights, v), atol=1e-5)


def test_competition_is_a_softmax_where_sinks_agree():
    """For n equal sinks c = m softmax(n A) exactly, unless Ô is clamped."""
    q, k, v = features(sinks=1, sources=6)
    weights = jnp.einsum("bihk,bjhk->bjh", q, k) / conserve(q, k).incoming_BxLxH
    for n in (1, 12):
        sharp = weights * 6 * jax.nn.softmax(n * weights, axis=1)
        expected = jnp.einsum("bjh,bjhk->bhk", sharp, v)
        found = attend(jnp.repeat(q, n, 1), k, v, clamp=None, allocate=False)
        np.testing.assert_allclose(found, jnp.stack([expected] * n, 1), atol=1e-4)


def test_sources_are_a_set_and_sinks_are_permuted():
    q, k, v = features(sinks=8, sources=12)
    y = attend(q, k, v)
    order = jax.random.permutation(KEY, 12)
    np.testing.assert_allclose(attend(q, k[:, order], v[:, order]), y, atol=1e-5)
    np.testing.assert_allclose(attend(q[:, ::-1], k, v), y[:, ::-1], atol=1e-5)


def test_causal_sees_no_future_and_starts_at_its_own_value():
    q, k, v = features()
    y, _ = attend_causally(q, k, v)
    later = [x.at[:, 6:].set(jax.random.uniform(KEY, x[:, 6:].shape)) for x in (q, k, v)]
    assert np.array_equal(attend_causally(*later)[0][:, :6], y[:, :6])
    sink = ((q[:, 0] + EPSILON) * (k[:, 0] / (q[:, 0] * k[:, 0]).sum(-1, keepdims=True))).sum(-1)
    np.testing.assert_allclose(y[:, 0], jax.nn.sigmoid(sink)[..., None] * v[:, 0], atol=1e-5)


@pytest.mark.parametrize("clamp", [1.0, 5.0, None])
def test_decoding_equals_the_parallel_form(clamp):
    """A prompt at once, then token by token, 1024 in all; the state does not grow."""
    q, k, v = features(batch=1, sinks=1024, sources=1024, heads=2, size=4)
    whole, end = attend_causally(q, k, v, clamp=clamp)
    first, state = attend_causally(q[:, :100], k[:, :100], v[:, :100], clamp=clamp)

    def step(state, x):
        y, state = attend_causally(*(a[:, None] for a in x), state, clamp=clamp)
        return state, y[:, 0]

    rest = tuple(x[:, 100:].swapaxes(0, 1) for x in (q, k, v))
    state, ys = jax.lax.scan(step, state, rest)
    found = jnp.concatenate([first, ys.swapaxes(0, 1)], 1)
    np.testing.assert_allclose(found, whole, atol=1e-4)
    # Sums over 1024 positions in another order: relative, in float32.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4), state, end)
    sizes = [x.size for x in jax.tree.leaves(State.empty(1, 2, 4))]
    assert sizes == [x.size for x in jax.tree.leaves(end)]


@pytest.mark.parametrize("causal", [True, False])
def test_cost_is_linear_in_the_length(causal):
    """Twice the length, twice the FLOPs and the memory; no buffer of L x L."""
    run = (lambda q, k, v: attend_causally(q, k, v)[0]) if causal else attend
    gradient = jax.grad(lambda q, k, v: run(q, k, v).sum(), argnums=(0, 1, 2))

    def at(length, function):
        x = [jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)] * 3
        temporary = jax.jit(function).lower(*x).compile().memory_analysis().temp_size_in_bytes
        return count(function, *x), temporary

    for function in (run, gradient):
        (flops, memory), (twice, more) = at(4096, function), at(8192, function)
        assert twice / flops == pytest.approx(2.0, abs=0.05)
        assert more < 2.2 * memory and more < 8192**2


def test_padding_is_nothing():
    """Padded sources and sinks leave the real ones as they are, n and m counted."""
    q, k, v = features(sinks=9, sources=9)
    valid = jnp.arange(9) < jnp.asarray([6, 9])[:, None]
    y = attend(q, k, v, valid_BxL=valid, valid_BxS=valid)
    alone = attend(q[:1, :6], k[:1, :6], v[:1, :6])
    np.testing.assert_allclose(y[:1, :6], alone, atol=1e-5)
    np.testing.assert_allclose(y[1:], attend(q[1:], k[1:], v[1:]), atol=1e-5)
    nobody = attend(q, k, v, valid_BxS=jnp.zeros((2, 9), bool))
    assert not np.any(nobody)


def test_sums_are_float32_for_bfloat16_inputs():
    q, k, v = (x.astype(jnp.bfloat16) for x in features(sinks=300, sources=300))
    y, state = attend_causally(q, k, v)
    assert y.dtype == jnp.float32 and attend(q, k, v).dtype == jnp.float32
    assert {x.dtype for x in state[1:]} == {jnp.dtype(jnp.float32)}
    # In bfloat16 the sum of k would stop growing near 256.
    np.testing.assert_allclose(state.k[:, 0], k.astype(jnp.float32).sum(1), rtol=1e-4)


def test_the_mixer_reads_masks_and_refuses_what_it_cannot():
    x = jax.random.normal(KEY, (2, 10, 12))
    mixer = FlowAttention(heads=3)
    variables = mixer.init(KEY, x, mask=Full())
    valid = jnp.ones((2, 10), bool).at[:, 7:].set(False)
    run = lambda x, mask, **more: mixer.apply(variables, x, mask=mask, **more)
    padded = run(x, Full() & KeyPadding(valid))
    np.testing.assert_allclose(padded[:, :7], run(x[:, :7], Full()), atol=1e-5)
    assert run(x, Full(), kv_BxSxD=x[:, :4]).shape == x.shape
    assert float(jnp.abs(run(x, Causal()) - run(x, Full())).max()) > 1e-3
    with pytest.raises(ConfigError, match=r"cannot follow Window; allowed: Full, Causal"):
        run(x, Window(2, 0))
    with pytest.raises(ConfigError, match="takes no padding"):
        run(x, Causal() & KeyPadding(valid))
    with pytest.raises(DecodeUnsupported):
        run(x, Full(), decode=True)
    with pytest.raises(ConfigError, match=r"model.heads=5: must divide the width 12"):
        FlowAttention(heads=5).init(KEY, x, mask=Full())
    q, k, v = features(sinks=4, sources=5)
    with pytest.raises(ValueError, match="4 sinks and 5 sources"):
        attend_causally(q, k, v)


@pytest.mark.parametrize(
    ("preset", "task"), [("recall", "recall"), ("recall", "queries"), ("listops", "listops")]
)
def test_every_task_is_scored(preset, task):
    """At the start the loss is near that of a guess, over as many answers as there are."""
    small = {"batch_size": 4, "model__width": 16, "model__hidden": 16, "model__vocabulary": 66}
    recipe = jaxformer.load(f"flowformer:{preset}", data__task=task, **small)
    data = recipe.phases[0].data
    batch = on_device(data, data.batch(0))

    @jax.jit
    def score(batch):
        params, extra = recipe.task.init(KEY, batch)
        return recipe.task.loss(params, extra, batch, key=KEY, train=False)

    output = score(batch)
    chance = np.log({"recall": 16, "queries": 66, "listops": 10}[task])
    assert 0.5 < output.loss / chance < 2
    assert output.weight == (64 if task == "queries" else 4)  # 16 answers in each of 4 rows


@pytest.mark.parametrize("mixer", ["flow", "linear", "softmax"])
def test_the_language_model_decodes_as_it_trains(mixer):
    task = jaxformer.load("flowformer:tiny", model__mixer=mixer).task
    tokens = jax.random.randint(KEY, (2, 24), 0, 257)
    params, extra = task.init(KEY, {"tokens": tokens})
    whole = jax.jit(task.model.apply)({"params": params}, tokens)
    cache = task.start(params, extra, batch_size=2, length=24)
    decode = jax.jit(linen.decode, static_argnums=0)
    end = 0
    for size in (12, 10, 1, 1):
        out, cache = decode(task.model, params, extra, cache, tokens[:, end : end + size])
        end += size
        np.testing.assert_allclose(out, whole[:, end - 1 : end], atol=2e-4)
    with pytest.raises(ConfigError, match="start_cache"):
        linen.decode(task.model, params, extra, {}, tokens[:, :3])
