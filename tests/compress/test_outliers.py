"""Outlier injection keeps the function and puts outliers where it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import paths
from jaxformer.compress.outliers import at_norms, at_values, draw_channels
from jaxformer.models.encoder import token_classifier
from jaxformer.models.swin import swin
from jaxformer.models.transformer import Transformer
from jaxformer.models.vit import vit
from jaxformer.nn.block import stack_layers
from jaxformer.recipe import ConfigError

KEY = jax.random.key(0)
CHANNELS, FACTOR = (1, 6), 20.0


def trunk(**fields):
    return Transformer(width=16, depth=2, heads=4, hidden=24, **fields)


def images(side):
    return jax.random.normal(KEY, (2, side, side, 3))


def tokens():
    return jax.random.randint(KEY, (3, 7), 0, 11)


def encoder(**fields):
    return token_classifier(trunk(**fields), vocabulary=11, length=7, classes=3)


def disturbed(params):
    """Biases and gains as of a trained model, not 0 and 1."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return tree.unflatten(moved)


MODELS = {
    "vit": (lambda: vit(trunk(), image_size=8, patch=4, classes=3), lambda: images(8)),
    "swin": (
        # 6 positions a side: windows of 4 are padded
        lambda: swin(
            image_size=12, patch=2, width=8, depths=(2, 1), heads=(2, 2), window=4, classes=3
        ),
        lambda: images(12),
    ),
    "encoder": (encoder, tokens),
    "gated": (lambda: encoder(mlp="swiglu", norm="rmsnorm", kv_heads=2), tokens),
    "scanned": (lambda: encoder(scan=True), tokens),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("inject", [at_norms, at_values])
def test_the_function_stays(name, inject):
    make, inputs = MODELS[name]
    model, x = make(), inputs()
    params = disturbed(model.init(KEY, x)["params"])
    channels = (1, 3) if inject is at_values else CHANNELS
    injected = inject(params, channels, FACTOR)
    before, after = (model.apply({"params": p}, x) for p in (params, injected))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    moved = {n for n, x in paths.leaves(params).items() if (paths.leaves(injected)[n] != x).any()}
    expected = {"value", "out"} if inject is at_values else {"query", "key", "value", "up", "norm"}
    assert expected <= {part for n in moved for part in n.split("/")}
    assert not [n for n in moved if n.startswith(("head", "encoder/norm", "encoder/embed"))]


def test_outliers_are_as_large_as_asked():
    model, x = encoder(), tokens()
    params = disturbed(model.init(KEY, x)["params"])
    injected = at_norms(params, CHANNELS, FACTOR)

    def norms(params):
        _, seen = model.apply({"params": params}, x, capture_intermediates=True)
        found = paths.leaves(seen["intermediates"])
        return {n: y for n, y in found.items() if "_residual/norm" in n}

    before, after = norms(params), norms(injected)
    assert len(before) == 4
    gain = np.where(np.isin(np.arange(16), CHANNELS), FACTOR, 1.0)
    for name in before:
        np.testing.assert_allclose(after[name], before[name] * gain, rtol=1e-4, atol=1e-4)


def test_powers_of_two_change_no_bit():
    model, x = encoder(), tokens()
    params = disturbed(model.init(KEY, x)["params"])
    for inject, channels in ((at_norms, CHANNELS), (at_values, (0, 2))):
        after = model.apply({"params": inject(params, channels, 32.0)}, x)
        np.testing.assert_array_equal(after, model.apply({"params": params}, x))


def test_post_norm_blocks_keep_their_function_at_values_only():
    model, x = encoder(order="post"), tokens()
    params = disturbed(model.init(KEY, x)["params"])
    before = model.apply({"params": params}, x)
    after = model.apply({"params": at_values(params, (1,), FACTOR)}, x)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    broken = model.apply({"params": at_norms(params, CHANNELS, FACTOR)}, x)
    assert float(jnp.abs(broken - before).max()) > 1e-2


def test_stacked_layers_are_changed_alike():
    params = disturbed(encoder().init(KEY, tokens())["params"])
    for inject, channels in ((at_norms, CHANNELS), (at_values, (1, 3))):
        one = stack_layers(inject(params, channels, FACTOR))
        other = inject(stack_layers(params), channels, FACTOR)
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_channels_are_drawn_from_a_seed():
    assert draw_channels(128, 4, 3) == draw_channels(128, 4, 3) != draw_channels(128, 4, 4)
    assert len(set(draw_channels(8, 8))) == 8


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda p: at_norms(p, (16,), 2.0), r"outliers\.channels: 16 is none of .* 0 to 15"),
        (lambda p: at_values(p, (4,), 2.0), r"outliers\.channels: 4 is none of .* 0 to 3"),
        (lambda p: at_norms(p, (0,), 0.0), r"outliers\.factor=0\.0: must be positive"),
        (lambda p: at_norms({"kernel": jnp.ones(2)}, (0,), 2.0), "hold no block"),
        (lambda p: at_values({"kernel": jnp.ones(2)}, (0,), 2.0), "hold no attention"),
        (lambda p: draw_channels(4, 5), r"outliers\.count=5: must be from 0 to the width 4"),
    ],
)
def test_mistakes_are_named(act, said):
    params = encoder().init(KEY, tokens())["params"]
    with pytest.raises(ConfigError, match=said):
        act(params)
