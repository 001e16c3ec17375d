"""3DTRL: identities of the paper, its renderer, films and folders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxformer.analyze.summary import parameter_count
from jaxformer.catalogue import load
from jaxformer.config import load_config
from jaxformer.data.sources.ftpv import Pairs, Trajectories, Triplets
from jaxformer.data.sources.views import CLASSES, Films, Views, look
from jaxformer.errors import ConfigError
from jaxformer.evaluation.alignment import alignment_error, cycle_error, kendalls_tau
from jaxformer.models.transformer import Transformer
from jaxformer.nn.block import insert
from jaxformer.nn.geometry import cell_centres, euler_rotation, lift
from jaxformer.papers.tokens3d.model import Control, Tokens3D
from jaxformer.papers.tokens3d.recipe import classifier
from jaxformer.tasks.contrastive import time_contrastive
from jaxformer.train.fit import FitOptions, fit

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 1 + 12, 16))


def layer(**parts):
    module = Tokens3D(**{"grid": (3, 4), **parts})
    return module, module.init(jax.random.key(1), X)["params"]


def at(params, *names):
    for name in names:
        params = params[name]
    return params


def test_rotations_keep_lengths_and_the_hand():
    turns = euler_rotation(jax.random.normal(KEY, (50, 3)) * 3)
    np.testing.assert_allclose(turns @ turns.mT, np.broadcast_to(np.eye(3), (50, 3, 3)), atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(turns), 1.0, atol=1e-5)
    np.testing.assert_array_equal(euler_rotation(jnp.zeros(3)), np.eye(3))
    quarter = euler_rotation(jnp.array([0.0, 0.0, np.pi / 2]))
    np.testing.assert_allclose(quarter @ jnp.array([1.0, 0, 0]), [0, -1, 0], atol=1e-6)


def test_a_flat_picture_stays_flat():
    uv = cell_centres(3, 4)
    np.testing.assert_array_equal(lift(uv, jnp.full(12, 2.0)), np.c_[2 * uv, np.full(12, 2.0)])
    module, params = layer()
    _, seen = module.apply({"params": params}, X, mutable="intermediates")
    p, world = (seen["intermediates"][name][0] for name in ("p", "P"))

    def distances(points):
        return np.linalg.norm(points[:, :, None] - points[:, None], axis=-1)

    np.testing.assert_allclose(distances(p), distances(world), atol=1e-4)


def test_cells_are_numbered_by_rows_around_the_middle():
    uv = cell_centres(3, 4)
    np.testing.assert_array_equal(uv.sum(0), 0)
    np.testing.assert_array_equal(uv[0], [-1.5, -1.0])
    np.testing.assert_array_equal(uv[1] - uv[0], [1, 0])
    np.testing.assert_array_equal(uv[4] - uv[0], [0, 1])


def test_without_an_embedding_the_layer_is_not_there():
    module, params = layer()
    out = jax.tree.map(jnp.zeros_like, params["embed"]["out"])
    params = {**params, "class_embed": 0 * params["class_embed"]}
    params = {**params, "embed": {**params["embed"], "out": out}}
    np.testing.assert_array_equal(module.apply({"params": params}, X), X)
    again = module.apply({"params": params}, X, position=lambda x: x + 1)
    np.testing.assert_array_equal(again, X + 1)


def test_translations_start_alike_in_all_directions():
    _, params = layer()
    translation = at(params, "pose", "translation")
    assert (translation["kernel"] == 1).all() and (translation["bias"] == 0).all()
    assert np.ptp(at(params, "pose", "rotation", "kernel")) > 0


def test_depths_never_reach_the_class_token():
    module, params = layer()
    deeper = jax.tree.map(lambda x: x + 1.0, params["depth"])
    a, b = (module.apply({"params": {**params, "depth": d}}, X) for d in (params["depth"], deeper))
    np.testing.assert_array_equal(a[:, 0], b[:, 0])
    assert np.abs(a[:, 1:] - b[:, 1:]).max() > 1e-3


@pytest.mark.parametrize("width, count", [(192, 230_919), (384, 902_919)])
def test_parameters_are_as_many_as_the_authors(width, count):
    x = jax.ShapeDtypeStruct((1, 1 + 196, width), jnp.float32)
    shapes = jax.eval_shape(lambda x: Tokens3D().init(KEY, x), x)
    assert parameter_count(shapes["params"]) == count
    control = parameter_count(jax.eval_shape(lambda x: Control().init(KEY, x), x)["params"])
    assert control == pytest.approx(count, rel=0.01)


@pytest.mark.parametrize("source", ["both-sep", "both-avg", "cls", "tok"])
def test_frames_of_a_clip_share_a_camera(source):
    module = Tokens3D(source=source, class_token=source != "tok")
    clip = jax.random.normal(KEY, (2, 3, 16 + (source != "tok"), 16))
    params = module.init(jax.random.key(1), clip)["params"]
    y, seen = module.apply({"params": params}, clip, mutable="intermediates")
    assert y.shape == clip.shape and seen["intermediates"]["R"][0].shape == (2, 3, 3)
    one = module.apply({"params": params}, clip[:, 0])
    same = module.apply({"params": params}, jnp.repeat(clip[:, :1], 3, axis=1))
    np.testing.assert_allclose(same[:, 1], one, atol=1e-5)


def test_films_of_themselves_are_aligned():
    z = np.cumsum(np.ones((12, 3)), 0)
    assert (alignment_error(z, z), cycle_error(z, z), kendalls_tau(z, z)) == (0.0, 0.0, 1.0)
    assert kendalls_tau(z, z[::-1]) == -1.0
    assert kendalls_tau(z, np.zeros((12, 3))) == -1.0  # ties are out of order


def test_the_loss_is_about_both_views():
    trips = jax.random.normal(KEY, (2, 4, 3, 8))

    def gradient(slip):
        loss = lambda t: time_contrastive(t[0], t[1], slip=slip).sum()
        return np.abs(jax.grad(loss)(trips)).sum((1, 3))

    assert (gradient(False) > 0).all()
    assert (gradient(True)[1, 1:] == 0).all()
    alike = jnp.zeros((1, 3, 8))
    far = alike.at[:, 2].set(10.0)
    assert time_contrastive(alike, alike)[0] == 30.0 and time_contrastive(far, far)[0] == 0.0


def test_inserts_leave_the_names_of_blocks():
    plain = classifier(load_config("tokens3d:tiny", {"model.layer": "none"}), 3)
    more = classifier(load_config("tokens3d:tiny"), 3)
    image = jnp.zeros((1, 32, 32, 3))
    a, b = (
        jax.eval_shape(lambda m=m: m.init(KEY, image))["params"]["encoder"]["stack"]
        for m in (plain, more)
    )
    assert set(b) - set(a) == {"insert_2"}
    assert jax.tree.map(jnp.shape, {k: b[k] for k in a}) == jax.tree.map(jnp.shape, a)


def test_the_position_is_added_once_more():
    config = load_config("tokens3d:tiny")
    model = classifier(config, 3)
    image = jax.random.normal(KEY, (1, 32, 32, 3))
    params = model.init(KEY, image)["params"]
    seen = {}

    def watch(next_call, args, kwargs, context):
        y = next_call(*args, **kwargs)
        if isinstance(context.module, Tokens3D) and context.method_name == "__call__":
            seen["more"] = kwargs["position"](args[0]) - args[0]
        return y

    with nn.intercept_methods(watch):
        model.apply({"params": params}, image)
    table = params["encoder"]["position"]["table"]
    np.testing.assert_allclose(seen["more"][0], table, atol=1e-5)


def test_views_are_pictures_of_what_stands_there():
    keys = jax.random.split(KEY, 40)
    rows = jax.jit(Views(32, 45.0, 90.0))(None, keys)
    image = np.asarray(rows["image"])
    assert image.shape == (40, 32, 32, 3) and image.min() >= 0 and image.max() <= 1
    assert (image.max((1, 2, 3)) > 0.3).all() and (image[:, 0].max(-1) < 0.5).mean() > 0.9
    assert set(np.asarray(rows["label"])) == set(range(CLASSES))
    ahead = look(jnp.array([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 0]]), jnp.zeros(()), jnp.zeros(()))
    assert ahead[0, 0] > 0 and ahead[1, 1] < 0 and (ahead[:, 2] > 0).all()  # right, up, in front
    aside = look(jnp.array([[1.0, 0, 0]]), jnp.pi / 2, jnp.zeros(()))
    np.testing.assert_allclose(aside[0, :2], 0, atol=1e-6)


def test_moments_of_films_are_near_or_far():
    films = Films(16, length=12, near=2)
    for key in jax.random.split(KEY, 50):
        anchor, positive, negative = np.asarray(films._moments(key))
        assert 0 < abs(anchor - positive) <= 2 < abs(anchor - negative)
    row = films(None, jax.random.split(KEY, 2))
    assert row["views"].shape == (2, 2, 3, 16, 16, 3)
    whole = Films(16, length=12, near=2, whole=True)(None, jax.random.split(KEY, 1))
    assert whole["frames"].shape == (1, 2, 12, 16, 16, 3)


def write_films(root, trajectories=2, views=3, frames=9):
    from PIL import Image

    rng = np.random.default_rng(0)
    for t in range(trajectories):
        for name in ["fpv", *(f"tpv/view_{v:04d}" for v in range(views))]:
            folder = root / f"tr_{t:04d}" / name
            folder.mkdir(parents=True)
            for f in range(frames):
                pixels = rng.integers(0, 255, (20, 24, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{f:06d}.jpg")


def test_folders_of_films_are_read(tmp_path):
    pytest.importorskip("PIL")
    write_films(tmp_path)
    source = Triplets(Trajectories(tmp_path, views=2), 16, near=2)
    assert len(source) == 2
    example = source.draw(source[1], np.random.default_rng(0))
    assert example["views"].shape == (2, 3, 16, 16, 3) and example["views"].max() <= 1
    assert len(Trajectories(tmp_path, first_person=True).films[0]) == 4
    assert Pairs(Trajectories(tmp_path), 16)[0]["frames"].shape == (2, 9, 16, 16, 3)
    (tmp_path / "tr_0000" / "tpv" / "view_0001" / "000003.jpg").unlink()
    with pytest.raises(ConfigError, match=r"as many frames in each.*'view_0001': 8"):
        len(source.__class__(Trajectories(tmp_path), 16))


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["concat", "control", "none"])
def test_every_layer_learns(layer):
    recipe = load("tokens3d:tiny", model__layer=layer, steps=5)
    state = fit(recipe, options=FitOptions(progress=False))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_films_are_learned_and_measured(tmp_path):
    small = {"model__width": 32, "model__depth_blocks": 3, "model__heads": 2, "batch_size": 8}
    recipe = load("tokens3d:films", steps=4, data__frames=10, evaluate__batches=1, **small)
    fit(recipe, workdir=tmp_path, options=FitOptions(progress=False))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "alignment/kendalls_tau" in text


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: layer(source="left"), "model.source='left'"),
        (lambda: layer(class_token=False), "needs a class token"),
        (lambda: layer(grid=None), "12 patches are no 3 x 3 grid"),
        (lambda: Views(32, 50.0, 40.0), "data.azimuth=50.0, 40.0"),
        (lambda: Films(32, length=7), "data.frames=7"),
        (lambda: Trajectories("/nowhere").films, "is not a folder"),
        (lambda: load("tokens3d:tiny", model__layer="some"), "model.layer='some'"),
        (lambda: load("tokens3d:tiny", model__at=9), "blocks 0 to 2"),
        (lambda: insert(Transformer(8, 2, 2, scan=True).stack(), 0, None), "scan=True"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
