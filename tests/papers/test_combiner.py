"""Combiner: identities that must hold, and errors that must be clear."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer.analyze.flops import count
from jaxformer.analyze.implied import implied_weights
from jaxformer.data.base import FixedData
from jaxformer.kernels.attention import Causal, Full, KeyPadding, Window, attention
from jaxformer.models.lm import decoder_lm
from jaxformer.models.transformer import Transformer
from jaxformer.nn.cache import DecodeUnsupported
from jaxformer.nn.make import Make
from jaxformer.papers.combiner.model import (
    Axial,
    CombinerAttention,
    Fixed,
    Logsparse,
    Mixture,
    Tokens,
)
from jaxformer.recipe import ConfigError, Phase, Recipe
from jaxformer.sampling.autoregressive import generate
from jaxformer.tasks import linen
from jaxformer.tasks.language import LanguageTask
from jaxformer.train import optim
from jaxformer.train.fit import FitOptions, fit
from jaxformer.train.updates import GradientUpdate

KEY = jax.random.key(0)
H, K, C = 2, 4, 4


def tokens(length, value=None, valid=None, batch=1, seed=0):
    q, k, v = jax.random.normal(jax.random.key(seed), (3, batch, length, H, K))
    return Tokens(q, k, v if value is None else value, q.reshape(batch, length, -1), valid)


@functools.partial(jax.jit, static_argnums=(0, 2), static_argnames="train")
def run(pattern, t, causal=True, params=None, train=False, rngs=None):
    how = dict(causal=causal, train=train, decode=False, rngs=rngs)
    return pattern.apply({"params": params or {}}, t, **how)


def matrix(pattern, length, causal=True, valid=None, **how):
    """(H, L, L): the weight of each value, read off unit vectors."""
    unit = jnp.broadcast_to(jnp.eye(length)[None, :, None], (1, length, H, length))
    y = run(pattern, tokens(length, unit, valid), causal, **how)
    return np.asarray(y[0]).swapaxes(0, 1)


# The regions of every query, as the paper defines them: (direct, [regions]).


def fixed(i, length, c, causal):
    own = i // c
    blocks = [list(range(s * c, min(s * c + c, length))) for s in range(-(-length // c))]
    if causal:
        return [j for j in blocks[own] if j <= i], blocks[:own]
    return blocks[own], blocks


def fixed_without_own(i, length, c, causal):
    direct, blocks = fixed(i, length, c, causal)
    return direct, [b for b in blocks if i not in b]


def logsparse(i, length, c, causal):
    bits = [bit for bit in range(i.bit_length()) if i >> bit & 1]
    return [i], [list(range(((i >> b) - 1) << b, (i >> b) << b)) for b in bits]


def mixture(i, length, c, causal):
    s, u = divmod(i, c)
    rows = -(-length // c)
    line = lambda s: [s * c + t for t in range(c) if s * c + t < length]
    column = lambda t, over: [r * c + t for r in over if r * c + t < length]
    if causal:
        direct = [j for j in line(s) if j <= i] + column(u, range(s))
        regions = [column(t, range(s)) for t in range(c) if t != u]
        others = range(s)
    else:
        direct = line(s) + [j for j in column(u, range(rows)) if j != i]
        sides = range(s), range(s + 1, rows)
        regions = [column(t, side) for t in range(c) if t != u for side in sides]
        others = [r for r in range(rows) if r != s]
    for r in others:
        regions += [[j for j in line(r) if j % c < u], [j for j in line(r) if j % c > u]]
    return direct, [region for region in regions if region]


REFERENCES = {
    "fixed": (Fixed(segment=C), fixed),
    "fixed without own": (Fixed(segment=C, own=False), fixed_without_own),
    "logsparse": (Logsparse(), logsparse),
    "mixture": (Mixture(segment=C), mixture),
}
CALLS = [("fixed", True), ("logsparse", True), ("mixture", True)]
CALLS += [("fixed", False), ("fixed without own", False), ("mixture", False)]


def reference(regions_of, length, causal):
    """Section 3's p(j|i), query by query."""
    q, k, *_ = (np.asarray(x[0], np.float64) for x in tokens(length)[:2])
    softmax = lambda s: np.exp(s - s.max()) / np.exp(s - s.max()).sum()
    p = np.zeros((H, length, length))
    for h in range(H):
        for i in range(length):
            direct, regions = regions_of(i, length, C, causal)
            keys = [k[j, h] for j in direct] + [k[r, h].max(0) for r in regions]
            shares = softmax(np.array(keys) @ q[i, h] / K**0.5)
            p[h, i, direct] += shares[: len(direct)]
            for share, r in zip(shares[len(direct) :], regions, strict=True):
                p[h, i, r] += share * softmax(k[r, h] @ q[r, h].max(0) / K**0.5)
    return p


