"""SSA: identities of the paper, draws, the phases and the ensemble."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.analyze.flops import count
from jaxformer.catalogue import load
from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import Causal, Full, KeyPadding, Segments
from jaxformer.models.ensemble import Ensemble, mean_probabilities
from jaxformer.nn.attention import Attention
from jaxformer.nn.make import Make
from jaxformer.nn.position import ALiBi, RoPE
from jaxformer.nn.relative import BucketBias
from jaxformer.nn.subsample import Local, LocalGrid, SourceDropout, SubsampledAttention, Unbiased
from jaxformer.train.fit import FitOptions, Interrupted, fit

B, L, D, H = 2, 12, 16, 4
X = jax.random.normal(jax.random.key(0), (B, L, D))
KEY = jax.random.key(7)
ALL = (Unbiased(1.0), Local(L), Local(L + 5), SourceDropout(0.0), LocalGrid(4, 3, 1, 1e9))


def module(draw, **parts):
    return SubsampledAttention(H, draw=draw, **parts)


def run(layer, x=X, key=KEY, mask=None, train=True, **options):
    params = layer.init(jax.random.key(1), x, mask=Full())
    rngs = {"dropout": key} if train else None
    return layer.apply(params, x, mask=mask or Full(), train=train, rngs=rngs, **options)


def close(a, b, atol=1e-6):
    np.testing.assert_allclose(a, b, atol=atol)


def windows(draw, key=KEY, length=L, valid=None):
    found = draw(key, length, length, valid)
    return np.asarray(found.queries), np.asarray(found.keys)


def oracle(layer, q_windows, k_windows, mask, own):
    """The same attention from explicit lists of indices, in NumPy."""
    params = layer.init(jax.random.key(1), X, mask=Full())["params"]

    def project(name):
        kernel, bias = (np.float64(params[name][part]) for part in ("kernel", "bias"))
        return np.einsum("BLD,DHK->BLHK", np.float64(X), kernel) + bias

    q, k, v = (project(name) for name in ("query", "key", "value"))
    y = np.zeros_like(q)
    for queries, keys in zip(q_windows[0], k_windows[0], strict=True):
        for i in queries[queries < L]:
            seen = [j for j in keys if j < L and (mask is None or j <= i)]
            seen = sorted(set(seen) | {i}) if own else seen
            for b in range(B):
                for h in range(H):
                    s = q[b, i, h] @ k[b, seen, h].T / np.sqrt(q.shape[-1])
                    p = np.exp(s - s.max())
                    y[b, i, h] = (p / p.sum()) @ v[b, seen, h]
    kernel, bias = (np.float64(params["out"][part]) for part in ("kernel", "bias"))
    return np.einsum("BLHK,HKD->BLD", y, kernel) + bias


@pytest.mark.parametrize("position", [RoPE, ALiBi])
@pytest.mark.parametrize("mask", [Full(), Causal()])
@pytest.mark.parametrize("draw", ALL[:4])
def test_all_keys_are_dense_attention(draw, mask, position):
    layer = module(draw, position=Make(position))
    close(run(layer, mask=mask), run(layer, mask=mask, train=False))


@pytest.mark.parametrize("mask", [None, Causal()])
def test_shared_biases_go_by_where_keys_came_from(mask):
    bias = BucketBias(H, buckets=8, longest=20)
    scheme = bias.apply(bias.init(jax.random.key(3)))
    layer = module(Local(L))
    dense = run(layer, mask=mask, train=False, scheme=scheme)
    close(run(layer, mask=mask, scheme=scheme), dense)


@pytest.mark.parametrize("mask", [None, Causal()])
@pytest.mark.parametrize(
    "draw", [Unbiased(0.3), Local(5), Local(4, 0.0), Local(3, always=2), LocalGrid(4, 3, 1)]
)
def test_drawn_keys_are_those_of_the_oracle(draw, mask, monkeypatch):
    layer = module(draw)
    drawn = []
    call = type(draw).__call__

    def noted(self, *args):
        drawn.append(call(self, *args))
        return drawn[-1]

    monkeypatch.setattr(type(draw), "__call__", noted)
    y = run(layer, mask=mask)
    expected = oracle(layer, *map(np.asarray, drawn[-1]), mask, own=mask is not None)
    close(y, expected, atol=2e-6)


def test_without_spread_attention_is_local():
    layer = module(Local(4, 0.0))
    x = X.reshape(B * 3, 4, D)
    np.testing.assert_array_equal(run(layer).reshape(x.shape), run(layer, x, train=False))


def test_gathered_keys_are_the_same_as_masked_ones():
    layer = module(Unbiased(0.4))
    params = layer.init(jax.random.key(1), X, mask=Full())
    rngs = {"dropout": KEY}
    kept = set()

    def loss(x_keys, train, mask):
        y = layer.apply(params, X, x_keys, mask=mask, train=train, rngs=rngs)
        return jnp.square(y).sum()

    layer = module(Unbiased(0.4), cross=True)
    value, gradient = jax.value_and_grad(loss)(X, True, Full())
    seen = np.abs(gradient).sum((0, 2)) > 0
    kept = np.flatnonzero(seen)
    assert len(kept) == 5 and (np.asarray(gradient)[:, ~seen] == 0).all()
    masked = jax.value_and_grad(loss)(X, False, KeyPadding(jnp.broadcast_to(seen, (B, L))))
    close(value, masked[0], atol=1e-5)
    close(gradient, masked[1])


def test_a_local_draw_is_a_permutation_that_widens_with_the_spread():
    n = 300
    moved = []
    for spread in (0.0, 1.0, 8.0, 64.0, 1e6):
        keys = np.stack(
            [windows(Local(10, spread), jax.random.key(i), n)[1].reshape(-1) for i in range(20)]
        )
        assert (np.sort(keys) == np.arange(n)).all()
        moved.append(np.abs(keys - np.arange(n)).mean())
    assert moved[0] == 0 and (np.diff(moved) > 0).all()
    assert moved[-1] == pytest.approx(n / 3, rel=0.1)


def test_windows_of_a_grid_are_squares():
    queries, keys = windows(LocalGrid(4, 6, 2), length=24)
    assert (np.sort(queries.reshape(-1)) == np.arange(24)).all()
    assert (np.sort(keys.reshape(-1)) == np.arange(24)).all()
    assert queries[0, 0].tolist() == [0, 6, 1, 7] and queries[0, -1].tolist() == [16, 22, 17, 23]
    close(*windows(LocalGrid(4, 6, 2, 0.0), length=24))


@pytest.mark.parametrize("draw", [Unbiased(0.1), Local(4), Local(3, 1e6)])
def test_causal_outputs_know_nothing_of_what_comes_later(draw):
    layer = module(draw)
    params = layer.init(jax.random.key(1), X, mask=Full())

    @jax.jit
    def outputs(x, key):
        return layer.apply(params, x, mask=Causal(), train=True, rngs={"dropout": key})

    later = X.at[:, 7:].add(1.0)
    for i in range(20):
        a, b = outputs(X, jax.random.key(i)), outputs(later, jax.random.key(i))
        close(a[:, :7], b[:, :7])
        assert np.abs(a[:, 7:] - b[:, 7:]).max() > 1e-3


def test_no_draw_of_a_single_key_is_not_a_number():
    layer, x = module(Unbiased(1 / 8)), X[:1, :8]
    params = layer.init(jax.random.key(1), x, mask=Full())

    @jax.jit
    @jax.vmap
    def finite(key):
        y = layer.apply(params, x, mask=Causal(), train=True, rngs={"dropout": key})
        return jnp.isfinite(y).all()

    assert finite(jax.random.split(KEY, 10_000)).all()


def test_only_valid_keys_are_drawn():
    valid = jnp.asarray(np.arange(L) < np.array([[3], [12]]))
    for i in range(20):
        _, keys = windows(Unbiased(0.5), jax.random.key(i), valid=valid)
        assert [(row < L).sum() for row in keys[:, 0]] == [2, 6]
        assert keys[0, 0][keys[0, 0] < L].max() < 3
    layer = module(Unbiased(0.5))
    changed = X.at[0, 3:].add(1.0)
    mask = KeyPadding(valid)
    close(run(layer, mask=mask)[0, :3], run(layer, changed, mask=mask)[0, :3])
    assert np.isfinite(run(module(Local(4)), mask=mask)).all()


def test_draws_depend_on_the_key_and_the_layer_alone():
    layer = module(Unbiased(0.3))
    np.testing.assert_array_equal(run(layer), run(layer))
    assert np.abs(run(layer) - run(layer, key=jax.random.key(8))).max() > 1e-3
    recipe = load("ssa:tiny")
    model = recipe.phases[0].update.task.model
    image = jnp.ones((1, 8, 8, 1))
    params = model.init(jax.random.key(0), image)
    alike = jax.tree.map(lambda x: x, params)
    blocks = alike["params"]["encoder"]["stack"]
    blocks["block_1"] = blocks["block_0"]
    drawn = []
    call = Unbiased.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Unbiased, "__call__", lambda self, *a: drawn.append(call(self, *a)) or drawn[-1]
        )
        model.apply(alike, image, train=True, rngs={"dropout": KEY})
    assert len(drawn) == 2 and (drawn[0].keys != drawn[1].keys).any()


def test_a_quarter_of_the_keys_is_a_quarter_of_the_work_and_memory():
    batch, length, width = 8, 256, 64
    x = jnp.zeros((batch, length, width))

    def work(layer, train):
        params = layer.init(jax.random.key(1), x, mask=Full())

        def forward(params, x):
            rngs = {"dropout": KEY}
            return layer.apply(params, x, mask=Full(), train=train, rngs=rngs).sum()

        step = jax.jit(jax.grad(forward)).lower(params, x).compile()
        projections = 4 * 2 * batch * length * width**2
        memory = step.memory_analysis().temp_size_in_bytes
        return count(forward, params, x) - projections, memory

    (dense, all_memory), (quarter, memory) = (
        work(module(Unbiased(0.25)), train) for train in (False, True)
    )
    assert quarter / dense == pytest.approx(0.25, abs=0.02)
    assert memory < 0.45 * all_memory  # projections stay: 0.40
    local, _ = work(module(Local(64)), True)
    assert local / dense == pytest.approx(0.25, abs=0.02)


def test_an_ensemble_averages_probabilities():
    logits = jax.random.normal(KEY, (5, 3, 10)) * 4
    averaged = jnp.exp(mean_probabilities(logits))
    close(averaged.sum(-1), 1.0)
    close(averaged, jax.nn.softmax(logits).mean(0))
    model = load("ssa:tiny").phases[0].update.task.model
    image = jax.random.normal(KEY, (2, 8, 8, 1))
    params = model.init(jax.random.key(0), image)
    dense = model.apply(params, image)
    np.testing.assert_array_equal(Ensemble(model, 0).apply(params, image), dense)
    whole = load("ssa:tiny", model__keep=1.0).phases[0].update.task.model
    one = jax.nn.softmax(Ensemble(whole, 1).apply(params, image))
    close(one, jax.nn.softmax(dense))


@pytest.mark.slow
def test_a_run_that_stopped_in_the_drawn_phase_goes_on_with_the_same_draws(tmp_path):
    recipe, options = load("ssa:tiny"), {"progress": False, "log_every": 1}
    whole = fit(recipe, options=FitOptions(**options))
    with pytest.raises(Interrupted):
        fit(recipe, workdir=tmp_path, options=FitOptions(stop_after=20, **options))
    resumed = fit(recipe, workdir=tmp_path, options=FitOptions(**options))
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(resumed.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Unbiased(0.0), "keep=0.0: must be in"),
        (lambda: Unbiased(1.5), "keep=1.5: must be in"),
        (lambda: Local(0), "window=0: must be at least 1"),
        (lambda: Local(4, -2.0), "spread=-2.0: must not be negative"),
        (lambda: LocalGrid(4, 6, 4), "side=4: must divide the grid 4 x 6"),
        (lambda: windows(LocalGrid(4, 6, 2)), "4 x 6 are not the 12 positions"),
        (lambda: SourceDropout(1.0), "rate=1.0: must be in"),
        (lambda: Ensemble(Attention(2), -1), "passes=-1"),
        (lambda: run(module(Local(4)), kv_BxSxD=X), "cross=False"),
        (lambda: run(module(Local(4), cross=True), kv_BxSxD=X[:, :5]), "12 queries and 5 keys"),
        (lambda: run(module(Local(4)), mask=Segments(jnp.ones((B, L)), jnp.ones((B, L)))), "Segm"),
        (lambda: load("ssa:tiny", model__draw="some"), "model.draw='some'"),
        (lambda: load("ssa:tiny", data__images=5000), "data.images=5000"),
        (lambda: load("ssa:tiny", dense__share=1.0), "dense.share=1.0"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_decoding_while_drawing_is_refused():
    layer = module(Unbiased(0.5))
    params = layer.init(jax.random.key(1), X, mask=Causal(), decode=True)
    with pytest.raises(ConfigError, match="reads no cache"):
        layer.apply(
            params, X, mask=Causal(), train=True, decode=True, mutable=["cache"],
            rngs={"dropout": KEY},
        )  # fmt: skip
