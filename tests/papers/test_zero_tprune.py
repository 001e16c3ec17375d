"""Zero-TPrune: identities that must hold, and errors that must be clear."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer import paths
from jaxformer.analyze.flops import count
from jaxformer.compress.intercepted import Intercepted
from jaxformer.compress.tokens import (
    Chance,
    ClassAttention,
    KeepTop,
    Seen,
    keep_best,
    kept_count,
    prune_tokens,
)
from jaxformer.kernels.attention import Full
from jaxformer.models.transformer import Transformer
from jaxformer.models.vit import vit
from jaxformer.papers.zero_tprune.methods import METHODS, Layer, Options, pruned, token_counts
from jaxformer.papers.zero_tprune.model import (
    EIR,
    METRICS,
    PARTITIONS,
    Distance,
    Importance,
    MeanOfHeads,
    SStage,
    ZeroTPrune,
    page_rank,
)
from jaxformer.papers.zero_tprune.recipe import foreground
from jaxformer.recipe import ConfigError

KEY = jax.random.key(0)
B, H, N, D, K = 2, 3, 21, 12, 4
PAPER = jaxformer.load("zero_tprune:paper").config["prune"]["layers"]


def seen(key=KEY, tokens=N, sharpness=2.0):
    keys = jax.random.split(key, 6)
    before, after = (jax.random.normal(k, (B, tokens, D)) for k in keys[:2])
    q, k, v = (jax.random.normal(k, (B, tokens, H, K)) for k in keys[2:5])
    p = jax.nn.softmax(sharpness * jax.random.normal(keys[5], (B, H, tokens, tokens)))
    return Seen(before, after, p, q, k, v)


def permuted(view, order):
    """The same tokens in another order."""
    moved = [x[:, order] for x in (view.before_BxNxD, view.after_BxNxD)]
    p = view.p_BxHxNxN[:, :, order][..., order]
    qkv = [x[:, order] for x in (view.q_BxNxHxK, view.k_BxNxGxK, view.v_BxNxGxK)]
    return Seen(*moved, p, *qkv, view.protected)


def zero(keep=0.7, removed=5, iterations=5, **fields):
    return ZeroTPrune(keep, SStage(removed), Importance(iterations), **fields)


def small_vit(pool="token", depth=4):
    model = vit(Transformer(16, depth, 2), image_size=16, patch=4, classes=5, pool=pool)
    image = jax.random.uniform(KEY, (3, 16, 16, 3))
    return model, jax.jit(model.init)(jax.random.key(1), image), image


def rows_of(data):
    return jax.jit(data.draw)(data.batch(0))


# ------------------------------------------------------------------------------------- page rank


def test_votes_neither_appear_nor_get_lost():
    view = seen()
    start = jnp.full((B, N), 1 / N)
    for iterations in (1, 7, 50):
        s = page_rank(view.p_BxHxNxN, start, iterations)
        np.testing.assert_allclose(s.sum(-1), 1, atol=1e-6)
        assert (s >= 0).all()
    uniform = page_rank(jnp.full((B, H, N, N), 1 / N), start, 30)
    np.testing.assert_allclose(uniform, 1 / N, rtol=1e-6)


def test_votes_converge_to_the_left_perron_vector():
    a = seen().p_BxHxNxN
    s = page_rank(a, jnp.full((B, N), 1 / N), 200)
    for b in range(B):
        for h in range(H):
            values, vectors = np.linalg.eig(np.asarray(a[b, h], np.float64).T)
            perron = vectors[:, np.argmax(values.real)].real
            np.testing.assert_allclose(s[b, h], perron / perron.sum(), atol=1e-4)


def test_votes_go_to_those_attended_to():
    """A^T s, not A s, which would only average."""
    a = jnp.zeros((1, 1, N, N)).at[..., 4].set(1.0)
    s = page_rank(a, jnp.full((1, N), 1 / N), 1)
    np.testing.assert_allclose(s[0, 0], np.eye(N)[4], atol=1e-6)


def test_a_restricted_graph_is_that_of_the_survivors():
    a = seen().p_BxHxNxN
    left = jnp.array([0, 2, 3, 7, 11, 19])
    alive = jnp.zeros((B, N)).at[:, left].set(1.0)
    found = page_rank(a, alive / len(left), 9, alive_BxN=alive)
    part = a[:, :, left][..., left]
    part = part / part.sum(-1, keepdims=True)
    wanted = page_rank(part, jnp.full((B, len(left)), 1 / len(left)), 9)
    np.testing.assert_allclose(found[..., left], wanted, rtol=1e-5)
    assert not np.any(np.delete(np.asarray(found), left, axis=-1))


def test_the_class_token_starts_ahead():
    """By sqrt(N), of which uniform attention leaves nothing after one vote."""
    view = seen()
    view = view._replace(p_BxHxNxN=jnp.broadcast_to(jnp.eye(N), (B, H, N, N)))
    s = Importance(1)(view)
    np.testing.assert_allclose(s[:, 0] / s[:, 1], N**0.5, rtol=1e-5)
    np.testing.assert_allclose(s.sum(1), N, rtol=1e-5)  # of mean 1
    alike = Importance(1, boost=False)(view)
    np.testing.assert_allclose(alike, 1, rtol=1e-5)
    np.testing.assert_allclose(Importance(1)(view._replace(protected=0)), 1, rtol=1e-5)


def test_eir_of_one_head_is_that_head_and_odd_heads_are_left_out():
    s = jax.random.uniform(KEY, (B, H, N)) + 0.5
    counted = jnp.ones((B, N), bool)
    np.testing.assert_allclose(EIR()(s[:, :1], counted), s[:, 0], rtol=1e-6)
    everyone = EIR(0.0, float("inf"))
    np.testing.assert_allclose(everyone(s, counted), jnp.sqrt(jnp.mean(s**2, 1)), rtol=1e-6)
    np.testing.assert_allclose(EIR(5.0, 6.0)(s, counted), everyone(s, counted), rtol=1e-6)
    flat = s.at[:, 0].set(1.0)  # a variance of 0
    np.testing.assert_allclose(EIR()(flat, counted), everyone(flat[:, 1:], counted), rtol=1e-6)
    wild = s.at[:, 1, 3].set(40.0)
    np.testing.assert_allclose(EIR()(wild, counted), everyone(wild[:, ::2], counted), rtol=1e-6)
    apart = counted.at[:, 3].set(False)  # which is not counted: a class token
    np.testing.assert_array_equal(EIR().heads(wild, apart), 1)
    np.testing.assert_allclose(MeanOfHeads()(s, counted), s.mean(1), rtol=1e-6)


# ------------------------------------------------------------------------------------------ stages


@pytest.mark.parametrize("keep", [1.0, 0.7, 0.31])
@pytest.mark.parametrize("removed", [0, 5, 9])
@pytest.mark.parametrize("restrict", [True, False])
def test_as_many_are_kept_as_said(keep, removed, restrict):
    kept = np.asarray(zero(keep, removed, restrict=restrict)(seen()))
    assert kept.shape == (B, 1 + int(np.floor(keep * (N - 1 - removed) + 1e-9)))
    assert (kept[:, 0] == 0).all() and (np.diff(kept) > 0).all() and kept.max() < N


def test_another_order_keeps_the_same_tokens():
    view = seen()
    order = np.r_[0, 1 + np.random.default_rng(1).permutation(N - 1)]
    for pruner in (zero(), KeepTop(Importance(30), 0.5), KeepTop(ClassAttention(), 0.5)):
        kept, moved = pruner(view), pruner(permuted(view, order))
        for row, other in zip(kept, moved, strict=True):
            np.testing.assert_array_equal(np.sort(order[other]), row)


def test_copies_are_removed_first():
    """Wherever a copy is of the unimportant half and its original is of the other."""
    view = seen()
    scores = np.asarray(Importance(1)(view))[:, 1:]
    ranks = np.argsort(scores, -1) + 1
    least, most = ranks[:, 2], ranks[:, -3]
    rows = np.arange(B)
    k = view.k_BxNxGxK.at[rows, least].set(view.k_BxNxGxK[rows, most])
    alive = np.asarray(SStage(1)(view._replace(k_BxNxGxK=k)))
    assert alive.sum() == B * (N - 1)
    assert not alive[rows, least].any()
    swapped = np.asarray(SStage(1, partition="seq_i")(view._replace(k_BxNxGxK=k)))
    assert not swapped[rows, most].any()


def test_the_s_stage_equals_a_loop():
    view = seen()
    scores = np.asarray(Importance(1)(view))
    keys = np.asarray(view.k_BxNxGxK).reshape(B, N, -1)
    keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    alive = np.asarray(SStage(4)(view))
    for b in range(B):
        order = sorted(range(1, N), key=lambda i: scores[b, i])
        less, more = order[: (N - 1) // 2], order[(N - 1) // 2 :]
        best = {i: max(keys[b, i] @ keys[b, j] for j in more) for i in less}
        gone = sorted(best, key=best.get)[-4:]
        np.testing.assert_array_equal(np.flatnonzero(~alive[b]), sorted(gone))


@pytest.mark.parametrize("partition", PARTITIONS)
def test_groups_are_of_all_free_tokens(partition):
    for free in (7, 8):
        a, b = PARTITIONS[partition](free)
        if partition != "none":
            assert sorted([*a, *b]) == list(range(free))
    alive = np.asarray(SStage(3, partition=partition)(seen()))
    assert (alive.sum(1) == N - 3).all() and alive[:, 0].all()


def test_metrics_are_larger_for_what_is_more_alike():
    a, b = seen().before_BxNxD[:, :3], seen().before_BxNxD[:, :5]
    for name, metric in METRICS.items():
        found = np.asarray(metric(a, b))
        assert found.shape == (B, 3, 5)
        if name != "dot":
            np.testing.assert_array_equal(found.argmax(-1), [[0, 1, 2]] * B)
    straight = -np.linalg.norm(np.asarray(a)[:, :, None] - np.asarray(b)[:, None], axis=-1)
    np.testing.assert_allclose(Distance(2.0)(a, b), straight, rtol=1e-5)


def test_equal_scores_keep_the_first():
    np.testing.assert_array_equal(keep_best(jnp.ones((1, 6)), 3, 1), [[0, 1, 2, 3]])
    assert kept_count(0.7, 10) == 7 and kept_count(0.6, 54) == 32


# ------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_nothing_dropped_is_the_plain_model(pool):
    model, variables, image = small_vit(pool)
    layers = [Layer(i, 1.0, 0, 3) for i in (1, 3, 4)]
    short = pruned(model, layers, Options())
    found = jax.jit(short.apply)(variables, image)
    plain = jax.jit(model.apply)(variables, image)
    # Two programs, each with its own order of sums: 1e-6 apart at 1.25 on one machine.
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_read_what_is_left(method):
    """And the same variables serve; the tokens that stay are those of the full stream."""
    model, variables, image = small_vit()
    layers = [Layer(1, 0.8, 2, 3), Layer(3, 0.7, 1, 1)]
    short = pruned(model, layers, Options(method))
    made = jax.eval_shape(short.init, KEY, image)
    assert jax.tree.structure(made) == jax.tree.structure(variables)
    lengths = []

    @dataclasses.dataclass(frozen=True)
    class Lengths:
        def __call__(self, call, args, kwargs, context):
            if type(context.module).__name__ == "Block":
                lengths.append(args[0].shape[1])
            return call(*args, **kwargs)

    watched = Intercepted(short, (Lengths(),))
    found = jax.eval_shape(watched.apply, variables, image)
    assert lengths == token_counts(17, 4, () if method == "none" else layers)
    assert found.shape == (3, 5)


def test_what_is_shown_is_of_the_block_itself():
    """Its probabilities, keys, input and output, computed apart."""
    model, variables, image = small_vit()
    shown = []

    @dataclasses.dataclass(frozen=True)
    class Watch:
        def __call__(self, view):
            shown.append(view)
            return jnp.broadcast_to(jnp.arange(17), (3, 17))

    prune_tokens(model, {2: Watch()}).apply(variables, image)
    (view,) = shown
    layer = variables["params"]["encoder"]["stack"]["block_1"]
    mixer = layer["mixer"]
    x = view.before_BxNxD
    y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    y = y * layer["mixer_residual"]["norm"]["scale"] + layer["mixer_residual"]["norm"]["bias"]
    q, k = (jnp.einsum("bnd,dhk->bnhk", y, mixer[n]["kernel"]) for n in ("query", "key"))
    np.testing.assert_allclose(view.q_BxNxHxK, q, atol=1e-5)
    np.testing.assert_allclose(view.k_BxNxGxK, k, atol=1e-5)
    p = jax.nn.softmax(jnp.einsum("bnhk,bmhk->bhnm", q, k) / 8**0.5)
    np.testing.assert_allclose(view.p_BxHxNxN, p, atol=1e-5)
    block = dict(dict(model.encoder.arguments)["stack"].arguments)["blocks"][1]
    after = block().apply({"params": layer}, x, mask=Full())
    np.testing.assert_allclose(view.after_BxNxD, after, atol=1e-5)


def test_only_blocks_that_prune_spell_out_attention():
    short = prune_tokens(small_vit()[0], {2: KeepTop(Chance(), 0.5)})
    blocks = dict(dict(short.model.encoder.arguments)["stack"].arguments)["blocks"]
    assert ["Unfused" in repr(block) for block in blocks] == [False, True, False, False]


def test_deit_s_costs_what_the_paper_says():
    """4.54 G multiply-adds in the blocks, and 3.06 G with Zero-TP-a."""
    model = vit(Transformer(384, 12, 6), image_size=224, patch=16, classes=1000)
    stack = dict(model.encoder.arguments)["stack"]

    def cost(layers):
        short = pruned(model, [Layer(*row) for row in layers], Options())
        opened = dict(short.model.encoder.arguments)["stack"]()
        part = Intercepted(opened, short.interceptors)
        x = jax.ShapeDtypeStruct((1, 197, 384), jnp.float32)
        given = jax.eval_shape(lambda x: stack().init(KEY, x, mask=Full()), x)
        return count(lambda v, x: part.apply(v, x, mask=Full()), given, x) / 2e9

    assert cost(()) == pytest.approx(4.54, rel=0.005)
    assert cost(PAPER) == pytest.approx(3.06, rel=0.01)
    counts = token_counts(197, 12, [Layer(*row) for row in PAPER])
    assert counts == [197, 187, 187, 159, 159, 159, 119, 119, 119, 76, 76, 66]


def test_recall_is_of_patches_with_a_pixel_of_the_shape():
    recipe = jaxformer.load("zero_tprune:tiny")
    model = recipe.task.model.model
    mask = np.zeros((1, 32, 32), bool)
    mask[0, 5, 9] = mask[0, 7, 11] = mask[0, 31, 31] = True
    np.testing.assert_array_equal(np.flatnonzero(foreground(model, mask)), [8 + 2, 63])

    batch = rows_of(recipe.evaluators[0].data)
    params = jax.jit(recipe.task.init)(KEY, batch)[0]

    @jax.jit
    def both(params):
        return recipe.task.recall(params, batch), recipe.task.kept(params, batch)

    found, kept = map(np.asarray, both(params))
    about = foreground(model, batch["mask"])
    for row in range(len(kept)):
        left = set(kept[row].tolist()) - {0}
        inside = {1 + int(i) for i in np.flatnonzero(about[row])}
        assert found[row] == pytest.approx(len(left & inside) / len(inside))
    whole = jaxformer.load("zero_tprune:tiny", prune__method="none").task
    np.testing.assert_array_equal(whole.recall(params, batch), 1.0)


def test_the_task_of_a_recipe_is_the_pruned_model_and_trains_the_plain_one():
    recipe = jaxformer.load("zero_tprune:tiny")
    assert isinstance(recipe.task.model, Intercepted)
    assert not isinstance(recipe.phases[0].update.task.model, Intercepted)
    batch = rows_of(recipe.phases[0].data)
    tasks = recipe.task, recipe.phases[0].update.task
    ours, plain = (jax.jit(task.init)(KEY, batch)[0] for task in tasks)
    for name, x in paths.leaves(ours).items():
        np.testing.assert_array_equal(x, paths.leaves(plain)[name])


# ----------------------------------------------------------------------------------------- mistakes


def load(**fields):
    return jaxformer.load("zero_tprune:tiny", **fields)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: load(prune__layers=((3, 0.0, 1, 1),)), r"prune\.keep=0\.0: must be in \(0, 1\]"),
        (lambda: load(prune__layers=((3, 1.2, 1, 1),)), r"prune\.keep=1\.2"),
        (lambda: load(prune__layers=((5, 0.5, 1, 1),)), r"5 is none of the blocks 1 to 4"),
        (lambda: load(prune__layers=((0, 0.5, 1, 1),)), r"0 is none of the blocks"),
        (lambda: load(prune__layers=((1, 0.5, 1),)), r"must be four numbers"),
        (lambda: load(prune__layers=((1, 0.5, 1, 0),)), r"prune\.iterations=0"),
        (lambda: load(prune__method="tome"), r"prune\.method='tome': must be one of zero_tprune"),
        (lambda: load(prune__metric="l7"), r"prune\.metric='l7': must be one of cosine"),
        (lambda: load(model__scan=True), r"set model\.scan=False"),
        (lambda: load(data__classes=9), r"data\.classes=9: there are 8 shapes"),
        (lambda: SStage(10)(seen()), r"prune\.removed=10: must be less than the 10 of 20"),
        (lambda: SStage(-1), r"prune\.removed=-1"),
        (
            lambda: page_rank(2 * seen().p_BxHxNxN, jnp.ones((B, N)), 1),
            r"rows sum to 1 but for 1; pass",
        ),
        (lambda: ClassAttention()(seen()._replace(protected=0)), "no class token"),
        (
            lambda: prune_tokens(
                vit(Transformer(16, 2, 2, position="rope"), image_size=16, patch=4, classes=5), {}
            ),
            "depends on where tokens lie",
        ),
    ],
)
def test_mistakes_are_named(act, said):
    with pytest.raises(ConfigError, match=said):
        act()
