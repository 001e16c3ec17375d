"""The plain models: decoding, layer stacks, precision, padding, interception, validation."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxformer import paths
from jaxformer.errors import ConfigError
from jaxformer.models.encoder import feature_classifier, token_classifier
from jaxformer.models.lm import decoder_lm
from jaxformer.models.transformer import Transformer
from jaxformer.models.vit import vit
from jaxformer.nn.attention import Fused, Mix, Scores, Softmax, Unfused
from jaxformer.nn.block import ScannedStack, stack_layers, unstack_layers
from jaxformer.nn.cache import DecodeUnsupported
from jaxformer.nn.einsum import Einsum
from jaxformer.nn.make import Make, swap
from jaxformer.nn.mlp import MLP
from jaxformer.nn.norm import Norm
from jaxformer.nn.remat import REMATS
from jaxformer.parallel.sharding import PARAMETER_RULES, axes_of
from jaxformer.tasks import linen

KEY = jax.random.key(0)
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 13)
SMALL = Transformer(width=16, depth=2, heads=4)


def small_lm(tied=True, mixer=None, **changes):
    trunk = dataclasses.replace(SMALL, **changes)
    return decoder_lm(trunk, vocabulary=13, length=12, tied=tied, mixer=mixer)


@pytest.mark.parametrize(
    "model",
    [
        small_lm(),
        small_lm(position="rope", kv_heads=2, norm="rmsnorm", mlp="swiglu", tied=False),
        swap(small_lm(position="alibi", order="post", use_bias=False), Fused, Unfused),
        small_lm(position="sinusoidal", scan=True),
    ],
    ids=["learned", "rope, grouped", "alibi, post-norm, unfused", "sinusoidal, scanned"],
)
def test_cached_decoding_equals_the_whole_sequence(model, weights):
    params = weights(model.init, TOKENS)["params"]
    whole = jax.jit(lambda params: model.apply({"params": params}, TOKENS))(params)
    read = jax.jit(lambda cache, tokens: linen.decode(model, params, {}, cache, tokens))
    cache = linen.start_cache(model, 2, 9)
    end = 0
    for size in (4, 2, 1, 1, 1):  # a prompt in two parts, then single steps
        logits, cache = read(cache, TOKENS[:, end : end + size])
        end += size
        expected = whole[:, end - 1 : end]  # after the last token of a part
        np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_cache_is_written_in_place(rows):
    """No step copies or turns a whole cache, which would cost more than the model's weights do."""
    model, length = small_lm(), 11
    params = jax.eval_shape(lambda: model.init(KEY, TOKENS))["params"]
    cache = jax.eval_shape(lambda: linen.start_cache(model, rows, length))
    step = jax.jit(
        lambda cache, params, tokens: linen.decode(model, params, {}, cache, tokens)[::-1],
        donate_argnums=0,
    )
    tokens = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    program = step.lower(cache, params, tokens).compile().as_text()
    heads, size = SMALL.heads, SMALL.width // SMALL.heads
    whole = rf"f32\[({rows},)?({heads},{length}|{length},{heads}),{size}\]\S* "
    assert re.search(whole, program)
    assert not re.search(whole + r"(copy|transpose)\(", program)


def test_scanned_and_rematerialised_equal_unrolled(weights):
    unrolled, scanned = small_lm(), small_lm(scan=True)
    params = weights(unrolled.init, TOKENS)["params"]
    stacked = stack_layers(params)
    abstract = jax.eval_shape(lambda: scanned.init(KEY, TOKENS))["params"]
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, abstract)
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked), params)

    def loss(model):
        return jax.jit(
            jax.value_and_grad(lambda p: jnp.square(model.apply({"params": p}, TOKENS)).mean())
        )

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

    expected = loss(unrolled)(params)
    for remat in sorted(REMATS.keys() - {"none"}):
        value, grad = loss(small_lm(scan=True, remat=remat))(stacked)
        jax.tree.map(close, (value, unstack_layers(grad)), expected)
        jax.tree.map(close, loss(small_lm(remat=remat))(params), expected)


def test_scanned_layers_start_different():
    stack = ScannedStack(Make(MLP, hidden=4), depth=2)
    kernel = stack.init(KEY, jnp.ones((1, 3)))["params"]["blocks"]["up"]["kernel"]
    assert kernel.shape == (2, 3, 4)
    assert float(abs(kernel[0] - kernel[1]).max()) > 0.1


def test_different_blocks_cannot_be_stacked(weights):
    params = weights(small_lm().init, TOKENS)["params"]
    del params["stack"]["block_1"]["mlp"]["up"]["bias"]
    with pytest.raises(ConfigError, match=r"stack_layers: block_0 \.\. block_1 differ"):
        stack_layers(params)


def test_gpt2_small_has_its_parameter_count():
    model = decoder_lm(Transformer(width=768, depth=12, heads=12), vocabulary=50257, length=1024)
    params = jax.eval_shape(lambda: model.init(KEY, TOKENS))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 124_439_808