@pytest.mark.parametrize(("name", "causal"), CALLS)
def test_every_position_is_in_a_region(name, causal):
    for length in range(2, 66):
        for i in range(length):
            direct, regions = REFERENCES[name][1](i, length, C, causal)
            seen = [*direct, *(j for region in regions for j in region)]
            assert set(seen) == set(range(i + 1 if causal else length))
            assert len(set(direct)) == len(direct)
            if name in ("logsparse", "fixed without own") or (name == "fixed" and causal):
                assert len(seen) == len(set(seen))  # a partition


@pytest.mark.parametrize(
    ("name", "causal", "length"),
    [(name, causal, length) for name, causal in CALLS for length in (13, 16)]
    + [("logsparse", True, length) for length in (2, 5, 17)],
)
def test_is_the_structured_distribution(name, causal, length):
    """Levels of Logsparse: 2^k + 1 positions need k + 1, of which the authors' code has k."""
    pattern, regions_of = REFERENCES[name]
    found = matrix(pattern, length, causal)
    np.testing.assert_allclose(found, reference(regions_of, length, causal), atol=1e-5)
    np.testing.assert_allclose(found.sum(-1), 1.0, atol=1e-5)
    allowed = np.tri(length, dtype=bool) if causal else np.ones((length, length), bool)
    assert np.all(found[:, ~allowed] == 0) and np.all(found[:, allowed] > 0)


@pytest.mark.parametrize("length", [13, 16])
def test_axial_is_full_and_causal(length):
    layer = CombinerAttention(H, Make(Axial, segment=C))
    x = jax.random.normal(KEY, (2, length, H * K))
    params = jax.jit(layer.init)(KEY, x, mask=Causal())
    found = implied_weights(layer, params, x, mask=Causal(), keep=["summary"])
    np.testing.assert_allclose(found.sum(-1), 1.0, atol=1e-5)
    allowed = np.tri(length, dtype=bool)
    assert np.all(found[..., ~allowed] == 0) and np.all(found[..., allowed] > 0)
    answer = jax.jit(lambda x: layer.apply(params, x, mask=Causal()))
    y, later = answer(x), answer(x.at[:, 9:].add(1.0))
    np.testing.assert_array_equal(y[:, :9], later[:, :9])


@pytest.mark.parametrize(
    ("pattern", "length", "causal"),
    [
        (Fixed(segment=20), 11, True),
        (Fixed(segment=1), 11, True),
        (Logsparse(), 2, True),
        (Mixture(segment=11), 11, True),
        (Mixture(segment=1), 11, True),
        (Axial(segment=11), 11, True),
        (Fixed(segment=20, own=False), 11, False),
        (Fixed(segment=1, own=False), 11, False),
        (Mixture(segment=1), 11, False),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, int | bool) else str(x),
)
def test_degenerate_grids_are_softmax_attention(pattern, length, causal):
    t = tokens(length)
    params = {}
    if isinstance(pattern, Axial):
        call = dict(causal=True, train=False, decode=False)
        params = jax.jit(lambda t: pattern.init(KEY, t, **call))(t)["params"]
    found = run(pattern, t, causal, params)
    plain = attention(*t[:3], mask=Causal() if causal else Full())
    np.testing.assert_allclose(found, plain, atol=1e-5)


def test_without_preferences_it_is_a_mean_of_means():
    """Queries of 0: a direct position weighs as much as a whole region."""
    t = tokens(16)
    t = t._replace(q_BxLxHxK=0 * t.q_BxLxHxK, k_BxLxHxK=jnp.ones_like(t.k_BxLxHxK))
    v = np.asarray(t.v_BxLxHxV[0])
    y = run(Fixed(segment=C), t)
    for i in (0, 5, 15):
        direct, regions = fixed(i, 16, C, True)
        expected = np.mean([*v[direct], *(v[r].mean(0) for r in regions)], axis=0)
        np.testing.assert_allclose(y[0, i], expected, atol=1e-5)


