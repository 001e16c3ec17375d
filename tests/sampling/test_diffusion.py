"""Diffusion: processes, samplers, guidance, the task, distances between sets of examples."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.data.base import DeviceData, FixedData
from jaxformer.data.sources.scenes import Scenes
from jaxformer.errors import ConfigError
from jaxformer.evaluation.frechet import (
    FrechetDistance,
    Moments,
    RandomFeatures,
    frechet_distance,
)
from jaxformer.evaluation.pictures import grid, write_examples
from jaxformer.models.dit import dit
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import Denoises, EvalContext, TrainState
from jaxformer.sampling.diffusion import (
    DDIM,
    SAMPLERS,
    Ancestral,
    Euler,
    Heun,
    Point,
    guide,
    named_sampler,
    sample,
)
from jaxformer.tasks.diffuse import ClassLabel, DiffusionTask, Latents, Pixels
from jaxformer.tasks.gaussian_diffusion import (
    FixedVariance,
    GaussianDiffusion,
    LearnedRange,
    gaussian_kl,
    level_log_likelihood,
    respace,
)
from jaxformer.tasks.noising import RectifiedFlow

KEY = jax.random.key(0)
DDPM = GaussianDiffusion(variance=FixedVariance())
CLASSES = ClassLabel(3)


# ------------------------------------------------------------------------------- processes


def test_the_linear_schedule():
    tables = GaussianDiffusion().tables
    assert tables["kept"][0] == pytest.approx(1 - 1e-4, rel=1e-12)
    np.testing.assert_allclose(tables["beta"][[0, -1]], [1e-4, 0.02])
    assert len(GaussianDiffusion()) == 1000 and tables["kept"][-1] < 5e-5


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_mixing_has_the_moments_of_q(schedule):
    """x_t = sqrt(kept) x_0 + sqrt(1 - kept) noise, reached in one step or in all."""
    process = GaussianDiffusion(40, schedule)
    t = 25
    x, noise = jnp.full(20_000, 0.7), jax.random.normal(KEY, (20_000,))
    found = process.mix(x, noise, jnp.full(20_000, t))
    kept = process.tables["kept"][t]
    assert found.mean() == pytest.approx(0.7 * np.sqrt(kept), abs=0.02)
    assert found.var() == pytest.approx(1 - kept, rel=0.03)
    mean, variance = 0.7, 0.0
    for beta in process.tables["beta"][: t + 1]:
        mean, variance = mean * np.sqrt(1 - beta), variance * (1 - beta) + beta
    np.testing.assert_allclose([mean, variance], [0.7 * np.sqrt(kept), 1 - kept])


def test_posterior_is_bayes():
    """q(x_{t-1} | x_t, x_0) of two Gaussians multiplied."""
    process, t = GaussianDiffusion(50), 20
    beta, before = (process.tables[name][t] for name in ("beta", "before"))
    x_0, x_t = 0.3, -1.1
    # x_{t-1} ~ N(sqrt(before) x_0, 1 - before), x_t | x_{t-1} ~ N(sqrt(1 - beta) x_{t-1}, beta)
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = (np.sqrt(before) * x_0 / (1 - before) + np.sqrt(1 - beta) * x_t / beta) / precision
    at = jnp.array([t])
    found = process.posterior(jnp.array([x_0]), jnp.array([x_t]), at)
    np.testing.assert_allclose(found[0], mean, rtol=1e-5)
    np.testing.assert_allclose(np.exp(process.at("log_posterior", at)[0]), 1 / precision, rtol=1e-5)


def test_respacing():
    assert respace(1000, 1000) == tuple(range(1000))
    whole, again = GaussianDiffusion(), GaussianDiffusion().respaced(1000)
    for name, table in whole.tables.items():
        np.testing.assert_allclose(again.tables[name], table, rtol=1e-9, err_msg=name)
    assert respace(10, 4) == (0, 3, 6, 9)
    assert respace(100, "ddim10") == tuple(range(0, 100, 10))
    assert respace(10, "2,3") == (0, 4, 5, 7, 9)
    assert respace(10, 1) == (0,)
    short = whole.respaced(8)
    np.testing.assert_array_equal(short.network_time(jnp.arange(8)), respace(1000, 8))
    np.testing.assert_allclose(short.tables["kept"], whole.tables["kept"][list(respace(1000, 8))])
    for wrong in ("11", "0", "ddim7", "6,6", "many"):
        with pytest.raises(ConfigError, match=r"diffusion\.spacing"):
            respace(10, wrong)
    with pytest.raises(ConfigError, match="respaced already"):
        short.respaced(4)


def arrays(rows=64, channels=2):
    keys = jax.random.split(KEY, 4)
    shape = (rows, 3, 4, channels)
    x = jnp.round(jax.random.uniform(keys[0], shape) * 255) / 127.5 - 1
    noise = jax.random.normal(keys[1], shape)
    output = jax.random.normal(keys[2], (*shape[:-1], 2 * channels))
    return output, x, noise, jax.random.randint(keys[3], (rows,), 0, 1000).at[0].set(0)


def test_the_bound_is_no_divergence_below_zero():
    output, x, noise, t = arrays()
    losses = GaussianDiffusion().losses(output, x, noise, t)
    assert (losses["vb"] >= 0).all() and (losses["mse"] > 0).all()
    mean, log_variance = jax.random.normal(KEY, (2, 100))
    assert (gaussian_kl(mean, log_variance, 0.0, 0.0) >= 0).all()
    np.testing.assert_allclose(gaussian_kl(mean, log_variance, mean, log_variance), 0, atol=1e-6)


def test_the_bound_does_not_touch_the_noise():
    output, x, noise, t = arrays()
    process = GaussianDiffusion()

    def vb(output):
        return process.losses(output, x, noise, t)["vb"].sum()

    by_noise, by_code = jnp.split(jax.grad(vb)(output), 2, axis=-1)
    assert (by_noise == 0).all() and (jnp.abs(by_code).sum((1, 2, 3)) > 0).all()


def test_a_perfect_answer_costs_nothing():
    _, x, noise, t = arrays()
    assert float(DDPM.losses(noise, x, noise, t)["mse"].max()) == 0
    # The code -1 is the posterior's own variance: with the true noise, the two agree.
    output = jnp.concatenate([noise, -jnp.ones_like(noise)], axis=-1)
    vb = GaussianDiffusion().losses(output, x, noise, t)["vb"]
    np.testing.assert_allclose(vb[t > 20], 0, atol=2e-3)


def test_levels_share_out_all_mass():
    levels = jnp.arange(256) / 127.5 - 1
    mean, log_scale = jnp.array(0.2), jnp.array(-2.0)
    total = jnp.exp(level_log_likelihood(levels, mean, log_scale)).sum()
    assert total == pytest.approx(1.0, abs=1e-4)


def test_clipping_keeps_examples_in_range():
    output, x, noise, t = arrays()
    x_t = DDPM.mix(x, 3 * noise, t)
    clipped = dataclasses.replace(GaussianDiffusion(), clip=True).reverse(output, x_t, t)
    free = GaussianDiffusion().reverse(output, x_t, t)
    assert np.abs(clipped.start).max() <= 1 < np.abs(free.start).max()


def test_flow_is_a_straight_line():
    flow = RectifiedFlow()
    x, noise = jax.random.normal(KEY, (2, 5, 3))
    np.testing.assert_array_equal(flow.mix(x, noise, jnp.zeros(5)), x)
    np.testing.assert_array_equal(flow.mix(x, noise, jnp.ones(5)), noise)
    assert (flow.losses(noise - x, x, noise, jnp.full(5, 0.4))["mse"] == 0).all()
    times = jax.vmap(RectifiedFlow(logit_normal=True).draw)(jax.random.split(KEY, 4000))
    assert times.min() > 0 and times.max() < 1 and abs(times.mean() - 0.5) < 0.02


# -------------------------------------------------------------------------------- samplers

MEAN, SPREAD = 0.4, 0.3


class Oracle:
    """Knows the noise in a normal variable with mean 0.4 and deviation 0.3, pixel by pixel."""

    def __init__(self, process):
        self.process = process

    def check(self, given):
        pass

    def decode(self, extra, latent):
        return latent

    def denoise(self, params, extra, x, time, given):
        if isinstance(self.process, RectifiedFlow):
            t = (time / self.process.scale).reshape(-1, 1, 1, 1)
            signal, noise = 1 - t, t
        else:
            kept = jnp.asarray(self.process.tables["kept"], jnp.float32)[time].reshape(-1, 1, 1, 1)
            signal, noise = jnp.sqrt(kept), jnp.sqrt(1 - kept)
        variance = (signal * SPREAD) ** 2 + noise**2
        off = x - signal * MEAN
        epsilon = noise * off / variance
        if not isinstance(self.process, RectifiedFlow):
            return epsilon
        return epsilon - (MEAN + signal * SPREAD**2 * off / variance)


@pytest.mark.parametrize(
    ("process", "sampler"),
    [
        (DDPM, Ancestral(500)),
        (DDPM, DDIM(1000)),  # of first order: 4 % short with 250
        (RectifiedFlow(), Euler(300)),
        (RectifiedFlow(), Heun(40)),
    ],
    ids=["ddpm", "ddim", "euler", "heun"],
)
def test_an_oracle_recovers_the_statistics(process, sampler):
    drawn = sample(Oracle(process), {}, {}, {}, shape=(8, 8, 2), sampler=sampler, key=KEY, rows=400)
    assert drawn.mean() == pytest.approx(MEAN, rel=0.02)
    assert drawn.var() == pytest.approx(SPREAD**2, rel=0.02)


def test_ddim_of_eta_one_is_ancestral():
    """With the variance of the posterior, and whatever the network says."""
    process = GaussianDiffusion(variance=FixedVariance(large=False))
    x, output, noise = jax.random.normal(KEY, (3, 7, 4, 4, 2))
    t = jnp.array([0, 1, 5, 9, 0, 3, 7])
    one, two = (
        rule.step(rule.plan(process), output, Point(x, t, noise))
        for rule in (DDIM(10, eta=1.0), Ancestral(10))
    )
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


LEARNED = GaussianDiffusion()
SHORT = DDIM(4)


def small_task(process=LEARNED, null=True, **options):
    label = ClassLabel(3, null=null)
    model = dit(
        width=16,
        depth=1,
        heads=2,
        patch=2,
        channels=process.outputs(3),
        labels=label.labels,
    )
    return DiffusionTask(model, process, (label,), **options)


def random_params(task, size=8):
    """Every parameter random: a DiT that has not learned answers with 0."""
    batch = {"image": np.zeros((1, size, size, 3)), "label": np.zeros(1, int)}
    params, _ = jax.jit(task.init)(KEY, batch)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(KEY, len(leaves))
    noisy = [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


TASK = small_task()
PARAMS = random_params(TASK)


def draw(labels, task=TASK, sampler=SHORT, shape=(8, 8, 3), **options):
    return sample(
        task, PARAMS, {}, {"label": labels}, shape=shape, sampler=sampler, key=KEY, **options
    )


def test_rows_are_drawn_by_themselves():
    """What is drawn for a row does not depend on the rows beside it."""
    three, one = draw([0, 1, 2], sampler=Ancestral(4)), draw([0], sampler=Ancestral(4))
    np.testing.assert_allclose(three[:1], one, atol=1e-4)
    assert np.abs(three[0] - three[1]).max() > 0.01


def test_guidance_of_one_is_the_conditional_answer():
    c, u = jax.random.normal(KEY, (2, 3, 4, 4, 8))
    np.testing.assert_allclose(guide(c, u, 1.0), c, atol=1e-6)
    np.testing.assert_array_equal(guide(c, u, 0.0), u)
    some = guide(c, u, 3.0, channels=3)
    np.testing.assert_allclose(some[..., :3], (u + 3 * (c - u))[..., :3])
    np.testing.assert_array_equal(some[..., 3:], c[..., 3:])
    plain = draw([0, 1])
    np.testing.assert_allclose(plain, draw([0, 1], guidance=1.0 + 1e-7), atol=1e-3)
    assert np.abs(plain - draw([0, 1], guidance=4.0)).max() > 0.01
    # Guided towards "no class" nothing changes: both answers are the same.
    np.testing.assert_allclose(draw([3]), draw([3], guidance=4.0), atol=1e-3)


def test_the_network_is_told_original_steps():
    told = []

    class Listening(Oracle):
        def denoise(self, params, extra, x, time, given):
            jax.debug.callback(lambda t: told.append(int(t[0])), time)
            return super().denoise(params, extra, x, time, given)

    task = Listening(DDPM)
    jax.block_until_ready(
        sample(task, {}, {}, {}, shape=(2, 2, 1), sampler=DDIM(5), key=KEY, rows=1)
    )
    jax.effects_barrier()
    assert sorted(told, reverse=True) == told == list(respace(1000, 5))[::-1]


def test_any_size_is_drawn():
    assert draw([0], shape=(12, 8, 3)).shape == (1, 12, 8, 3)


def test_flow_runs_through_the_same_task():
    task = small_task(RectifiedFlow())
    found = sample(
        task,
        random_params(task),
        {},
        {"label": [0, 1]},
        shape=(8, 8, 3),
        sampler=Heun(2),
        key=KEY,
        guidance=2.0,
    )
    assert found.shape == (2, 8, 8, 3) and np.isfinite(found).all()


# -------------------------------------------------------------------------------- the task


def batch_of(rows):
    data = DeviceData(Scenes(8, 8), rows, 0)
    batch = dict(jax.jit(data.draw)(data.batch(0)))
    return {**batch, "label": batch["label"] % 3}


@functools.partial(jax.jit, static_argnames=("task", "train"))
def score(task, batch, key, *, train):
    return task.loss(PARAMS, {}, batch, key=key, train=train).loss


def test_it_denoises():
    assert isinstance(TASK, Denoises)


def test_what_is_drawn_for_a_row_is_its_own():
    """With seeds, the loss of a batch is the mean of those of its parts, in training too."""
    task = small_task(drop=0.4)
    batch = batch_of(8)

    def loss(rows, names=tuple(batch)):
        part = {name: batch[name][rows] for name in names}
        return score(task, part, jax.random.key(rows.start), train=True)

    halves = (loss(slice(0, 4)) + loss(slice(4, 8))) / 2
    np.testing.assert_allclose(loss(slice(0, 8)), halves, rtol=1e-5)
    # Without seeds a row draws by its number from the key, which is another one here.
    assert loss(slice(0, 4), ("image", "label")) != loss(slice(0, 4))


def test_labels_are_dropped_in_training_alone():
    """A model that sees only "no class" scores like one whose labels are all dropped."""
    batch = batch_of(64)
    task = small_task(drop=0.999)
    kept, dropped = (float(score(task, batch, KEY, train=train)) for train in (False, True))
    nothing = {**batch, "label": jnp.full(64, 3)}
    blind = float(score(task, nothing, KEY, train=False))
    assert dropped == pytest.approx(blind, rel=1e-5) and kept != dropped


def test_codecs_invert():
    x = jax.random.uniform(KEY, (2, 4, 4, 3))
    for codec in (Pixels(), Latents()):
        back = codec.decode({}, codec.encode({}, x, jax.random.split(KEY, 2)))
        np.testing.assert_allclose(back, x, atol=1e-6)
    assert float(Pixels().encode({}, jnp.ones(()), KEY)) == 1.0


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: draw([4]), r"label=4: must be from 0 to 3"),
        (lambda: draw([-1]), r"label=-1: must be"),
        (lambda: draw([0], small_task(null=False), guidance=2.0), "no null class"),
        (lambda: draw([0], sampler=Euler(2)), "Euler walks a RectifiedFlow"),
        (lambda: draw([0], small_task(RectifiedFlow())), "DDIM walks a GaussianDiffusion"),
        (lambda: draw([0], shape=(9, 8, 3)), r"model\.patch=2: must divide the image"),
        (lambda: draw([]), "no rows"),
        (lambda: named_sampler("dpm", 5), r"sample\.sampler='dpm': must be one of ddpm"),
        (lambda: Euler(0), r"sampler\.steps=0"),
        (lambda: GaussianDiffusion(schedule="square"), r"diffusion\.schedule='square'"),
        (lambda: GaussianDiffusion(times=(1000,)), r"diffusion\.times=\(1000,\)"),
        (lambda: GaussianDiffusion(1), r"diffusion\.steps=1"),
        (lambda: small_task(drop=1.0), r"diffusion\.drop=1\.0"),
        (
            lambda: TASK.loss(PARAMS, {}, {"image": np.zeros((1, 8, 8, 3))}, key=KEY, train=False),
            "has no 'label'",
        ),
        (lambda: Scenes(4, 16), r"data\.size=\(4, 16\)"),
        (lambda: grid(np.zeros((1, 4, 4, 2)), 1), "have 1 or 3 channels"),
    ],
)
def test_mistakes_are_named(act, said):
    with pytest.raises(ConfigError, match=said):
        act()


def test_samplers_have_names():
    assert {type(named_sampler(name, 5)) for name in SAMPLERS} == {Ancestral, DDIM, Euler, Heun}
    assert LearnedRange() == LearnedRange() and hash(GaussianDiffusion()) == hash(
        GaussianDiffusion()
    )


# ------------------------------------------------------------------- sets of examples


def moments(x):
    found = Moments()
    for part in np.array_split(x, 3):
        found.add(part)
    return found.mean, found.covariance


def test_frechet_distance_of_normals():
    """Of N(m, A) and N(m', B) with commuting A, B: |m - m'|^2 + sum (sqrt a - sqrt b)^2."""
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))
    a, b = np.array([1.0, 2.0, 3.0, 4.0]), np.array([4.0, 0.5, 3.0, 0.0])
    shift = np.array([1.0, -2.0, 0.0, 0.5])
    one = (np.zeros(4), rotation @ np.diag(a) @ rotation.T)
    two = (shift, rotation @ np.diag(b) @ rotation.T)
    expected = np.square(shift).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(*one, *two) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(*one, *one) == pytest.approx(0, abs=1e-9)


def test_moments_add_up():
    x = np.random.default_rng(0).normal(size=(50, 3))
    mean, covariance = moments(x)
    np.testing.assert_allclose(mean, x.mean(0))
    np.testing.assert_allclose(covariance, np.cov(x.T))


def test_features_tell_scenes_from_noise():
    features, data = RandomFeatures(), DeviceData(Scenes(16, 16), 128, 0)
    real, other = (jax.jit(data.draw)(data.batch(i))["image"] for i in (0, 1))
    noise = jax.random.uniform(KEY, real.shape)
    found = [moments(np.asarray(features(x))) for x in (real, other, noise)]
    assert frechet_distance(*found[0], *found[2]) > 20 * frechet_distance(*found[0], *found[1])
    assert features(real).shape == (128, 96) and features(jnp.ones((2, 33, 20, 3))).shape == (2, 96)


def test_the_evaluator_compares_draws_with_data():
    """An oracle for one picture is at distance 0 from data of that picture alone."""
    image = np.asarray(batch_of(8)["image"][:1])

    class Knows(DiffusionTask):
        def denoise(self, params, extra, x, time, given):
            kept = jnp.asarray(DDPM.tables["kept"], jnp.float32)[time].reshape(-1, 1, 1, 1)
            return (x - jnp.sqrt(kept) * (2 * image - 1)) / jnp.sqrt(1 - kept)

    data = FixedData({"image": image.repeat(8, 0), "label": np.zeros(8, np.int32)})
    state = TrainState(jnp.zeros((), int), PARAMS, {}, {}, KEY)
    context = EvalContext(make_mesh({"data": 1}, jax.devices()[:1]), "train")
    for task, low, high in ((Knows(TASK.model, DDPM, (CLASSES,)), 0, 1e-3), (TASK, 0.1, 1e9)):
        measure = FrechetDistance(task, data, RandomFeatures(), DDIM(10), examples=12)
        assert low <= measure(state, context)["distance"] <= high
    with pytest.raises(ConfigError, match=r"evaluate\.frechet=1"):
        FrechetDistance(TASK, data, RandomFeatures(), DDIM(10), examples=1)


def test_pictures_in_a_grid(tmp_path):
    from PIL import Image

    images = np.zeros((3, 8, 16, 3))
    images[1] = 1.0
    path = write_examples(images, 2, tmp_path / "new" / "x.png")
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (2 * 66 + 2, 2 * 130 + 2, 3)
    assert (pixels[2:66, 2:130] == 0).all() and (pixels[2:66, 132:260] == 255).all()
    latents = write_examples(np.ones((2, 4, 4, 4)), 2, tmp_path / "y.png")
    assert latents.suffix == ".npy" and np.load(latents).shape == (2, 4, 4, 4)


# ---------------------------------------------------------------------------------- scenes


def test_scenes_are_the_same_at_every_size():
    """The same rows, only rendered finer: averaged down they are about the coarse picture."""
    pictures = {}
    for side in (16, 32):
        data = DeviceData(Scenes(side, side, checker=side // 8), 16, 3)
        batch = jax.jit(data.draw)(data.batch(2))
        pictures[side] = batch["image"], batch["label"], batch["seed"]
    coarse, fine = pictures[16], pictures[32]
    np.testing.assert_array_equal(coarse[1], fine[1])
    np.testing.assert_array_equal(coarse[2], fine[2])
    averaged = fine[0].reshape(16, 16, 2, 16, 2, 3).mean((2, 4))
    assert float(jnp.abs(averaged - coarse[0]).mean()) < 0.01
    assert len(set(np.asarray(coarse[1]).tolist())) == 4


def test_the_class_says_which_is_left():
    data = DeviceData(Scenes(32, 32), 64, 0)
    batch = jax.jit(data.draw)(data.batch(0))
    image, label = np.asarray(batch["image"]), np.asarray(batch["label"])
    green = (image[..., 1] > 0.6) & (image[..., 0] < 0.4)  # squares of even classes
    for picture, of in zip(green[label % 2 == 0], label[label % 2 == 0], strict=True):
        columns = np.nonzero(picture)[1]
        assert (columns.mean() < 16) == (of == 2)