def test_every_kernel_has_a_sharding_rule():
    model = small_lm(mlp="swiglu", tied=False, scan=True)
    shapes = jax.eval_shape(lambda: model.init(KEY, TOKENS))["params"]
    found = {
        name: axes_of(name, leaf.ndim, PARAMETER_RULES)
        for name, leaf in paths.leaves(shapes).items()
        if name.endswith(("kernel", "embed/table"))
    }
    layer = "stack/blocks/"
    into_heads = (["layers", "embed"], ["heads", "head"])
    into_mlp = (["layers", "embed"], ["mlp"])
    assert found == {
        "embed/table": ([], ["vocab", "embed"]),
        "head/kernel": (["embed"], ["vocab"]),
        **{f"{layer}mixer/{name}/kernel": into_heads for name in ("query", "key", "value")},
        f"{layer}mixer/out/kernel": (["layers", "heads", "head"], ["embed"]),
        **{f"{layer}mlp/{name}/kernel": into_mlp for name in ("gate", "up")},
        f"{layer}mlp/down/kernel": (["layers", "mlp"], ["embed"]),
    }


def test_fused_and_unfused_models_agree_and_unfused_shows_every_step(weights):
    model = small_lm(position="rope")
    opened = swap(model, Fused, Unfused)
    params = weights(model.init, TOKENS)["params"]
    assert opened != model
    kinds = {}

    def watch(call, args, kwargs, context):
        kinds.setdefault("/".join(context.module.path), type(context.module))
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        logits = jax.jit(opened.apply)({"params": params}, TOKENS)
    whole = jax.jit(model.apply)({"params": params}, TOKENS)
    np.testing.assert_allclose(logits, whole, atol=1e-5)
    for i in range(2):
        found = {path.removeprefix(f"stack/block_{i}/"): kind for path, kind in kinds.items()}
        expected = {
            **{f"mixer/{name}": Einsum for name in ("query", "key", "value", "out")},
            **{"mlp/up": Einsum, "mlp/down": Einsum, "mixer/core/mix": Mix},
            **{"mixer/core/scores": Scores, "mixer/core/softmax": Softmax},
        }
        assert expected.items() <= found.items()


def test_an_interception_can_change_both_operands_of_a_weight_matmul(weights):
    model = small_lm()
    params = weights(model.init, TOKENS)["params"]
    halves = {"kernel": 0.5, "bias": 0.5}

    def halve(call, args, kwargs, context):
        if isinstance(context.module, Einsum) and context.method_name == "contract":
            x, kernel, bias = args
            args = (x, kernel * halves["kernel"], bias * halves["bias"])
        return call(*args, **kwargs)

    with nn.intercept_methods(halve):
        changed = model.apply({"params": params}, TOKENS)
    half = jax.tree_util.tree_map_with_path(
        lambda path, x: x * halves[path[-1].key] if path[-2].key in _MATMULS else x, params
    )
    expected = jax.jit(model.apply)({"params": half}, TOKENS)
    np.testing.assert_allclose(changed, expected, atol=1e-5)


_MATMULS = ("query", "key", "value", "out", "up", "down")


def test_bfloat16_compute_keeps_float32_where_it_matters(weights):
    model = swap(small_lm(dtype="bfloat16", tied=False), Fused, Unfused)
    dtypes = {}

    def watch(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if isinstance(out, jax.Array):
            dtypes.setdefault(type(context.module), set()).add(out.dtype.name)
        return out

    with nn.intercept_methods(watch):
        _, variables = jax.eval_shape(lambda: model.init_with_output(KEY, TOKENS))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}
    assert dtypes[Softmax] == dtypes[Scores] == {"float32"}
    assert dtypes[Mix] == {"bfloat16"}
    assert dtypes[Einsum] == {"bfloat16", "float32"}  # float32: the head's logits
    norms = [kinds for module, kinds in dtypes.items() if issubclass(module, Norm)]
    assert norms == [{"bfloat16"}]  # what is inside is tested with the norm itself
    variables = weights(model.init, TOKENS)
    logits = jax.jit(model.apply)(variables, TOKENS)
    exact = jax.jit(small_lm(tied=False).apply)(variables, TOKENS)
    assert logits.dtype == jnp.float32
    # Two layers of roundings of 2^-9 each on logits of order 1.
    np.testing.assert_allclose(logits, exact, atol=0.06)


