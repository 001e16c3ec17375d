"""SeqPE: identities that must hold, and errors that must be clear."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer import paths
from jaxformer.data.base import DeviceData, Numbered
from jaxformer.kernels.attention import Causal, Full
from jaxformer.models.lm import decoder_lm
from jaxformer.models.transformer import Transformer
from jaxformer.nn.attention import Attention, Fused, Unfused
from jaxformer.nn.make import Make
from jaxformer.papers.seqpe import losses
from jaxformer.papers.seqpe.data import LookBack
from jaxformer.papers.seqpe.encoder import SequentialPE, Strings, encode
from jaxformer.papers.seqpe.model import (
    AddScores,
    GridPE,
    Pair,
    Pairs,
    add,
    multiply,
    scheme,
)
from jaxformer.papers.seqpe.sampler import Sampler, edit
from jaxformer.recipe import ConfigError
from jaxformer.tasks import linen
from jaxformer.train.states import on_device

KEY = jax.random.key(0)
L, H, K = 11, 2, 8
LINE = Sampler(Strings(300), (16,), starts=6, candidates=12, near=40, compared=7)
PLANE = Sampler(Strings(900, 2), (5, 4), starts=6, candidates=12, near=40, compared=7)
ADDED, FULL = AddScores(), Full()
both = pytest.mark.parametrize("sampler", [LINE, PLANE], ids=["line", "plane"])


def encoder(strings, out=16):
    g = SequentialPE(strings, width=16, heads=2, out=out)
    zeros = jnp.zeros((1, strings.length), jnp.int32)
    return g.bind({"params": g.init(KEY, zeros)["params"]})


@pytest.fixture(scope="module")
def layer():
    module = Attention(H)
    x = jax.random.normal(KEY, (3, L, H * K))
    a, b = jax.random.normal(jax.random.key(1), (2, 1, L, H, K))
    return module, x, module.init(KEY, x, mask=Full()), a, b


def attend(layer, how=ADDED, a=None, b=None, core=Fused, mask=FULL):
    module, x, params, *pair = layer
    a, b = (pair[i] if part is None else part for i, part in enumerate((a, b)))
    module = dataclasses.replace(module, core=Make(core))
    scheme = None if how is None else Pairs(jnp.zeros(()), None, a, b, how)
    return module.apply(params, x, mask=mask, scheme=scheme)


# ---------------------------------------------------------------------------------- strings, g


def test_strings_of_digits():
    np.testing.assert_array_equal(Strings(20_000)(np.array([123])), [[0, 0, 1, 2, 3]])
    np.testing.assert_array_equal(Strings(10_000, 2)(np.array([[7, 42]])), [[0, 7, 4, 2]])
    assert Strings(20_000).digits == 5 and Strings(10_000, 2).side == 100
    assert Strings(1001).digits == 4 and Strings(1000).digits == 3


@pytest.mark.parametrize("axes", [1, 2])
def test_vectors_depend_on_the_digits_alone(axes):
    strings = Strings(1000**axes, axes)
    g = encoder(strings)
    shape = (40, axes) if axes > 1 else (40,)
    at = jax.random.randint(KEY, shape, 0, strings.side)
    s = encode(g, at[None])[0]
    order = jax.random.permutation(KEY, 40)
    np.testing.assert_allclose(encode(g, at[order][None])[0], s[order], atol=1e-6)
    np.testing.assert_allclose(encode(g, at[5:7][None])[0], s[5:7], atol=1e-6)
    others = np.unique(np.asarray(at), axis=0)
    apart = encode(g, jnp.asarray(others)[None])[0]
    distance = jnp.square(apart[:, None] - apart).sum(-1) + jnp.eye(len(others))
    assert distance.min() > 1e-6


def test_rows_are_not_columns():
    s = encode(encoder(Strings(10_000, 2)), jnp.array([[[3, 8], [8, 3]]]))[0]
    assert float(jnp.abs(s[0] - s[1]).max()) > 1e-3


def test_positions_that_only_the_device_knows_give_nan_out_of_range():
    g = encoder(Strings(1000))
    s = jax.jit(functools.partial(encode, g))(jnp.array([[999, 1000, -1, 0]]))
    np.testing.assert_array_equal(jnp.isnan(s).all(-1)[0], [False, True, True, False])
    assert bool(jnp.isfinite(s[0, ::3]).all())


# ------------------------------------------------------------------------------- in attention


@pytest.mark.parametrize("mask", [Full(), Causal()], ids=["full", "causal"])
def test_added_scores_are_those_of_both_products(layer, mask):
    _, x, params, a, b = layer
    project = functools.partial(jnp.einsum, "BLD,DHK->BLHK", x)
    p = params["params"]
    q, k, v = (project(p[n]["kernel"]) + p[n]["bias"] for n in ("query", "key", "value"))
    weight = 0.7
    scores = jnp.einsum("BLHK,BSHK->BHLS", q, k) + weight * jnp.einsum("bLHK,bSHK->bHLS", a, b)
    scores = scores / K**0.5
    if mask == Causal():
        scores = jnp.where(jnp.tri(L, dtype=bool), scores, -jnp.inf)
    y = jnp.einsum("BHLS,BSHK->BLHK", jax.nn.softmax(scores), v)
    y = jnp.einsum("BLHK,HKD->BLD", y, p["out"]["kernel"]) + p["out"]["bias"]
    np.testing.assert_allclose(attend(layer, AddScores(weight), mask=mask), y, atol=1e-5)


def test_what_leaves_attention_as_it_is(layer):
    plain = attend(layer, None)
    one, zero = jnp.ones_like(layer[3]), jnp.zeros_like(layer[3])
    np.testing.assert_allclose(attend(layer, AddScores(0.0)), plain, atol=1e-6)
    np.testing.assert_array_equal(attend(layer, multiply, one, one), plain)
    np.testing.assert_array_equal(attend(layer, add, zero, zero), plain)
    for how in (AddScores(), multiply, add):
        assert float(jnp.abs(attend(layer, how) - plain).max()) > 1e-2


@pytest.mark.parametrize("how", [AddScores(), multiply, add])
def test_fused_and_open_attention_agree(layer, how):
    def loss(pair, core):
        return jnp.sum(jnp.sin(attend(layer, how, *pair, core=core)))

    fused, dense = (jax.grad(loss)(layer[3:], core) for core in (Fused, Unfused))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), fused, dense)


def test_one_pair_may_serve_all_heads(layer):
    a, b = layer[3][:, :, :1], layer[4][:, :, :1]
    spread = (jnp.broadcast_to(x, layer[3].shape) for x in (a, b))
    np.testing.assert_array_equal(attend(layer, a=a, b=b), attend(layer, AddScores(), *spread))


def test_no_square_array_is_made():
    """Temporary memory at twice the length is about twice, forwards and backwards."""

    def temporary(length):
        layer = Attention(H)
        x = jnp.ones((1, length, H * K))
        a = jnp.ones((1, length, H, K))
        params = jax.eval_shape(functools.partial(layer.init, KEY, mask=Full()), x)

        def loss(params, x, a):
            pairs = Pairs(x, None, a, a)
            return jnp.square(layer.apply(params, x, mask=Full(), scheme=pairs)).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(params, x, a).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(2048), temporary(4096)
    assert long < 2.5 * short and long < 4096**2 * 4


def language_model(kv_heads=None):
    trunk = Transformer(width=H * K, depth=2, heads=H, kv_heads=kv_heads, position="none")
    lm = decoder_lm(trunk, vocabulary=9, length=L)
    return dataclasses.replace(lm, scheme=scheme(Strings(100), H, K))


def test_a_decoder_reads_on_from_its_cache():
    """Positions are encoded as they come, and rows may have read prompts of their own length."""
    lm = language_model()
    tokens = jax.random.randint(KEY, (2, L), 0, 9)
    params = lm.init(KEY, tokens)["params"]
    whole = lm.apply({"params": params}, tokens)
    other = lm.apply({"params": params}, tokens.at[:, 6:].set(0))
    np.testing.assert_array_equal(whole[:, :6], other[:, :6])
    cache = linen.start_cache(lm, 2, L)
    logits, cache = linen.decode(lm, params, {}, cache, tokens[:, :5])
    np.testing.assert_allclose(logits[:, -1], whole[:, 4], atol=1e-5)
    for t in range(5, L):
        logits, cache = linen.decode(lm, params, {}, cache, tokens[:, t : t + 1])
        np.testing.assert_allclose(logits[:, -1], whole[:, t], atol=1e-5)


def test_parameters_do_not_grow_with_the_sequence():
    lm = language_model()
    params = lm.init(KEY, jnp.zeros((1, L), int))["params"]
    longer = lm.apply({"params": params}, jnp.zeros((1, 8 * L), int))
    assert longer.shape == (1, 8 * L, 9) and bool(jnp.isfinite(longer).all())


def test_given_positions_are_those_of_the_sequence():
    lm = language_model()
    tokens = jax.random.randint(KEY, (2, L), 0, 9)
    params = lm.init(KEY, tokens)
    at = jnp.broadcast_to(jnp.arange(L), (2, L))
    np.testing.assert_allclose(
        lm.apply(params, tokens, positions=at), lm.apply(params, tokens), atol=1e-6
    )
    moved = lm.apply(params, tokens, positions=at + jnp.array([[0], [30]]))
    np.testing.assert_allclose(moved[0], lm.apply(params, tokens)[0], atol=1e-6)
    assert float(jnp.abs(moved[1] - lm.apply(params, tokens)[1]).max()) > 1e-4


def test_the_class_token_of_an_image_has_a_vector_of_its_own():
    strings = Strings(400, 2)
    g = Make(SequentialPE, strings=strings, width=16, heads=2, out=16)
    module = GridPE(g, Make(Pair, heads=H, head_size=K, how=multiply))
    x = jnp.zeros((1, 1 + 9, 16))
    params = module.init(KEY, x, method="place")["params"]
    pairs = module.apply({"params": params}, x, method="place")
    np.testing.assert_array_equal(pairs.s[0, 0], jnp.zeros(16))
    inside = SequentialPE(strings, width=16, heads=2, out=16)
    at = jnp.array([[[0, 0], [0, 1], [0, 2], [1, 0]]])
    alone = encode(inside.bind({"params": params["encoder"]}), at)
    np.testing.assert_allclose(pairs.s[0, 1:5], alone[0], atol=1e-6)


# ------------------------------------------------------------------------------------ samplers


@both
def test_candidates_hold_the_nearest_and_neither_pivot_nor_twins(sampler):
    draw = jax.jit(sampler.draw)
    kinds = set()
    for step in range(25):
        pivots, candidates, labels = (np.asarray(x) for x in draw(3, step).contrast)
        assert candidates.min() >= 0 and candidates.max() < sampler.strings.side
        for pivot, of_pivot, label in zip(pivots, candidates, labels, strict=True):
            distance = np.square(of_pivot - pivot).sum(-1)
            assert label == distance.argmin() and distance.min() > 0
            assert len({tuple(c) for c in of_pivot}) == sampler.candidates
            kinds.add(bool(np.ptp(of_pivot, axis=0).max() < sampler._window))
    assert kinds == {True, False}


@both
def test_pivots_pass_over_all_positions(sampler):
    steps, draw = sampler.count // sampler.starts, jax.jit(sampler.draw)
    pivots = [tuple(p) for i in range(steps) for p in np.asarray(draw(0, i).contrast.pivot)]
    assert len(set(pivots)) == len(pivots) == sampler.count


@both
def test_blocks_lie_where_they_may(sampler):
    draw = jax.jit(sampler.draw)
    block, side = np.asarray(sampler.block), sampler.strings.side
    shifted = 0
    for step in range(40):
        d = jax.device_get(draw(1, step))
        shifted += bool(d.shifted)
        assert d.start.min() >= 0 and (d.start + block <= side).all()
        assert all(len(set(row)) == sampler.compared for row in d.comparison.index)
        origin = d.comparison.far - sampler.inside[d.comparison.index]
        assert (origin == origin[:, :1]).all() and (origin + block < side + 1).all()
        least = block if len(block) > 1 else block // 4
        assert (origin[:, 0] >= least).any(-1).all()
    assert 0 < shifted < 20
    starts = {tuple(s) for i in range(200) for s in np.asarray(draw(1, i).start)}
    assert len(starts) <= sampler.pool


def test_draws_depend_on_seed_and_step_alone():
    draw = jax.jit(LINE.draw)
    a, b, c, d = draw(0, 5), draw(0, 5), draw(0, 6), draw(1, 5)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    for other in (c, d):
        assert (a.contrast.candidates != other.contrast.candidates).any()


def test_edits_of_digits():
    drawn = jax.random.bits(KEY, (400, 4), jnp.uint32)
    x, good = jax.jit(jax.vmap(functools.partial(edit, 472)))(drawn)
    fine = {int(v) for v, ok in zip(x, good, strict=True) if ok}
    assert {742, 427, 274, 47, 42, 72} <= fine  # swapped, deleted
    assert any(1000 <= v < 10_000 for v in fine) and 471 in fine
    refused = {int(v) for v, ok in zip(x, good, strict=True) if not ok}
    assert refused and all(v == 72 or v < 1000 for v in refused)
    zero, good = jax.vmap(functools.partial(edit, 0))(drawn)
    assert all(0 <= int(v) < 100 for v, ok in zip(zero, good, strict=True) if ok)


# -------------------------------------------------------------------------------------- losses


def test_equal_blocks_have_nothing_to_transfer():
    s = jax.random.normal(KEY, (3, 5, 16))
    assert abs(float(losses.transfer(s, s, 4))) <= 1e-7
    assert float(losses.transfer(s, s[:, ::-1], 4)) > 1e-3


def test_the_teacher_learns_only_where_beta_is_less_than_one():
    t, s = jax.random.normal(KEY, (2, 3, 5, 16))
    of_t, of_s = jax.grad(losses.transfer, (0, 1))(t, s, 4, 1.0)
    assert not np.any(of_t) and np.any(of_s)
    assert np.any(jax.grad(losses.transfer)(t, s, 4, 0.5))


@pytest.fixture(scope="module")
def tiny():
    recipe = jaxformer.load("seqpe:tiny")
    data = recipe.phases[0].data
    batch = jax.jit(lambda b: on_device(data, b))(data.batch(0))
    params, extra = recipe.task.init(KEY, batch)
    return recipe.task, params, extra, batch


@pytest.mark.parametrize("shifted", [False, True])
def test_losses_of_positions_reach_the_encoder_alone(tiny, shifted):
    task, params = tiny[0].positions, tiny[1]
    draw = task.sampler.draw(0, 0)._replace(shifted=jnp.asarray(shifted))

    def auxiliary(params):
        found = task.positions(params, draw, KEY)
        return found.contrast + found.transfer

    reached = {
        name for name, g in paths.leaves(jax.jit(jax.grad(auxiliary))(params)).items() if np.any(g)
    }
    inside = {name for name in paths.leaves(params) if name.startswith("scheme/encoder/")}
    assert reached <= inside
    # The bias of the projection moves all vectors alike, that of keys all scores of a query.
    assert {n for n in inside - reached if not n.endswith("key/bias")} == set()


def test_row_i_of_a_shifted_batch_has_offset_i_mod_b(tiny):
    task, params, _, batch = tiny
    draw = task.positions.sampler.draw(0, 0)._replace(shifted=jnp.asarray(True))
    vectors = task.positions.positions(params, draw, KEY).vectors
    b, length = task.positions.sampler.starts, batch["inputs"].shape[1]
    starts = draw.start[:, 0]
    assert len(set(starts.tolist())) == b
    given = task.positions.encoder.given(vectors, batch["row"] % b)
    lm = task.task.model
    handed = lm.apply({"params": params, **given}, batch["inputs"])
    at = starts[jnp.arange(len(batch["row"])) % b][:, None] + jnp.arange(length)
    placed = lm.apply({"params": params}, batch["inputs"], positions=at)
    np.testing.assert_allclose(handed, placed, atol=1e-5)


def test_a_step_is_the_sum_of_its_losses(tiny):
    task, params, extra, batch = tiny
    step = jax.jit(functools.partial(task.loss, key=KEY, train=True))
    found = step(params, extra, batch)
    metrics = {name: float(m.value()) for name, m in found.metrics.items()}
    whole = metrics["loss"] + 0.1 * metrics["contrastive"] + 0.1 * metrics["transfer"]
    np.testing.assert_allclose(found.loss, whole, rtol=1e-6)
    assert found.extra == extra
    measured = task.loss(params, extra, batch, key=KEY, train=False)
    assert set(measured.metrics) == {"loss", "accuracy"}


def test_numbered_data_carries_the_address_of_its_rows():
    rows = DeviceData(LookBack(8, 5), 6, seed=1)
    data = Numbered(rows, seed=4)
    whole = on_device(data, data.batch(3))
    part = on_device(data, data.batch(3, slice(2, 5)))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2:5], b), whole, part)
    np.testing.assert_array_equal(whole["row"], np.arange(6))
    assert set(whole["step"].tolist()) == {3} and set(whole["seed"].tolist()) == {4}
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), data.batch(0))
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), data.spec())


def test_labels_look_back():
    row = LookBack(12, 6)(KEY, jax.random.split(KEY, 2))
    np.testing.assert_array_equal(row["label"][:, 3:], row["inputs"][:, :-3])
    np.testing.assert_array_equal(row["weight"][1], [0, 0, 0] + [1] * 9)


# -------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: Strings(1000)(np.array([3, -1])), r"positions: -1 has no string of 3 digits"),
        (lambda: Strings(1000)(np.array([1000])), r"positions: 1000 has no .* larger model\.pos"),
        (lambda: Strings(1000)(np.array([1.5])), r"positions: are float64; give integers"),
        (lambda: Strings(100, 2)(np.array([[1, 2, 3]])), r"need a last axis of model\.axes=2"),
        (lambda: language_model().init(KEY, jnp.zeros((1, 101), int)), r"100 has no string of 2"),
        (lambda: Strings(1), r"positions=1: must be at least 2"),
        (lambda: Sampler(Strings(100), (100,)), r"positions=100: leaves no room"),
        (
            lambda: Sampler(Strings(100), (8,), candidates=100, compared=8),
            r"positions\.candidates=100: .* 1 to 99",
        ),
        (lambda: Sampler(Strings(100), (8,)), r"positions\.compared=32: .* 1 to 8"),
        (
            lambda: jaxformer.load("seqpe:tiny", batch_size=6),
            r"batch_size=6: must be a multiple of the positions\.starts=4",
        ),
        (lambda: jaxformer.load("seqpe:tiny", model__join="x"), r"model\.join='x': must be one of"),
        (lambda: jaxformer.load("seqpe:tiny", model__pair="x"), r"model\.pair='x': must be one of"),
        (lambda: encode(encoder(Strings(9)), jnp.zeros((1, 2), jnp.int8) - 1), r"-1 has no string"),
    ],
)
def test_mistakes_are_named(act, said):
    with pytest.raises(ConfigError, match=said):
        act()


@pytest.mark.parametrize(
    "changes",
    [
        {"model__join": "attn_mul", "model__pair": "multi"},
        {"model__join": "attn_add", "model__one_vector": True},
        {"model__join": "input_add"},
        {"model__pair": "none"},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_every_way_in_trains(changes):
    recipe = jaxformer.load("seqpe:tiny", **changes)
    data, task = recipe.phases[0].data, recipe.task
    batch = jax.eval_shape(lambda b: on_device(data, b), data.spec())
    params, extra = jax.eval_shape(functools.partial(task.init, KEY), batch)

    def loss(params, extra, batch):
        return task.loss(params, extra, batch, key=KEY, train=True).loss

    assert jax.eval_shape(jax.grad(loss), params, extra, batch).keys() == params.keys()
