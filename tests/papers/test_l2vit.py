"""L2ViT: identities that must hold, and errors that must be clear."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer import paths
from jaxformer.analyze.flops import count
from jaxformer.analyze.implied import implied_weights
from jaxformer.data.sources.cues import cues
from jaxformer.kernels.attention import Causal, Full, KeyPadding
from jaxformer.models.lm import decoder_lm
from jaxformer.models.transformer import Transformer
from jaxformer.nn.attention import Attention
from jaxformer.nn.make import Make
from jaxformer.nn.window import Windowed
from jaxformer.papers.l2vit.model import ClampedLinearAttention, LocalConcentration, l2vit
from jaxformer.papers.l2vit.recipe import classifier
from jaxformer.recipe import ConfigError
from jaxformer.tasks import linen
from jaxformer.tools.convert import import_authors
from jaxformer.train.optim import decays
from jaxformer.train.states import on_device
from tests.golden_case import DIRECTORY, Case

KEY = jax.random.key(0)
H, D, L = 4, 16, 18


def attention(gain=1.0, **fields):
    """A layer, its variables and an input whose denominators grow with `gain` squared."""
    layer = ClampedLinearAttention(H, **fields)
    x = gain * jax.random.normal(KEY, (2, L, D))
    return layer, layer.init(KEY, x, mask=Full()), x


def projected(variables, name, x):
    part = variables["params"][name]
    return jnp.einsum("...D,DHK->...HK", x, part["kernel"]) + part["bias"]


@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_rows_of_weights_sum_to_what_the_clamp_leaves(gain):
    """The linear form is the quadratic one; entries are >= 0; a row sums to tau min(1, s / 100)."""
    layer, variables, x = attention(gain)
    weights = implied_weights(layer, variables, x, mask=Full())
    q, k = (jax.nn.relu(projected(variables, name, x)) for name in ("query", "key"))
    scores = jnp.einsum("BLHK,BSHK->BHLS", q, k)
    raw = scores.sum(-1)
    assert (raw > 100).any() if gain == 3.0 else (raw < 100).any()
    tau = variables["params"]["temperature"][:, None]
    np.testing.assert_allclose(tau, (D / H) ** -0.5)
    assert np.all(weights >= 0)
    expected = tau[..., None] * scores / jnp.maximum(raw, 100)[..., None]
    np.testing.assert_allclose(weights, expected, atol=1e-5)
    np.testing.assert_allclose(weights.sum(-1), tau * jnp.minimum(1, raw / 100), atol=1e-5)
    y = jnp.einsum("BHLS,BSHK->BLHK", weights, projected(variables, "value", x))
    out = variables["params"]["out"]
    y = jnp.einsum("BLHK,HKD->BLD", y, out["kernel"]) + out["bias"]
    np.testing.assert_allclose(layer.apply(variables, x, mask=Full()), y, atol=1e-4)


def test_without_clamp_and_temperature_rows_sum_to_one():
    layer, variables, x = attention(clamp=None)
    params = {**variables["params"], "temperature": jnp.ones(H)}
    weights = implied_weights(layer, {"params": params}, x, mask=Full())
    seen = jax.nn.relu(projected(variables, "query", x)).any(-1).swapaxes(1, 2)  # a row of zeros: 0
    np.testing.assert_allclose(weights.sum(-1), seen, atol=1e-5)
    assert seen.mean() > 0.8


def test_linear_attention_knows_no_order():
    layer, variables, x = attention()
    order = jax.random.permutation(KEY, L)
    y = layer.apply(variables, x, mask=Full())
    moved = layer.apply(variables, x[:, order], mask=Full())
    np.testing.assert_allclose(moved, y[:, order], atol=1e-5)
    valid = jnp.arange(L)[None] < jnp.array([[L], [7]])
    padded = layer.apply(variables, x, mask=KeyPadding(valid))
    alone = layer.apply(variables, x[1:, :7], mask=Full())
    np.testing.assert_allclose(padded[1:, :7], alone, atol=1e-5)


def test_windows_move_with_the_map():
    layer = Windowed(Make(Attention, heads=2), (6, 9), 3)
    x = jax.random.normal(KEY, (1, 6, 9, 8))
    variables = layer.init(KEY, x.reshape(1, 54, 8))
    run = lambda x: layer.apply(variables, x.reshape(1, 54, 8)).reshape(x.shape)
    moved = run(jnp.roll(x, (3, 6), (1, 2)))
    np.testing.assert_allclose(moved, jnp.roll(run(x), (3, 6), (1, 2)), atol=1e-6)


def test_windows_see_the_zeros_that_fill_the_map_up():
    """A padded position is a key and a value like any other, those of a zero."""
    x = jax.random.normal(KEY, (1, 4, 5, 8))
    layer = Windowed(Make(Attention, heads=2), (4, 5), 3)
    variables = layer.init(KEY, x.reshape(1, 20, 8))
    whole = Windowed(Make(Attention, heads=2), (6, 6), 3)
    filled = jnp.pad(x, ((0, 0), (0, 2), (0, 1), (0, 0)))
    expected = whole.apply(variables, filled.reshape(1, 36, 8)).reshape(1, 6, 6, 8)[:, :4, :5]
    np.testing.assert_allclose(
        layer.apply(variables, x.reshape(1, 20, 8)).reshape(x.shape), expected, atol=1e-6
    )


SIZES = {
    "paper": (28_596_781, 4.7),
    "paper_small": (50_199_157, 9.0),
    "paper_base": (88_577_188, 15.9),
}


def described(preset, side=224):
    """The model of a preset, its variables and images as shapes."""
    config = jaxformer.load_config(f"l2vit:{preset}", {"data.image_size": side})
    model = classifier(config)
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return model, jax.eval_shape(lambda image: model.init(KEY, image), image), image


@pytest.mark.parametrize("preset", SIZES)
def test_sizes_are_those_of_the_paper(preset):
    """Parameters exactly; multiply-adds within 2 % of the table."""
    parameters, gflops = SIZES[preset]
    model, variables, image = described(preset)
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == parameters
    assert count(model.apply, variables, image) / 2e9 == pytest.approx(gflops, rel=0.02)


def test_cost_is_linear_in_the_pixels():
    once, twice = (described("paper", side) for side in (224, 448))
    ratio = count(twice[0].apply, *twice[1:]) / count(once[0].apply, *once[1:])
    assert 3.9 < ratio < 4.1


def small(**fields):
    given = {"image_size": (30, 37), "widths": (8, 12), "depths": (2, 2), "heads": (1, 2)}
    return l2vit(**{**given, "classes": 5, "window": 3, **fields})


def test_answers_do_not_depend_on_the_batch():
    model = small()
    image = jax.random.normal(KEY, (3, 30, 37, 3))
    variables = jax.jit(model.init)(KEY, image[:1])
    run = jax.jit(model.apply)
    np.testing.assert_allclose(run(variables, image)[:1], run(variables, image[:1]), atol=1e-5)
    task = jaxformer.load("l2vit:tiny").task
    batch = {"image": jax.random.normal(KEY, (8, 32, 32, 1)), "label": jnp.arange(8)}
    params, extra = jax.jit(task.init)(KEY, batch)
    loss = jax.jit(task.loss, static_argnames="train")
    new = loss(params, extra, batch, key=KEY, train=True).extra["batch_stats"]
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), extra["batch_stats"], new)
    assert all(jax.tree.leaves(changed))
    same = loss(params, extra, batch, key=KEY, train=False).extra
    jax.tree.map(np.testing.assert_array_equal, same, extra)


def test_parts_are_left_out_whole():
    def names(**fields):
        init = lambda: small(**fields).init(KEY, jnp.zeros((1, 30, 37, 3)))
        return " ".join(paths.leaves(jax.eval_shape(init)["params"]))

    assert "temperature" in names() and "local" in names()
    assert "temperature" in names(local=False) and "local" not in names(local=False)
    assert "temperature" not in names(blocks="window")


def test_sums_are_float32_for_float16():
    """Sums over 4,000 positions of keys near 30 are beyond float16; what is returned is not."""
    layer, variables, _ = attention()
    x = 8 * jax.random.normal(KEY, (1, 4000, D))
    half = layer.apply(variables, x.astype(jnp.float16), mask=Full())
    assert half.dtype == jnp.float16
    whole = layer.apply(variables, x, mask=Full())
    assert np.all(np.isfinite(half))
    # In the mean: features near 0 that rounding of x turns off move a few rows by more.
    assert np.abs(np.float32(half) - whole).mean() < 2e-3 * np.abs(whole).mean()
    q, k = (jax.nn.relu(projected(variables, name, x)) for name in ("query", "key"))
    assert (q * k.sum(1, keepdims=True)).sum(-1).max() > 65_504


def test_a_causal_form_with_and_without_a_cache():
    """Not in the paper: every sum over the positions up to one's own."""
    trunk = Transformer(width=D, depth=2, heads=H)
    lm = decoder_lm(trunk, vocabulary=9, length=L, mixer=Make(ClampedLinearAttention, heads=H))
    tokens = jax.random.randint(KEY, (2, L), 0, 9)
    params = lm.init(KEY, tokens)["params"]
    whole = lm.apply({"params": params}, tokens)
    cache, end = linen.start_cache(lm, 2, L), 0
    decode = jax.jit(linen.decode, static_argnums=0)
    for size in (9, 1, 1):
        logits, cache = decode(lm, params, {}, cache, tokens[:, end : end + size])
        end += size
        np.testing.assert_allclose(logits[:, -1], whole[:, end - 1], atol=1e-4)
    layer, variables, x = attention()
    one = layer.apply(variables, x, mask=Causal())
    two = layer.apply(variables, x.at[:, 9:].add(1.0), mask=Causal())
    np.testing.assert_allclose(one[:, :9], two[:, :9], atol=1e-6)