def test_padding_changes_nothing(weights):
    classifier = token_classifier(SMALL, vocabulary=13, length=12, classes=3)
    params = weights(classifier.init, TOKENS)["params"]
    run = jax.jit(
        lambda tokens, valid: classifier.apply({"params": params}, tokens, valid_BxL=valid)
    )
    alone = run(TOKENS, jnp.ones((2, 9), bool))
    padded = jnp.pad(TOKENS, ((0, 0), (0, 3)), constant_values=5)
    valid = jnp.arange(12) < jnp.full((2, 1), 9)
    np.testing.assert_allclose(run(padded, valid), alone, atol=1e-5)
    assert float(abs(run(padded, jnp.ones((2, 12), bool)) - alone).max()) > 1e-3


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_vit_sees_every_patch_and_its_pool(pool, weights):
    model = vit(SMALL, image_size=8, patch=4, classes=3, pool=pool)
    image = jax.random.normal(KEY, (2, 8, 8, 1))
    params = weights(model.init, image)["params"]
    table = params["encoder"]["position"]["table"]
    assert table.shape == ((5, 16) if pool == "token" else (4, 16))

    @jax.jit
    def run(image):
        logits = model.apply({"params": params}, image)
        return logits.sum(), logits

    gradient, logits = jax.grad(run, has_aux=True)(image)
    assert logits.shape == (2, 3)
    assert (abs(gradient).max(axis=(0, 3)) > 0).all()


def test_feature_classifier_reads_vectors():
    model = feature_classifier(SMALL, length=5, classes=2)
    logits, variables = jax.eval_shape(lambda: model.init_with_output(KEY, jnp.ones((3, 5, 7))))
    assert logits.shape == (3, 2)
    assert variables["params"]["encoder"]["embed"]["kernel"].shape == (7, 16)


class Average(nn.Module):
    """A mixer without a decode state."""

    gain: float = 1.0

    @nn.compact
    def __call__(self, x, kv=None, *, mask, positions=None, train=False, decode=False):
        if decode:
            raise DecodeUnsupported(self)
        return self.gain * x.mean(1, keepdims=True) + 0 * x


def test_any_mixer_fits_and_says_what_it_cannot():
    model = small_lm(mixer=Make(Average, gain=2.0))
    assert jax.eval_shape(lambda: model.init_with_output(KEY, TOKENS))[0].shape == (2, 9, 13)
    with pytest.raises(DecodeUnsupported, match="Average cannot decode step by step"):
        linen.start_cache(model, 1, 4)
    with pytest.raises(ConfigError, match=r"model\.position='rope': .* which Average replaces"):
        small_lm(mixer=Make(Average), position="rope")


def test_drop_path_grows_with_depth_and_needs_a_key_only_in_training(weights):
    model = small_lm(depth=3, drop_path=0.4, dropout=0.1)
    rates = [dict(dict(b.arguments)["residual"].arguments)["drop_path"] for b in _blocks(model)]
    np.testing.assert_allclose(rates, [0.0, 0.2, 0.4])
    params = weights(model.init, TOKENS)["params"]

    @partial(jax.jit, static_argnums=1)
    def run(key, train):
        return model.apply({"params": params}, TOKENS, train=train, rngs={"dropout": key})

    first, second = run(KEY, True), run(jax.random.key(5), True)
    assert float(abs(first - second).max()) > 1e-3
    np.testing.assert_array_equal(run(KEY, True), first)
    np.testing.assert_array_equal(run(KEY, False), run(jax.random.key(5), False))


def _blocks(model):
    return dict(model.stack.arguments)["blocks"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "model.heads=3: must divide the width 16 (allowed: 1, 2, 4, 8, 16)"),
        ({"kv_heads": 3}, "model.kv_heads=3: must divide the 4 heads"),
        ({"depth": 0}, "model.depth=0: must be at least 1"),
        ({"mlp": "mish"}, "model.mlp='mish': must be one of gelu, gelu_tanh, relu, silu, swiglu"),
        ({"position": "ropes"}, "model.position='ropes': must be one of learned, sinusoidal, none"),
        ({"heads": 16, "position": "rope"}, "model.heads=16: gives a head size of 1"),
        ({"dropout": 1.0}, "model.dropout=1.0: must be in [0, 1)"),
        ({"scan": True, "drop_path": 0.1}, "model.scan=True: scanned blocks are alike"),
        ({"remat": "dot"}, "model.remat='dot': must be one of none, dots, weight_dots"),
        ({"dtype": "bf16"}, "model.dtype='bf16': must be one of float32, bfloat16"),
    ],
)
def test_a_wrong_choice_is_named_with_what_is_allowed(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        dataclasses.replace(SMALL, **changes)


def test_vit_names_its_own_choices():
    with pytest.raises(ConfigError, match=r"model\.patch=3: must divide model\.image_size=8"):
        vit(SMALL, image_size=8, patch=3, classes=2)
    with pytest.raises(ConfigError, match=r"model\.pool='max': must be one of token, mean"):
        vit(SMALL, image_size=8, patch=4, classes=2, pool="max")


def test_equal_configs_make_equal_models():
    assert small_lm(position="rope") == small_lm(position="rope")
    assert hash(small_lm()) == hash(small_lm())
    assert small_lm() != small_lm(position="rope")
