"""URPE: identities that must hold, and errors that must be clear."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.data.sources.positions import PositionTask
from jaxformer.kernels.attention import Causal, Full, KeyPadding, Toeplitz, attention
from jaxformer.models.lm import decoder_lm
from jaxformer.models.transformer import Transformer
from jaxformer.nn.attention import Attention, Fused, Unfused
from jaxformer.nn.make import Make
from jaxformer.nn.position import At
from jaxformer.nn.relative import TableScheme
from jaxformer.papers.urpe.model import Buckets, Tables, Unique, encoder
from jaxformer.recipe import ConfigError
from jaxformer.tasks import linen
from jaxformer.train.optim import decays

KEY = jax.random.key(0)
L, H, D = 11, 2, 8


def tables(seed=0, length=L):
    b, c = jax.random.normal(jax.random.key(seed), (2, 2 * length - 1, H))
    return TableScheme(Unique(length), length - 1, b, c, strict=True)


@pytest.fixture(scope="module")
def layer():
    module = Attention(H)
    x = jax.random.normal(KEY, (2, L, D))
    return module, x, module.init(KEY, x, mask=Full())


def run(layer, scheme, mask=None, core=None):
    module, x, params = layer
    module = module if core is None else Attention(H, core=Make(core))
    return module.apply(params, x, mask=mask or Full(), scheme=scheme)


def changed(scheme, **how):
    return dataclasses.replace(scheme, **how)


def test_ones_are_relative_positions_alone(layer):
    scheme = tables()
    ones = changed(scheme, weight=jnp.ones_like(scheme.weight))
    plain = changed(scheme, weight=None)
    np.testing.assert_array_equal(run(layer, ones, core=Unfused), run(layer, plain, core=Unfused))
    np.testing.assert_allclose(run(layer, ones), run(layer, plain), atol=1e-6)


def test_output_is_linear_in_c(layer):
    scheme, bias = tables(), layer[2]["params"]["out"]["bias"]
    one, twice = (run(layer, changed(scheme, weight=a * scheme.weight)) - bias for a in (1.0, -2.5))
    np.testing.assert_allclose(-2.5 * one, twice, atol=1e-5)
    nothing = run(layer, changed(scheme, weight=0 * scheme.weight))
    np.testing.assert_array_equal(nothing, jnp.broadcast_to(bias, nothing.shape))


@pytest.mark.parametrize("depth", [1, 3, 6])
@pytest.mark.parametrize("shared", [True, False])
def test_only_c_tells_equal_tokens_apart(depth, shared):
    """Theorem 1: rows of one token stay equal under any B; random C makes them differ."""
    trunk = Transformer(width=16, depth=depth, heads=H, order="post", position="none")
    tokens = jnp.full((2, L), 7)
    spread = {}
    for position in ("rpe", "urpe"):
        model = encoder(trunk, vocabulary=9, offsets=Unique(L), position=position, shared=shared)()
        params = model.init(KEY, tokens)

        def noisy(path, leaf):
            key = jax.random.fold_in(KEY, len(jax.tree_util.keystr(path)))
            return leaf + jax.random.normal(key, leaf.shape)

        y = model.apply(jax.tree_util.tree_map_with_path(noisy, params), tokens)
        spread[position] = float(jnp.abs(y - y[:, :1]).max())
    assert spread["rpe"] <= 1e-5 and spread["urpe"] > 1e-2


def test_tables_grow_by_offsets_and_heads():
    trunk = Transformer(width=16, depth=3, heads=H, order="post", position="none")

    def count(position):
        model = encoder(trunk, vocabulary=9, offsets=Unique(L), position=position)()
        return sum(x.size for x in jax.tree.leaves(model.init(KEY, jnp.zeros((1, L), int))))

    assert count("urpe") - count("rpe") == (2 * L - 1) * H == count("rpe") - count("none")


def test_longer_tables_hold_shorter_ones(layer):
    """Entries go by offset alone: the middle of a longer table gives the same output."""
    scheme = tables(length=L + 4)
    middle = slice(4, 4 + 2 * L - 1)
    short = TableScheme(Unique(L), L - 1, scheme.bias[middle], scheme.weight[middle], strict=True)
    np.testing.assert_allclose(run(layer, scheme), run(layer, short), atol=1e-6)


@pytest.mark.parametrize(
    "mask",
    [Full(), Causal(), KeyPadding(jnp.array([L, 6])), Causal() & KeyPadding(jnp.array([L, 6]))],
    ids=["full", "causal", "padded", "both"],
)
def test_gradients_are_those_of_the_dense_form(layer, mask):
    scheme = tables()

    def loss(tables, params, core):
        b, c = tables
        y = Attention(H, core=Make(core)).apply(
            params, layer[1], mask=mask, scheme=changed(scheme, bias=b, weight=c)
        )
        return jnp.sum(jnp.sin(y))

    args = (scheme.bias, scheme.weight), layer[2]
    fused, dense = (jax.grad(loss, (0, 1))(*args, core) for core in (Fused, Unfused))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), fused, dense)


def test_padded_keys_count_for_nothing(layer):
    module, x, params = layer
    mask = KeyPadding(jnp.array([L, 6]))
    other = x.at[1, 6:].add(3.0)
    one, two = (module.apply(params, a, mask=mask, scheme=tables()) for a in (x, other))
    np.testing.assert_array_equal(one[1, :6], two[1, :6])


def language_model():
    trunk = Transformer(width=16, depth=2, heads=H, position="none")
    lm = decoder_lm(trunk, vocabulary=9, length=L)
    return dataclasses.replace(lm, scheme=Make(Tables, offsets=Unique(L), heads=H))


def test_causal_models_with_and_without_a_cache():
    """Outputs do not see later tokens, and decoding shifts the row of C at every step."""
    lm = language_model()
    tokens = jax.random.randint(KEY, (2, L), 0, 9)
    params = lm.init(KEY, tokens)["params"]
    c = jax.random.normal(KEY, params["scheme"]["scale"].shape)
    params = {**params, "scheme": {**params["scheme"], "scale": c}}
    whole = lm.apply({"params": params}, tokens)
    other = lm.apply({"params": params}, tokens.at[:, 6:].set(0))
    np.testing.assert_array_equal(whole[:, :6], other[:, :6])
    cache = linen.start_cache(lm, 2, L)
    for t in range(L):
        logits, cache = linen.decode(lm, params, {}, cache, tokens[:, t : t + 1])
        np.testing.assert_allclose(logits[:, -1], whole[:, t], atol=1e-5)


def test_no_square_array_is_made():
    """Temporary memory at twice the length is about twice, forwards and backwards."""

    def temporary(length):
        scheme = TableScheme(Unique(length), length - 1, *jnp.ones((2, 2 * length - 1, H)))
        q = jnp.ones((1, length, H, 8))

        def loss(b, c, q):
            band = {"bias": Toeplitz(b.T), "weight": Toeplitz(c.T)}
            mods = scheme.mods(H, At(length, length))
            o = attention(q, q, q, score_mod=mods.score_mod, prob_mod=mods.prob_mod, aux=band)
            return jnp.square(o).sum()

        program = jax.jit(jax.grad(loss, (0, 1, 2)))
        compiled = program.lower(scheme.bias, scheme.weight, q).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(2048), temporary(4096)
    assert long < 2.5 * short and long < 4096**2 * 4


def test_buckets_keep_near_offsets_apart():
    buckets = Buckets(128)
    at = np.arange(-127, 128)
    index = buckets(at)
    assert index.min() == 0 and index.max() == 64 and buckets.entries == 65
    near = index[np.abs(at) < 16]
    assert len(set(near)) == len(near)
    np.testing.assert_array_equal(buckets.signed(-at), -buckets.signed(at))


def test_tables_are_not_decayed():
    params = language_model().init(KEY, jnp.zeros((1, L), int))["params"]
    assert decays(params)["scheme"] == {"bias": False, "scale": False}


def test_labels_of_the_tasks():
    keys = jax.random.split(KEY, 3)
    even = PositionTask("even", 8, 64)(KEY, keys)
    inputs = np.asarray(even["inputs"])
    assert inputs.min() >= 11 and inputs.max() <= 54
    np.testing.assert_array_equal(even["label"][:, :4], inputs[:, 1::2])
    assert (even["label"][:, 4:] == 62).all()
    position = PositionTask("position", 8, 64, identical=True, ignore_first=True)(KEY, keys)
    assert (position["inputs"] == position["inputs"][:, :1]).all()
    np.testing.assert_array_equal(position["label"][0], np.arange(8))
    np.testing.assert_array_equal(position["weight"][0], [0] + [1] * 7)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda layer: run(layer, tables(length=L - 1)), r"model\.length=10: a sequence has 11"),
        (
            lambda layer: run(layer, changed(tables(), bias=jnp.ones((2 * L - 1, 3)))),
            r"model\.heads=2: the table has 3",
        ),
        (lambda layer: PositionTask("odd", 8, 64), r"data\.task='odd': must be one of even"),
        (lambda layer: PositionTask("even", 7, 64), r"data\.length=7: must be even"),
        (
            lambda layer: encoder(
                Transformer(width=8, depth=1, heads=1),
                vocabulary=9,
                offsets=Unique(4),
                position="x",
            ),
            r"model\.position='x': must be one of urpe, rpe, none",
        ),
    ],
)
def test_mistakes_are_named(layer, act, said):
    with pytest.raises(ConfigError, match=said):
        act(layer)