def test_temperatures_are_decayed_and_norms_are_not():
    """As by the shape rule of the authors' code, whose temperatures have three axes."""
    _, variables, _ = attention()
    assert decays(variables["params"])["temperature"]
    local = LocalConcentration((3, 6)).init(KEY, jnp.ones((1, L, D)))["params"]
    assert decays(local)["norm"] == {"scale": False, "bias": False}


def test_the_authors_weights_become_a_run(tmp_path):
    """Running statistics too; a trained file counts its batches, which nothing here reads."""
    case = Case(DIRECTORY / "l2vit__full.npz")
    c, weights = case.config, case.part("param")
    counted = {"stages.0.1.local_mp.bn.num_batches_tracked": np.array(7)}
    np.savez(tmp_path / "weights.npz", **weights, **counted)
    fields = {"widths": "dims", "depths": "depths", "heads": "num_heads", "classes": "num_classes"}
    fields = {f"model__{ours}": c[theirs] for ours, theirs in fields.items()}
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    fields["model__mlp_ratio"] = c["mlp_ratio"][0]
    workdir = import_authors("l2vit", tmp_path / "weights.npz", tmp_path / "run", **fields)
    state = jaxformer.restore(jaxformer.load("l2vit:small", **fields), workdir)
    found = state.extra["batch_stats"]["encoder"]["stage_0"]["block_1"]["local"]["norm"]["var"]
    np.testing.assert_array_equal(found, weights["stages.0.1.local_mp.bn.running_var"])
    head = state.params["head"]["kernel"]
    np.testing.assert_array_equal(head, weights["head.weight"].T)