@pytest.mark.parametrize(
    "pattern", [Fixed(segment=C), Fixed(segment=C, own=False), Mixture(segment=C)]
)
def test_padding_is_nothing(pattern):
    t = tokens(14, valid=jnp.arange(14)[None] < 9)
    y = run(pattern, t, False)
    alone = run(pattern, Tokens(*(x[:, :9] for x in t[:4])), False)
    np.testing.assert_allclose(y[:, :9], alone, atol=1e-5)
    of_sum = jax.grad(lambda t: run(pattern, t, False)[:, :9].sum(), allow_int=True)
    gradient = jax.jit(of_sum)(t)
    assert all(np.all(np.isfinite(x)) for x in gradient[:3])


def test_dropout_is_of_direct_weights():
    pattern = Fixed(segment=C, dropout=0.5)
    plain = matrix(pattern, 13)
    dropped = matrix(pattern, 13, train=True, rngs={"dropout": KEY})
    own = np.arange(13)[:, None] // C == np.arange(13) // C
    np.testing.assert_allclose(dropped[:, ~own], plain[:, ~own], atol=1e-6)
    ratio = dropped[:, own & np.tri(13, dtype=bool)] / plain[:, own & np.tri(13, dtype=bool)]
    assert set(np.round(np.unique(ratio), 3)) <= {0.0, 2.0} and 0.3 < (ratio == 0).mean() < 0.7


def test_cost():
    """Scores per query, with c columns and S rows; products grow as L^1.5 for c = sqrt L."""

    def scores(pattern, length):
        t = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tokens(length))
        return count(lambda t: run(pattern, t), t) / (4 * H * K * length)

    for cls in (Fixed, Mixture):
        ratio = scores(cls(segment=64), 4096) / scores(cls(segment=32), 1024)
        assert ratio == pytest.approx(2, rel=0.05)
    c, s = 16, 32
    # Beside the scores of the softmax, those that the values of regions are made by.
    assert scores(Fixed(segment=c), c * s) <= (c + s) + 1
    assert scores(Mixture(segment=c), c * s) <= (3 * s + 2 * c) + (s + 2 * c)
    # With itself, and at each level half of the positions see blocks that hold the other half.
    assert scores(Logsparse(), 256) == 1 + 8 * (1 / 2 + 1 / 2)


@pytest.mark.parametrize("pattern", [Fixed(segment=64), Mixture(segment=64), Logsparse()])
def test_no_square_array_is_made(pattern):
    """Temporary memory, forwards and backwards, grows as the scores do: L^1.5 at the most."""

    def temporary(length):
        t = jax.eval_shape(lambda: tokens(length))
        program = jax.jit(jax.grad(lambda t: jnp.square(run(pattern, t)).sum()))
        return program.lower(t).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(2048), temporary(4096)
    assert long < 3 * short and long < 4096**2 * 4  # bytes of the scores of one head


def language_model(pattern, **sizes):
    trunk = Transformer(**{"width": 16, "depth": 2, "heads": H, "mlp": "relu", **sizes})
    return decoder_lm(
        trunk, vocabulary=10, length=26, mixer=Make(CombinerAttention, heads=H, pattern=pattern)
    )


def test_fixed_decodes_as_it_trains():
    """Parts of every size, across borders of segments; the cache holds whole segments."""
    lm = language_model(Make(Fixed, segment=C))
    x = jax.random.randint(KEY, (2, 26), 0, 10)
    params = jax.jit(lm.init)(KEY, x)["params"]
    whole = jax.jit(lm.apply)({"params": params}, x)
    cache, end = linen.start_cache(lm, 2, 26), 0
    decode = jax.jit(linen.decode, static_argnums=0)
    for size in (1, 6, 1, 1, 9, 6, 1, 1):
        logits, cache = decode(lm, params, {}, cache, x[:, end : end + size])
        end += size
        np.testing.assert_allclose(logits[:, -1], whole[:, end - 1], atol=1e-4)
    assert cache["stack"]["block_0"]["mixer"]["pattern"]["state"]["kv_cache"]["key"].shape[2] == 28


