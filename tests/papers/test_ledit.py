"""LEDiT: identities that must hold, and errors that must be clear; of masks, samplers and
processes the library's tests are `tests/nn/test_grid.py` and `tests/sampling/test_diffusion.py`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxformer
from jaxformer.config import load_config
from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import Full, attention
from jaxformer.models.dit import DiT, dit
from jaxformer.nn.attention import LogLength
from jaxformer.nn.condition import AdaLNZero
from jaxformer.nn.grid import SCANS, Causal, GridSinusoid, grid_sinusoid, layer_masks, mask_corner
from jaxformer.nn.make import Make
from jaxformer.nn.patch import join_patches, split_patches
from jaxformer.papers.ledit import authors
from jaxformer.papers.ledit.model import LocalityEnhancement, positions
from jaxformer.papers.ledit.recipe import build
from jaxformer.tools.convert import import_authors
from jaxformer.tools.subject import open_subject
from tests.golden_case import DIRECTORY, Case

KEY = jax.random.key(0)
SIDE, PATCH, CHANNELS = 8, 2, 3
SIZES = {"width": 16, "depth": 2, "heads": 2, "patch": PATCH, "channels": CHANNELS, "labels": 4}
CONV = positions("conv", trained=(4, 4), grid=(4, 4), conv_init="dirac")
NOTHING = positions("none", trained=(4, 4), grid=(4, 4))


def network(pattern="f", scan=mask_corner, told=NOTHING, **more):
    return dit(**SIZES, masks=layer_masks(pattern, 2, scan), **told, **more)


def images(rows=2, height=SIDE, width=SIDE):
    return jax.random.normal(KEY, (rows, height, width, CHANNELS))


def told(rows=2):
    return jnp.arange(rows) * 100 + 7, jnp.arange(rows) % 3


def init(model, random=True):
    """Parameters; by default all random, as a DiT begins with answering 0."""
    t, y = told()
    params = jax.jit(lambda: model.init(KEY, images(), t, label=y))()["params"]
    if not random:
        return params
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(KEY, len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, x):
    t, y = told(len(x))
    return model.apply({"params": params}, x, t, label=y)


# --------------------------------------------------------------------------- the network


@pytest.mark.parametrize("pattern", ["f", "fc"])
def test_a_new_network_answers_nothing(pattern):
    """Its output is 0 and each of its blocks the identity, exactly."""
    model = network(pattern, told=CONV)
    x = images()
    t, y = told()

    @jax.jit
    def apply(params):
        def is_block(module, _):
            return isinstance(module, AdaLNZero)

        return model.apply({"params": params}, x, t, label=y, capture_intermediates=is_block)

    out, seen = apply(init(model, random=False))
    np.testing.assert_array_equal(out, jnp.zeros(x.shape))
    blocks = seen["intermediates"]["stack"]
    first, second = (blocks[f"block_{i}"]["__call__"][0] for i in (0, 1))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first).max() > 0.1


def shuffled(x, order):
    """The patches of images, in another order."""
    patches = split_patches(x, PATCH)[:, order]
    return join_patches(patches, x.shape[1] // PATCH)


@pytest.mark.parametrize(
    ("how", "equivariant"),
    [
        ({}, True),
        ({"pattern": "fc"}, False),
        ({"pattern": "fc", "scan": SCANS["raster"]}, False),
        ({"told": positions("conv", trained=(4, 4), grid=(4, 4))}, False),
        ({"told": {"position": Make(GridSinusoid)}}, False),
    ],
    ids=["nothing", "mask_corner", "raster", "convolution", "sincos"],
)
def test_what_makes_patches_tell_their_place(how, equivariant):
    """Without any of it, the answer to shuffled patches is the shuffled answer."""
    model = network(**how)
    params, x = init(model), images()
    order = jax.random.permutation(KEY, 16)
    off = run(model, params, shuffled(x, order)) - shuffled(run(model, params, x), order)
    assert (float(jnp.abs(off).max()) <= 1e-5 * 10) == equivariant
    if not equivariant:
        assert float(jnp.abs(off).max()) > 1e-2


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_the_variance_tells_the_number_of_visible_tokens(mean):
    """The theorem of section 3.1, exact: sigma^2 / i for equal weights, and 2 sigma^2 / (i + 1)
    for those of softmax over logarithms of exponential draws, whatever the mean of the values.
    """
    draws, tokens, sigma = 20_000, 8, 1.0
    keys = jax.random.split(KEY, 2)
    v = mean + sigma * jax.random.normal(keys[0], (draws, tokens, 1, 1))
    # One key dimension: with q = 1 the scores are the keys themselves, the same for every query.
    k = jnp.log(jax.random.exponential(keys[1], (draws, tokens, 1, 1)))
    at = np.arange(1, tokens + 1)
    for q, expected in ((jnp.zeros_like(k), 1 / at), (jnp.ones_like(k), 2 / (at + 1))):
        out = attention(q, k, v, mask=SCANS["raster"]((2, 4)), scale=1.0)
        np.testing.assert_allclose(out[..., 0, 0].var(0), sigma**2 * expected, rtol=0.05)


def dependence(scan, grid, side=4):
    """(n, n): whether the output of one attention at a token moves with another token."""
    n = grid[0] * grid[1]
    q, k, v = jax.random.normal(KEY, (3, 1, n, 1, side))

    def at(x):
        return attention(x * q, x * k, x * v, mask=SCANS[scan](grid))[0, :, 0].sum(-1)

    return np.asarray(jax.jacobian(at)(jnp.ones((1, n, 1, 1))))[:, 0, :, 0, 0] != 0


def test_what_is_masked_has_no_influence():
    raster = dependence("raster", (3, 4))
    np.testing.assert_array_equal(raster, np.tril(np.ones((12, 12), bool)))
    corner = dependence("mask_corner", (3, 4)).reshape(3, 4, 3, 4)
    for r, c, r2, c2 in np.ndindex(3, 4, 3, 4):
        assert corner[r, c, r2, c2] == (not (r2 > r and c2 > c))
    assert corner[:, 0, 2, 2].tolist() == [False, False, True]  # (r', 0) sees (r', c')


def test_a_network_with_a_full_block_sees_everything():
    model = network("fc", scan=SCANS["raster"])
    params, x = init(model), images(1)

    def first(x):  # the answer for the first patch
        return jnp.abs(run(model, params, x)[0, :PATCH, :PATCH]).sum()

    moved = np.abs(np.asarray(jax.jit(jax.grad(first))(x)))[0].sum(-1)
    assert (moved > 0).all()
    causal = network("c", scan=SCANS["raster"])
    params = init(causal)

    def first(x):
        return jnp.abs(run(causal, params, x)[0, :PATCH, :PATCH]).sum()

    moved = np.abs(np.asarray(jax.jit(jax.grad(first))(x)))[0].sum(-1)
    assert (moved[:PATCH, :PATCH] > 0).all() and moved.sum() == moved[:PATCH, :PATCH].sum()


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (8, 16), (12, 6)])
def test_one_set_of_weights_runs_at_any_size(size):
    model = network("fc", told=CONV, scale=LogLength(16))
    params = init(model)
    x = images(2, *size)
    out = run(model, params, x)
    assert out.shape == x.shape and np.isfinite(out).all()
    np.testing.assert_array_equal(join_patches(split_patches(x, PATCH), size[0] // PATCH), x)


# --------------------------------------------------------------------------- the convolution


def test_with_a_dirac_kernel_nothing_is_added():
    """Full blocks and a Dirac convolution are DiT without positions, bit for bit."""
    with_conv, without = network(told=CONV), network()
    params, x = init(without), images()
    dirac = init(with_conv, random=False)["position"]
    t, y = told()
    one, two = (
        model.apply({"params": p}, x, t, label=y)
        for model, p in ((with_conv, {**params, "position": dirac}), (without, params))
    )
    np.testing.assert_array_equal(one, two)


def test_dilation_is_drawn_in_training_alone():
    layer = LocalityEnhancement(p_dilate=0.5)
    x = jax.random.normal(KEY, (1, 16, 8))
    params = layer.init(KEY, x, (4, 4))

    def outputs(layer, train):
        rngs = [{"dropout": jax.random.key(i)} for i in range(24)]
        return {
            np.asarray(layer.apply(params, x, (4, 4), train=train, rngs=r)).tobytes() for r in rngs
        }

    assert len(outputs(layer, True)) == 2
    assert len(outputs(layer, False)) == 1
    assert outputs(LocalityEnhancement(), True) == outputs(layer, False)


# --------------------------------------------------------------------------- longer sequences


def test_scores_are_scaled_beyond_the_size_trained_on():
    assert LogLength(256)(256, 64) * math.sqrt(64) == 1.0
    assert LogLength(256)(1024, 64) * math.sqrt(64) == pytest.approx(math.sqrt(1.25))
    plain, scaled = network("fc"), network("fc", scale=LogLength(16))
    params = init(plain)
    same, larger = images(), images(2, 16, 16)
    np.testing.assert_array_equal(run(plain, params, same), run(scaled, params, same))
    assert np.abs(run(plain, params, larger) - run(scaled, params, larger)).max() > 1e-4


@pytest.mark.parametrize("stretch", ["none", "interpolate", "ntk", "yarn", "riflex"])
def test_stretched_positions_are_plain_where_trained(stretch):
    def at(grid, stretch):
        return network(told=positions("rope", trained=(4, 4), grid=grid, stretch=stretch))

    params, x = init(at((4, 4), "none")), images()
    plain = run(at((4, 4), "none"), params, x)
    np.testing.assert_allclose(run(at((4, 4), stretch), params, x), plain, atol=1e-5)
    larger = images(2, 16, 16)
    off = run(at((8, 8), stretch), params, larger) - run(at((8, 8), "none"), params, larger)
    assert (np.abs(off).max() < 1e-5) == (stretch == "none")


# ----------------------------------------------------------------------------- the config


def tiny(**fields):
    return jaxformer.load("ledit:tiny", **fields)


def test_every_kind_of_position_is_one_recipe():
    counts = {}
    for kind in ("conv", "none", "sincos", "learned", "rope"):
        task = tiny(model__position=kind).task
        batch = {"image": np.zeros((1, 16, 16, 3)), "label": np.zeros(1, int)}
        shapes = jax.eval_shape(functools.partial(task.init, KEY), batch)[0]
        counts[kind] = sum(x.size for x in jax.tree.leaves(shapes))
    assert counts["none"] == counts["sincos"] == counts["rope"]
    assert counts["conv"] - counts["none"] == 9 * 32 * 32 + 32
    assert counts["learned"] - counts["none"] == 64 * 32


def test_released_weights_become_a_run_to_fine_tune(tmp_path):
    """`jaxformer import --paper ledit`: DiT's weights, its position table left out, answer as a
    DiT without positions does, the causal blocks aside.
    """
    case = Case(DIRECTORY / "ledit__dit_forward.npz")
    c = case.config
    save_file(case.part("param"), tmp_path / "dit.safetensors")
    fields = {
        "model__width": c["hidden_size"],
        "model__depth": c["depth"],
        "model__heads": c["num_heads"],
        "model__patch": c["patch_size"],
        "model__conv_init": "dirac",
        "model__pattern": "f",
        "data__source": "latents",
        "data__channels": c["in_channels"],
        "data__classes": c["num_classes"],
    }
    for size in ("height", "width", "trained_height", "trained_width"):
        fields[f"data__{size}"] = c["input_size"]
    import_authors("ledit", tmp_path / "dit.safetensors", tmp_path / "run", **fields)
    subject = open_subject(tmp_path / "run")
    x = jnp.moveaxis(case.inputs["x"], 1, -1)
    given = {"label": case.inputs["y"]}
    out = subject.task.denoise(subject.state.params, {}, x, case.inputs["t"], given)
    case.check("out/nope", jnp.moveaxis(out, -1, 1))
    config = load_config("ledit:paper", {"model.conv_norm": True})
    with pytest.raises(ConfigError, match=r"model\.conv_norm=True"):
        authors.read(config, {**case.weights})


def test_the_table_of_the_authors_is_our_sinusoid():
    case = Case(DIRECTORY / "ledit__dit_forward.npz")
    side = case.config["input_size"] // case.config["patch_size"]
    table = grid_sinusoid((side, side), case.config["hidden_size"])
    np.testing.assert_allclose(case.arrays["param/pos_embed"][0], table, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"data.height": 17}, r"model\.patch=2: must divide data\.height=17"),
        ({"model.pattern": "fx"}, r"model\.pattern='fx'"),
        ({"model.pattern": "fcf"}, r"must divide model\.depth=2"),
        ({"model.scan_order": "spiral"}, r"model\.scan_order='spiral': must be one of raster"),
        ({"model.position": "rotary"}, r"model\.position='rotary': must be one of conv"),
        ({"model.stretch": "more"}, r"model\.stretch='more': must be one of none"),
        ({"model.attn_scale": "log"}, r"model\.attn_scale='log': must be one of none"),
        ({"diffusion.process": "sde"}, r"diffusion\.process='sde': must be one of ddpm"),
        ({"data.source": "web"}, r"data\.source='web': must be one of scenes"),
        ({"data.classes": 5}, r"data\.classes=5: scenes have 4"),
        ({"diffusion.drop": 1.0}, r"diffusion\.drop=1\.0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_mistakes_are_named(fields, said):
    with pytest.raises(ConfigError, match=said):
        build(load_config("ledit:tiny", fields))


def test_latents_are_read_from_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, rows in (("train", 8), ("val", 3)):
        np.save(tmp_path / f"{split}_latents.npy", np.float16(rng.normal(size=(rows, 4, 16, 16))))
        np.save(tmp_path / f"{split}_labels.npy", np.arange(rows) % 4)
    recipe = tiny(data__source="latents", data__folder=str(tmp_path), data__channels=4)
    batch = recipe.phases[0].data.batch(0)
    assert batch["image"].shape == (8, 16, 16, 4) and batch["seed"].dtype == np.uint32
    first = np.load(tmp_path / "train_latents.npy")
    assert any(np.array_equal(batch["image"][0], x.transpose(1, 2, 0)) for x in np.float32(first))
    (tmp_path / "val_labels.npy").unlink()
    with pytest.raises(ConfigError, match=r"val_labels\.npy' is missing"):
        recipe.evaluators[0].data.batch(0)


def test_the_flow_is_a_config_away():
    recipe = tiny(diffusion__process="flow", sample__sampler="euler")
    batch = {"image": np.zeros((2, 16, 16, 3)), "label": np.zeros(2, int)}

    @jax.jit
    def score():
        params, extra = recipe.task.init(KEY, batch)
        return recipe.task.loss(params, extra, batch, key=KEY, train=False)

    loss = score()
    assert set(loss.metrics) == {"loss", "mse"} and np.isfinite(loss.loss)


def test_models_are_values():
    """Two equal configs give equal models, so that nothing is compiled twice."""
    one, two = tiny().task, tiny().task
    assert one == two and hash(one) == hash(two) and isinstance(one.model, DiT)
    assert dataclasses.replace(one, drop=0.5) != one
    assert one.model.masks[0]((2, 2)) == Full()
    assert SCANS["raster"]((2, 2)) == Causal()