def test_cues_are_what_they_say():
    found = cues(400, 48, seed=3).arrays
    image, label = found["image"], found["label"]
    assert sorted(np.unique(label)) == list(range(8))
    sides = [image[:, :6], image[:, -6:], image[:, :, :6], image[:, :, -6:]]
    colours = np.stack([side.mean((1, 2)).round() for side in sides], 1)  # (image, side, channel)
    painted = colours[:, :, :2].sum(-1) == 1
    np.testing.assert_array_equal(painted.sum(1), 2)  # the other borders are black between them
    np.testing.assert_array_equal(painted[:, 0], painted[:, 1])
    same = [len({tuple(c) for c in row[at]}) == 1 for row, at in zip(colours, painted, strict=True)]
    np.testing.assert_array_equal(same, label % 2 == 1)


@pytest.mark.parametrize("blocks", ["window", "mixed"])
def test_no_position_meets_both_bars_by_windows(blocks):
    """At `small`: what two blocks of windows and convolutions reach is less than half the map."""
    recipe = jaxformer.load("l2vit:small", model__blocks=blocks, data__size=32)
    encoder, image = recipe.task.model.encoder(), cues(1).arrays["image"]
    variables = jax.jit(encoder.init)(KEY, image)
    run = jax.jit(encoder.apply)
    first, last = slice(0, 12), slice(-12, None)  # bars are 12 pixels wide
    plain = run(variables, image)
    told = [jnp.any(plain != run(variables, add(image, at)), -1) for at in (first, last)]
    assert all(x.any() for x in told)
    assert jnp.any(told[0] & told[1]) == (blocks == "mixed")


def add(image, rows):
    """The image with something else along one border."""
    image = image.copy()
    image[:, rows] += 1
    return image


@pytest.mark.parametrize("task", ["cues", "digits"])
def test_every_task_is_scored(task):
    fields = {"data__size": 16, "batch_size": 4} if task == "cues" else {"batch_size": 4}
    name = "tiny" if task == "digits" else "small"
    recipe = jaxformer.load(f"l2vit:{name}", **fields)
    data = recipe.phases[0].data
    output = jax.eval_shape(lambda: score(recipe.task, on_device(data, data.batch(0))))
    assert output.loss.shape == () and data.spec()["image"].shape[0] == 4


def score(task, batch):
    params, extra = task.init(KEY, batch)
    return task.loss(params, extra, batch, key=KEY, train=False)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (
            lambda: attention()[0].init(KEY, jnp.ones((1, 3, 9)), mask=Full()),
            "must divide the width 9",
        ),
        (lambda: small(window=0), r"model\.window=0: must be at least 1"),
        (lambda: small(heads=(1,)), r"model\.heads=\(1,\): one for each stage"),
        (lambda: small(blocks="linear"), r"model\.blocks='linear': must be one of mixed"),
        (
            lambda: LocalConcentration((3, 4)).init(KEY, jnp.ones((1, 11, 8))),
            r"LocalConcentration\.grid=\(3, 4\): the sequence has 11 positions; must be 12",
        ),
        (
            lambda: Windowed(Make(Attention, heads=1), (3, 3), 0).init(KEY, jnp.ones((1, 9, 4))),
            r"model\.window=0",
        ),
        (lambda: cues(1, 16), r"data\.image_size=16: must be at least 32"),
        (lambda: jaxformer.load("l2vit:tiny", data__task="x"), r"data\.task='x': must be one of"),
    ],
)
def test_mistakes_are_named(act, said):
    with pytest.raises(ConfigError, match=said):
        act()