def test_rows_decode_at_places_of_their_own():
    """Each row counts for itself: rows of a batch may be in different segments."""
    lm = language_model(Make(Fixed, segment=C))
    x = jax.random.randint(KEY, (2, 26), 0, 10)
    params = jax.jit(lm.init)(KEY, x)["params"]
    whole = jax.jit(lm.apply)({"params": params}, x)
    caches, decode = [], jax.jit(linen.decode, static_argnums=0)
    for row, read in enumerate((7, 13)):
        one = linen.start_cache(lm, 1, 26)
        caches.append(decode(lm, params, {}, one, x[row : row + 1, :read])[1])
    like = linen.start_cache(lm, 2, 26)
    both = jax.tree.map(lambda *xs: jnp.stack(xs[1:]).reshape(xs[0].shape), like, *caches)
    now = jnp.stack([x[0, 7:9], x[1, 13:15]])
    logits, _ = decode(lm, params, {}, both, now)
    np.testing.assert_allclose(logits[:, -1], jnp.stack([whole[0, 8], whole[1, 14]]), atol=1e-4)


@pytest.mark.slow
def test_two_sequences_are_learnt_by_heart(one_device):
    """The authors' toy: 2 layers of width 16, segments of 4; Adam at 5e-3, where they took 1e-3."""
    rows = np.random.default_rng(0).integers(0, 10, (2, 13)).astype(np.int32)
    rows[:, 0] = [1, 2]  # the sequences differ from the start
    task = LanguageTask(language_model(Make(Fixed, segment=C)))
    optimizer = optim.optimizer(optim.adamw(), optim.schedule(5e-3, 400, kind="constant"))
    phase = Phase("train", 400, FixedData({"tokens": rows}), GradientUpdate(task, optimizer))
    state = fit(Recipe(task, [phase]), mesh=one_device, options=FitOptions(progress=False))
    output = task.loss(state.params, {}, {"tokens": rows}, key=KEY, train=False)
    assert output.loss < 0.02
    prompts = [row[:1].tolist() for row in rows]
    written = generate(task, state.params, {}, prompts, length=12, key=KEY, temperature=0.0)
    np.testing.assert_array_equal(written, rows[:, 1:])


def layer_of(pattern, **fields):
    return CombinerAttention(H, pattern, **fields)


@pytest.mark.parametrize(
    ("pattern", "how", "said"),
    [
        (Make(Fixed, segment=0), {}, r"model\.segment=0: must be at least 1"),
        (
            Make(Logsparse),
            {"mask": Full()},
            "Logsparse is causal .* allowed for it: fixed",
        ),
        (Make(Axial), {"mask": Full()}, "Axial is causal"),
        (Make(Fixed), {"mask": Window(3, 0)}, "cannot follow Window"),
        (Make(Fixed), {"kv_BxSxD": jnp.ones((1, 3, 8))}, "regions are of one sequence"),
        (
            Make(Fixed),
            {"mask": Causal() & KeyPadding(jnp.ones((1, 6), bool))},
            "takes no padding; put it at the end",
        ),
    ],
)
def test_mistakes_are_named(pattern, how, said):
    with pytest.raises(ConfigError, match=said):
        layer_of(pattern).init(KEY, jnp.ones((1, 6, 8)), **{"mask": Causal(), **how})


def test_more_mistakes_are_named():
    x = jnp.ones((1, 6, 9))
    with pytest.raises(ConfigError, match=r"model\.heads=2: must divide the width 9"):
        layer_of(Make(Fixed)).init(KEY, x, mask=Causal())
    for pattern in (Axial, Mixture, Logsparse):
        with pytest.raises(DecodeUnsupported):
            layer_of(Make(pattern)).init(KEY, jnp.ones((1, 6, 8)), mask=Causal(), decode=True)
    with pytest.raises(ConfigError, match=r"model\.pattern='sparse': must be one of fixed"):
        jaxformer.load("combiner:tiny", model__pattern="sparse")
    with pytest.raises(ConfigError, match=r"model\.vocabulary=10: data\.task='digits' has 18"):
        jaxformer.load("combiner:tiny", model__vocabulary=10)
    with pytest.raises(ConfigError, match=r"data\.period=64: nothing of it is seen again"):
        jaxformer.load("combiner:tiny", data__task="repeat", data__period=64)


def test_repeated_rows_are_scored_where_they_can_be_known():
    recipe = jaxformer.load("combiner:tiny", data__task="repeat", data__length=10, data__period=4)
    data = recipe.phases[0].data
    rows = data.draw(data.batch(0))
    found = np.asarray(rows["tokens"])
    np.testing.assert_array_equal(found[:, 4:], found[:, :-4])
    np.testing.assert_array_equal(rows["weight"][0], [0] * 3 + [1] * 7)
