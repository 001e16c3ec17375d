"""NViT: identities that must hold, and errors that must be clear."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer import paths
from jaxformer.analyze.latency import (
    Analytic,
    Table,
    TimedBlock,
    Widths,
    measured,
    multiply_adds,
)
from jaxformer.compress.prune import (
    Grouped,
    alive,
    count_units,
    densify,
    evenly,
    globally,
    masked,
    sizes,
    unit_norms,
    unit_sums,
    vit_structures,
    whole,
)
from jaxformer.kernels.attention import Full
from jaxformer.models.transformer import Transformer
from jaxformer.models.vit import vit
from jaxformer.observe.metrics import read_jsonl
from jaxformer.papers.nvit.model import (
    CONSTANTS,
    KINDS,
    BlockWidths,
    Chance,
    Hessian,
    Magnitude,
    ModelWidths,
    Plan,
    Standing,
    narrowed,
    revit,
    savings,
    widths_left,
    widths_of,
)
from jaxformer.papers.nvit.phases import MASKS, SALIENCY, TEACHER, TaughtTask, divergence_of
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import ConfigError, TrainState
from jaxformer.train.fit import FitOptions, fit
from jaxformer.train.states import abstract_states, enter

KEY = jax.random.key(0)
DEPTH = 3
STRUCTURES = vit_structures(DEPTH)
MODEL = vit(Transformer(24, DEPTH, 4, hidden=20), image_size=8, patch=2, classes=5)
GROUPS = {"embedding": 8, "head": 1, "qk": 2, "value": 2, "mlp": 5}
PLAN = Plan(STRUCTURES, tuple(GROUPS.items()), 1.0)


@pytest.fixture(scope="module")
def batch():
    image = jax.random.uniform(KEY, (6, 8, 8, 1))
    return {"image": image, "label": jnp.arange(6) % 5}


@pytest.fixture(scope="module")
def params(batch):
    """Of no special values, biases and scales among them."""
    made = jax.jit(MODEL.init)(KEY, batch["image"])["params"]
    leaves, tree = jax.tree.flatten(made)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noisy = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return tree.unflatten(noisy)


def drawn(params, seed=1):
    """Masks that remove about half of every list, and never all."""
    found = {}
    for i, (name, size) in enumerate(sizes(STRUCTURES, params).items()):
        mask = jax.random.bernoulli(jax.random.fold_in(jax.random.key(seed), i), 0.5, (size,))
        found[name] = mask.at[0].set(True).astype(jnp.float32)
    return found


def task(**fields):
    fields = {"teacher": MODEL, "coefficient": 10.0, "structures": STRUCTURES, **fields}
    return TaughtTask(MODEL, **fields)


def logits(task, params, extra, batch):
    return jax.jit(lambda p, e: task.predict(p, e, batch, key=KEY))(params, extra)


# --------------------------------------------------------------------------------------- structures


@pytest.mark.parametrize("seed", range(3))
def test_a_masked_model_is_the_dense_one(params, batch, seed):
    masks = drawn(params, seed)
    counts = count_units(masks)
    small = densify(STRUCTURES, params, masks, counts)
    widths = ModelWidths.of(counts)
    assert widths.counts() == counts
    model = narrowed(MODEL, widths)
    given = jax.eval_shape(model.init, KEY, batch["image"])["params"]
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, given)
    found = logits(task(), params, {MASKS: masks}, batch)
    np.testing.assert_allclose(found, model.apply({"params": small}, batch["image"]), atol=1e-5)
    # The authors' norms also average over what is removed, and then it is another model.
    legacy = logits(task(norm="legacy"), params, {MASKS: masks}, batch)
    assert float(jnp.abs(legacy - found).max()) > 1e-2


def test_nothing_removed_is_the_plain_model(params, batch):
    masks = whole(STRUCTURES, params)
    plain = MODEL.apply({"params": params}, batch["image"])
    np.testing.assert_allclose(logits(task(), params, {MASKS: masks}, batch), plain, atol=1e-6)
    np.testing.assert_array_equal(task().predict(params, {}, batch, key=KEY), plain)
    same = densify(STRUCTURES, params, masks, count_units(masks))
    jax.tree.map(np.testing.assert_array_equal, same, params)
    assert narrowed(MODEL, widths_of(MODEL)).encoder != MODEL.encoder  # it fixes the scale
    kept = narrowed(MODEL, widths_of(MODEL)).apply({"params": params}, batch["image"])
    np.testing.assert_allclose(kept, plain, atol=1e-6)


def test_a_query_row_of_zeros_is_none(params, batch):
    masks = whole(STRUCTURES, params)
    zero = {**masks, "block_1/qk": masks["block_1/qk"].at[2].set(0.0)}
    silent = masked(STRUCTURES, params, zero)
    found = MODEL.apply({"params": silent}, batch["image"])
    small = densify(STRUCTURES, silent, zero, count_units(zero))
    model = narrowed(MODEL, ModelWidths.of(count_units(zero)))
    np.testing.assert_allclose(model.apply({"params": small}, batch["image"]), found, atol=1e-5)


def test_units_lie_where_the_paper_says(params):
    """What of each unit is scored, and what goes with it, by the number of parameters."""
    masks = whole(STRUCTURES, params)
    gone = {s.kind: 0 for s in STRUCTURES}
    for name in ("embedding", "block_0/head", "block_0/qk", "block_0/value", "block_0/mlp"):
        one = {**masks, name: masks[name].at[1].set(0.0)}
        left = densify(STRUCTURES, params, one, count_units(one))
        total = sum(x.size for x in jax.tree.leaves(params))
        gone[name.rpartition("/")[2]] = total - sum(x.size for x in jax.tree.leaves(left))
    d, hidden, h, k, classes = 24, 20, 4, 6, 5
    per_block = 4 * h * k + 1 + 2 * hidden + 1 + 4  # projections, bias, MLP, bias, two norms
    wanted = {
        "embedding": 4 + 1 + 1 + 17 + DEPTH * per_block + 2 + classes,
        "head": 3 * (d + 1) * k + k * d,
        "qk": 2 * h * (d + 1),
        "value": h * (d + 1) + h * d,
        "mlp": d + 1 + d,
    }
    assert gone == wanted

    ones = jax.tree.map(jnp.ones_like, params)
    scored = {n: int(x[0]) for n, x in unit_sums(STRUCTURES, ones, ones).items()}
    assert scored["embedding"] == 4 + 1 + DEPTH * per_block - DEPTH * 4
    assert scored["block_1/head"] == 3 * (d + 1) * k
    assert scored["block_1/qk"] == scored["block_1/value"] == h * (d + 1)
    assert scored["block_1/mlp"] == d + 1


def test_a_score_is_the_square_of_the_gradient_of_a_gate(params, batch):
    def loss(params):
        return task().loss(params, {}, batch, key=KEY, train=True).loss

    sums = unit_sums(STRUCTURES, params, jax.jit(jax.grad(loss))(params))

    for structure in STRUCTURES:

        def gated(factor, structure=structure):
            only = dataclasses.replace(
                structure, parts=tuple(p for p in structure.parts if p.scored)
            )
            return loss(masked((only,), params, {structure.name: factor}))

        wanted = jax.jit(jax.grad(gated))(jnp.ones(sums[structure.name].shape))
        scale = float(jnp.abs(wanted).max())
        np.testing.assert_allclose(sums[structure.name], wanted, rtol=1e-4, atol=1e-5 * scale)


def test_zeros_tell_what_is_removed(params):
    masks = drawn(params)
    found = alive(STRUCTURES, masked(STRUCTURES, params, masks))
    for name, mask in masks.items():
        np.testing.assert_array_equal(found[name], mask, err_msg=name)
    norm = unit_norms(STRUCTURES, params)["block_0/mlp"]
    up = params["encoder"]["stack"]["block_0"]["mlp"]["up"]
    rows = jnp.concatenate([up["kernel"], up["bias"][None]])
    np.testing.assert_allclose(norm, jnp.sqrt(jnp.mean(rows**2, 0)), rtol=1e-5)


# ----------------------------------------------------------------------------------------- ranking


def test_groups_are_cut_in_ascending_order():
    scores = jax.random.uniform(KEY, (13,))
    group = Grouped.of(scores, 5)
    np.testing.assert_array_equal(group.sizes, [5, 5, 3])
    ascending = np.sort(np.asarray(scores))
    np.testing.assert_allclose(
        group.scores, [ascending[:5].sum(), ascending[5:10].sum(), ascending[10:].sum()], rtol=1e-6
    )
    mask = group.without(jnp.array([True, False, True]))  # the last is never removed
    np.testing.assert_array_equal(
        np.asarray(scores)[np.asarray(mask) == 1],
        np.asarray(scores)[np.isin(np.asarray(scores), ascending[5:])],
    )


def test_one_threshold_is_for_all_lists():
    scores = {"a": jnp.arange(8.0), "b": 10 * jnp.arange(6.0) + 0.5}
    groups = {name: Grouped.of(x, 2) for name, x in scores.items()}
    everyone = np.sort(np.concatenate([g.scores for g in groups.values()]))
    for index in range(len(everyone)):
        masks = globally(groups, jnp.asarray(index))
        for name, group in groups.items():
            dead = np.asarray(group.scores) <= everyone[index]
            dead[-1] = False
            assert int(masks[name].sum()) == len(scores[name]) - int(group.sizes[dead].sum())
    even = evenly(groups, jnp.asarray(0.5))
    np.testing.assert_array_equal(even["a"], [0] * 4 + [1] * 4)
    np.testing.assert_array_equal(even["b"], [0] * 4 + [1] * 2)  # 1.5 groups: rounded up here


def test_an_even_share_grows_by_few_groups_at_once():
    groups = {name: Grouped.of(jnp.arange(8.0), 1) for name in "abcd"}
    counts = [
        sum(int((mask == 0).sum()) for mask in evenly(groups, jnp.asarray(round / 32)).values())
        for round in range(29)
    ]
    assert counts == list(range(29))


@pytest.mark.parametrize("kind", ["hessian", "magnitude", "random"])
def test_removed_units_stay_removed_and_every_list_keeps_a_group(params, kind):
    latency = Analytic(17)
    ranking = {
        "hessian": Hessian(PLAN, latency),
        "magnitude": Magnitude(PLAN),
        "random": Chance(PLAN),
    }[kind]
    masks = whole(STRUCTURES, params)
    full = {name: jnp.ones_like(mask) for name, mask in masks.items()}

    @jax.jit
    def go(masks, round):
        names = jax.random.split(jax.random.fold_in(KEY, round), len(masks))
        saliency = {
            n: jax.random.uniform(k, masks[n].shape) for n, k in zip(masks, names, strict=True)
        }
        standing = Standing(masked(STRUCTURES, params, masks), masks, saliency, round)
        new = {n: m * ranking(standing)[n] for n, m in masks.items()}
        return new, latency(widths_left(new)).sum()

    lat = float(latency(widths_left(full)).sum())
    count = sum(
        len(Grouped.of(m, GROUPS[s.kind]).sizes)
        for s, m in zip(STRUCTURES, masks.values(), strict=True)
    )
    for round in range(count + 3):
        new, now = go(masks, jnp.asarray(round))
        assert all(bool((new[n] <= masks[n]).all()) for n in masks)
        assert float(now) <= lat + 1e-12
        masks, lat = new, float(now)
    left = count_units(masks)
    for structure in STRUCTURES:
        size = len(full[structure.name])
        last = size % GROUPS[structure.kind] or GROUPS[structure.kind]
        assert left[structure.name] >= last, structure.name
    if kind != "random":
        assert lat < 0.35 * float(latency(widths_left(full)).sum())


def test_rewards_are_of_what_a_unit_saves():
    counts = BlockWidths(4, 16, 16, 256)
    masks = {"embedding": jnp.ones(64)}
    for i in range(2):
        masks |= {
            f"block_{i}/{k}": jnp.ones(n)
            for k, n in zip(("head", "qk", "value", "mlp"), counts, strict=True)
        }
    masks["block_1/head"] = masks["block_1/head"].at[:2].set(0.0)
    latency = Analytic(17)
    found = savings(latency, masks)

    def lat(**less):
        rows = []
        for i, heads in enumerate((4, 2)):
            row = Widths(64, heads, 16, 16, 256)._asdict()
            for name, block in less.items():
                row[name] -= block in (i, "all")
            rows.append(float(latency(Widths(**row))))
        return sum(rows)

    assert float(found["embedding"]) == pytest.approx(lat() - lat(embedding="all"), rel=1e-3)
    assert float(found["block_0/head"]) == pytest.approx(lat() - lat(heads=0), rel=1e-3)
    assert float(found["block_0/mlp"]) == pytest.approx(lat() - lat(mlp=0), rel=1e-2)
    assert float(found["block_1/head"]) == 0.0  # two are left
    assert set(KINDS) == set(CONSTANTS) == {"embedding", "head", "qk", "value", "mlp"}


# ----------------------------------------------------------------------------------------- latency


def grid():
    return Widths((0, 8, 16), (1, 2, 4), (1, 8), (1, 8), (1, 16, 32))


def test_tables_interpolate_and_are_exact_on_their_grid(tmp_path):
    values = np.random.default_rng(0).uniform(1, 2, (3, 3, 2, 2, 3))
    table = Table(grid(), values)
    table.save(tmp_path / "table.npz")
    table = Table.load(tmp_path / "table.npz")
    for index in np.ndindex(values.shape):
        widths = Widths(*(axis[i] for axis, i in zip(grid(), index, strict=True)))
        assert float(table(widths)) == pytest.approx(values[index], rel=1e-6)
    low, high = (float(table(Widths(8, 2, 8, 1, m))) for m in (16, 32))
    assert float(table(Widths(8, 2, 8, 1, 20))) == pytest.approx(0.75 * low + 0.25 * high)
    many = Widths(jnp.array([8, 12]), jnp.array([2, 3]), 8, 1, jnp.array([16, 20]))
    assert table(many).shape == (2,)
    assert float(table(many)[0]) == pytest.approx(low)


def test_the_formula_counts_and_never_grows_when_something_is_removed():
    full = Widths(64, 4, 16, 12, 256)
    tokens = 17
    by_hand = tokens * (64 * 4 * (16 * 2 + 12 * 2) + 2 * 64 * 256) + tokens**2 * 4 * (16 + 12)
    assert float(multiply_adds(full, tokens)) == by_hand
    latency = Analytic(tokens)
    for field in Widths._fields:
        less = full._replace(**{field: getattr(full, field) - 1})
        assert float(latency(less)) < float(latency(full))


def test_a_table_is_measured_on_the_device_at_hand():
    axes = Widths((0, 8), (1, 2), (2, 4), (2, 4), (1, 8))
    clock = TimedBlock(tokens=5, batch=2, repeats=2)
    block = clock.block(Widths(8, 2, 4, 2, 8))
    given = jax.eval_shape(
        lambda x: block.init(KEY, x, mask=Full()),
        jax.ShapeDtypeStruct((2, 5, 8), jnp.float32),
    )["params"]["mixer"]
    assert given["query"]["kernel"].shape == (8, 2, 4)
    assert given["value"]["kernel"].shape == (8, 2, 2)
    assert clock(Widths(8, 2, 4, 2, 8)) > 0
    table = measured(axes, lambda w: float(w.embedding * w.heads))
    assert float(table(Widths(8, 2, 2, 2, 1))) == 16.0
    assert float(table(Widths(0, 2, 2, 2, 1))) == 0.0


# ----------------------------------------------------------------------------------- the two phases


def test_pruning_ends_within_a_round_of_the_target(tmp_path):
    """Shapes follow from widths; removed weights and their moments are 0; then it is dense."""
    recipe = jaxformer.load("nvit:tiny")
    bare = dataclasses.replace(recipe, evaluators=())
    state = fit(bare, workdir=tmp_path, options=FitOptions(progress=False, log_every=1))
    update = recipe.phases[1].update
    masks = state.extra[MASKS]
    assert float(update.share(masks)) <= 0.5
    rows = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if "latency" in row]
    shares = [row["latency"] for row in rows]
    assert all(b <= a for a, b in itertools.pairwise(shares))
    rounds = [row["rounds"] for row in rows]
    last = rounds.index(rounds[-1])
    assert shares[last - 1] > 0.5 >= shares[last]  # not a round more than it takes
    structures = update.structures
    clean = masked(structures, state.params, masks)
    jax.tree.map(np.testing.assert_array_equal, clean, state.params)
    moments = [x for n, x in paths.leaves(state.opt_state).items() if n.endswith("mlp/up/kernel")]
    assert len(moments) >= 2
    assert state.extra[TEACHER].keys() == state.params.keys()

    then = jaxformer.load("nvit:tiny", dense_from=str(tmp_path))
    counts = count_units(jax.device_get(masks))
    assert ModelWidths.read(then.config["widths"]).counts() == counts
    shapes = [s.params for s in abstract_states(then, make_mesh())]
    assert sizes(structures, shapes[-1]) == counts
    dense = then.phases[2].update.task
    batch = then.phases[2].data.batch(0)
    small = jax.jit(lambda s: enter(then.phases[2], s))(state)
    assert MASKS not in small.extra and SALIENCY not in small.extra
    found = dense.predict(small.params, {}, batch, key=KEY)
    before = update.task.predict(state.params, state.extra, batch, key=KEY)
    np.testing.assert_allclose(found, before, atol=1e-5)
    again = fit(
        dataclasses.replace(then, evaluators=()),
        workdir=tmp_path,
        options=FitOptions(progress=False),
    )
    assert int(again.step) == then.steps and sizes(structures, again.params) == counts


def test_saliency_is_of_the_weights_before_the_step():
    recipe = jaxformer.load("nvit:tiny")
    update, data = recipe.phases[1].update, recipe.phases[1].data
    batch = data.batch(0)
    params, extra = jax.jit(recipe.task.init)(KEY, batch)
    state = TrainState(jnp.zeros((), jnp.int32), params, extra, {}, KEY)
    state = jax.jit(lambda s: enter(recipe.phases[1], s))(state)

    def loss(params):
        return update.task.loss(params, state.extra, batch, key=KEY, train=True).loss

    wanted = unit_sums(update.structures, params, jax.jit(jax.grad(loss))(params))
    new, metrics = jax.jit(update)(state, batch)
    for structure in update.structures:
        score = (wanted[structure.name] / CONSTANTS[structure.kind]) ** 2
        np.testing.assert_allclose(
            new.extra[SALIENCY]["sums"][structure.name], score, rtol=1e-3, atol=1e-12
        )
    assert int(new.extra[SALIENCY]["seen"]) == 1 and float(metrics["latency"].value()) == 1.0


def test_the_teacher_counts_after_the_first_round(params, batch):
    taught = task()
    masks = whole(STRUCTURES, params)
    other = jax.tree.map(lambda x: 1.1 * x, params)
    extra = {TEACHER: other, MASKS: masks, SALIENCY: {"round": jnp.asarray(0)}}

    def loss(**more):
        output = taught.loss(params, {**extra, **more}, batch, key=KEY, train=True)
        return float(output.loss), float(output.metrics["divergence"].value())

    before, divergence = loss()
    after, _ = loss(**{SALIENCY: {"round": jnp.asarray(1)}})
    assert after == pytest.approx(before + 10.0 * divergence, rel=1e-5)
    p, q = (
        jax.nn.softmax(MODEL.apply({"params": w}, batch["image"]) / 3.0) for w in (other, params)
    )
    assert divergence == pytest.approx(float(jnp.mean(p * (jnp.log(p) - jnp.log(q)))), rel=1e-3)
    np.testing.assert_allclose(divergence_of(jnp.eye(3), jnp.eye(3), 2.0), 0, atol=1e-7)


def test_revit_is_the_rule_of_the_paper():
    tiny, small = revit(176), revit(384)
    assert tiny.embedding == 176 and len(tiny.blocks) == 12
    assert tiny.blocks[0] == tiny.blocks[-1] == (10, 16, 64, 528)
    assert tiny.blocks[1] == tiny.blocks[-2] == (2, 8, 64, 528)
    assert tiny.blocks[5] == (4, 16, 64, 1056)
    assert small.blocks[0] == (10, 32, 64, 1152) and small.blocks[4] == (8, 32, 64, 2304)
    recipe = jaxformer.load("nvit:revit_t")
    assert [phase.name for phase in recipe.phases] == ["train"]
    layer = abstract_states(recipe, make_mesh())[0].params["encoder"]["stack"]["block_4"]["mixer"]
    assert layer["query"]["kernel"].shape == (176, 4, 16)
    assert layer["value"]["kernel"].shape == (176, 4, 64)


# ----------------------------------------------------------------------------------------- mistakes


def load(**fields):
    return jaxformer.load("nvit:tiny", **fields)


def with_hole():
    values = np.ones((3, 3, 2, 2, 3))
    values[1, 2, 0, 1, 2] = np.nan
    return Table(grid(), values)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: load(prune__target=1.0), r"prune\.target=1\.0: must be in \(0, 1\)"),
        (lambda: load(prune__interval=0), r"prune\.interval=0"),
        (lambda: load(prune__ranking="best"), r"prune\.ranking='best': must be one of hessian"),
        (lambda: load(prune__norm="none"), r"prune\.norm='none': must be one of masked, legacy"),
        (lambda: load(prune__groups__qk=0), r"prune\.groups: needs a size of at least 1 for 'qk'"),
        (lambda: load(rule="vit"), r"config\.rule='vit': must be one of revit"),
        (lambda: load(widths=(3, 4)), r"widths=\(3, 4\): must be"),
        (lambda: load(widths=(8, ((1, 1, 1, 1),))), r"of 1 blocks, the model has 2"),
        (with_hole, r"1 points of the grid are missing, such as \[8, 4, 1, 8, 32\]"),
        (lambda: Table(grid(), np.ones((3, 3))), r"latency\.values: has the shape \(3, 3\)"),
        (
            lambda: Table(grid(), np.ones((3, 3, 2, 2, 3))).check(Widths(64, 2, 2, 2, 2)),
            r"latency\.grid\.embedding: goes from 0 to 16, the model has 64",
        ),
        (
            lambda: sizes(vit_structures(5), {"head": {"kernel": jnp.ones((2, 3))}}),
            r"no parameter is named .* another model",
        ),
    ],
)
def test_mistakes_are_named(act, said):
    with pytest.raises(ConfigError, match=said):
        act()


def test_a_group_that_is_cut_short_is_warned_of():
    with pytest.warns(UserWarning, match="its last group has 2"):
        load(prune__groups__mlp=31)
