"""The parts by themselves: what they compute, in which precision, and what they refuse."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.errors import ConfigError
from jaxformer.nn.activation import GELU, RELU, Activation
from jaxformer.nn.dropout import Dropout
from jaxformer.nn.einsum import Einsum
from jaxformer.nn.embed import Embed
from jaxformer.nn.heads import MeanPool
from jaxformer.nn.make import Make, swap
from jaxformer.nn.mlp import MLP, GatedMLP
from jaxformer.nn.norm import LayerNorm, RMSNorm
from jaxformer.nn.patch import PatchEmbed, join_patches, split_patches
from jaxformer.nn.position import LearnedPosition, RoPE, SinusoidalPosition, alibi_slopes

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("equation", "features", "x_shape", "kernel", "bias"),
    [
        ("...D,DHK->...HK", (3, 5), (2, 4, 6), (6, 3, 5), (3, 5)),
        ("...HK,HKD->...D", (7,), (2, 4, 3, 5), (3, 5, 7), (7,)),
        ("BLHK,HKJ->BHLJ", (2,), (2, 4, 3, 5), (3, 5, 2), (3, 2)),
        ("...D,CD->...C", (4,), (6,), (4, 6), (4,)),
    ],
)
def test_einsum_reads_its_shapes_from_the_equation(equation, features, x_shape, kernel, bias):
    x = jax.random.normal(KEY, x_shape)
    einsum = Einsum(equation, features, bias_init=jax.nn.initializers.normal(1.0))
    y, variables = einsum.init_with_output(KEY, x)
    params = variables["params"]
    assert params["kernel"].shape == kernel
    assert params["bias"].shape == bias
    expected = np.einsum(equation, x, params["kernel"])
    aligned = {"BLHK,HKJ->BHLJ": (3, 1, 2)}.get(equation, bias)
    np.testing.assert_allclose(y, expected + params["bias"].reshape(aligned), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("equation", "features", "x_shape"),
    [
        ("...D,DHK->...HK", (3, 5), (2, 4, 6)),
        ("...HK,HKD->...D", (7,), (2, 4, 3, 5)),
        ("...D,DF->...F", (7,), (6,)),
        ("...D,DF->...F", (7,), (0, 4, 6)),
    ],
)
def test_einsum_as_a_product_of_matrices_has_the_gradients_of_the_einsum(
    equation, features, x_shape
):
    x = jax.random.normal(KEY, x_shape)
    einsum = Einsum(equation, features, use_bias=False)
    kernel = einsum.init(KEY, x)["params"]["kernel"]

    def ours(kernel, x):
        return jnp.sum(einsum.apply({"params": {"kernel": kernel}}, x) ** 2)

    def spelt(kernel, x):
        return jnp.sum(jnp.einsum(equation, x, kernel) ** 2)

    found, expected = (jax.grad(f, argnums=(0, 1))(kernel, x) for f in (ours, spelt))
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("equation", "x_shape", "features", "fan_in"),
    [
        ("...D,DHK->...HK", (512,), (16, 16), 512),
        ("...HK,HKD->...D", (8, 64), (256,), 512),
        ("...HK,HKJ->...HJ", (16, 64), (64,), 64),  # H separate maps of K to J
    ],
)
def test_einsum_kernel_has_the_variance_of_its_fan_in(equation, x_shape, features, fan_in):
    variables = Einsum(equation, features).init(KEY, jnp.zeros(x_shape))
    kernel = np.asarray(variables["params"]["kernel"])
    # 65,536 or more draws: the standard deviation is known to 0.3%.
    assert kernel.std() == pytest.approx(fan_in**-0.5, rel=0.02)


def test_einsum_computes_in_the_dtype_of_its_input_and_keeps_float32_parameters():
    x = jax.random.normal(KEY, (3, 8), jnp.bfloat16)
    y, variables = Einsum("...D,DF->...F", (4,)).init_with_output(KEY, x)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    wide = Einsum("...D,DF->...F", (4,), out_dtype=jnp.float32).apply(variables, x)
    assert wide.dtype == jnp.float32
    assert (
        Einsum("...D,DF->...F", (4,)).apply(variables, jnp.ones((1, 8), int)).dtype == jnp.float32
    )


@pytest.mark.parametrize("equation", ["BLD,DF", "...D,DF->F", "...D->...D", "D,D,D->D"])
def test_einsum_refuses_an_equation_it_cannot_read(equation):
    with pytest.raises(ValueError, match=r"Einsum\.equation="):
        Einsum(equation, (4,)).init(KEY, jnp.zeros((2, 3, 8)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_compute_in_float32(dtype):
    x = (jax.random.normal(KEY, (5, 64)) * 3 + 100).astype(dtype)
    exact = np.asarray(x, np.float64)
    layer = LayerNorm().init_with_output(KEY, x)[0]
    rms = RMSNorm().init_with_output(KEY, x)[0]
    assert layer.dtype == rms.dtype == jnp.dtype(dtype)
    centred = exact - exact.mean(-1, keepdims=True)
    expected_layer = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    expected_rms = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    # One rounding to the output dtype (2^-9 relative for bfloat16); sums in bfloat16 would be off
    # by whole units at a mean of 100.
    rtol = {"float32": 1e-4, "bfloat16": 2**-8}[dtype]
    np.testing.assert_allclose(np.asarray(layer, np.float64), expected_layer, rtol=rtol, atol=1e-4)
    np.testing.assert_allclose(np.asarray(rms, np.float64), expected_rms, rtol=rtol, atol=1e-4)


def test_activation_names_the_functions_it_has():
    x = jnp.linspace(-3, 3, 7)
    np.testing.assert_array_equal(RELU().apply({}, x), np.maximum(x, 0))
    exact, tanh = (Activation(f).apply({}, x) for f in ("gelu", "gelu_tanh"))
    assert 0 < float(abs(exact - tanh).max()) < 1e-3
    with pytest.raises(ConfigError, match=r"Activation\.function='swish': must be one of gelu, "):
        Activation("swish")


def test_dropout_keeps_the_mean_and_shares_axes():
    x = jnp.ones((64, 16, 16))

    def run(module, train):
        return module.apply({}, x, train=train, rngs={"dropout": KEY})

    dropped = run(Dropout(0.25), True)
    # 16,384 draws: the mean of kept / 0.75 has a standard deviation of 0.0045.
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.02)
    np.testing.assert_allclose(np.unique(dropped), [0.0, 1 / 0.75], rtol=1e-6)
    np.testing.assert_array_equal(run(Dropout(0.25), False), x)
    rows = run(Dropout(0.5, shared=(1, 2)), True)
    assert (rows == rows[:, :1, :1]).all()
    assert 0 < (rows[:, 0, 0] == 0).sum() < 64


def test_embed_shows_a_token_outside_the_vocabulary():
    embed = Embed(vocabulary=5, width=4)
    variables = embed.init(KEY, jnp.zeros((1, 2), int))
    assert jnp.isnan(embed.apply(variables, jnp.asarray([[5]]))).all()
    logits = embed.apply(variables, jnp.ones((1, 4), jnp.bfloat16), method="attend")
    assert logits.shape == (1, 5) and logits.dtype == jnp.float32


def test_mlps_are_their_formulas():
    x = jax.random.normal(KEY, (2, 3, 4))
    for module in (MLP(8, RELU), GatedMLP(8, RELU)):
        y, variables = module.init_with_output(KEY, x)
        p = jax.tree.map(np.asarray, variables["params"])
        if isinstance(module, MLP):
            hidden = np.maximum(x @ p["up"]["kernel"], 0)
        else:
            hidden = np.maximum(x @ p["gate"]["kernel"], 0) * (x @ p["up"]["kernel"])
        np.testing.assert_allclose(y, hidden @ p["down"]["kernel"], rtol=1e-4, atol=1e-5)


def test_rope_scores_depend_on_the_distance_alone():
    q, k = jax.random.normal(KEY, (2, 1, 6, 2, 8))
    rope = RoPE().bind({})

    def score(at):
        return jnp.einsum("blhk,bshk->bhls", rope.rotate(q, at), rope.rotate(k, at))

    at = jnp.arange(6)
    np.testing.assert_allclose(score(at), score(at + 100), atol=2e-5)
    assert float(abs(score(at) - score(2 * at)).max()) > 0.1
    with pytest.raises(ConfigError, match=r"model\.head_size=3: RoPE needs an even"):
        rope.rotate(jnp.zeros((1, 2, 1, 3)), at)


def test_alibi_slopes_are_those_of_the_paper():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    expected = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    np.testing.assert_allclose(alibi_slopes(6), expected)


def test_stream_positions_add_rows_by_position():
    x = jnp.zeros((2, 3, 4))
    learned = LearnedPosition(length=8)
    variables = learned.init(KEY, x)
    at = jnp.asarray([[5, 0, 7], [1, 2, 3]])
    table = variables["params"]["table"]
    np.testing.assert_array_equal(learned.apply(variables, x, at), table[at])
    with pytest.raises(ConfigError, match=r"LearnedPosition\.length=8: shorter .* of 9"):
        learned.apply(variables, jnp.zeros((1, 9, 4)))
    code = SinusoidalPosition(base=100.0).apply({}, x, at)
    np.testing.assert_allclose(code[0, 0], np.r_[np.sin([5, 0.5]), np.cos([5, 0.5])], rtol=1e-6)


def test_patches_are_those_of_a_strided_convolution():
    image = jax.random.normal(KEY, (2, 6, 9, 2))
    np.testing.assert_array_equal(join_patches(split_patches(image, 3), rows=2), image)
    y, variables = PatchEmbed(patch=3, width=5).init_with_output(KEY, image)
    kernel = variables["params"]["projection"]["kernel"]
    layout = ("NHWC", "HWIO", "NHWC")
    conv = jax.lax.conv_general_dilated(image, kernel, (3, 3), "VALID", dimension_numbers=layout)
    np.testing.assert_allclose(y, conv.reshape(2, 6, 5), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"model\.patch=4: must divide the image, .* 6 x 9"):
        split_patches(image, 4)


def test_mean_pool_ignores_padding_even_nan():
    x = jnp.stack([jnp.arange(8.0).reshape(4, 2), jnp.full((4, 2), jnp.nan)])
    valid = jnp.asarray([[True, True, False, False], [False] * 4])
    np.testing.assert_array_equal(MeanPool().apply({}, x, valid), [[1.0, 2.0], [0.0, 0.0]])


def test_make_is_a_value():
    make = Make(MLP, hidden=8, activation=GELU)
    assert make == Make(MLP, activation=GELU, hidden=8)
    assert hash(make) == hash(Make(MLP, activation=GELU, hidden=8))
    assert make != Make(MLP, hidden=9, activation=GELU)
    assert make() == MLP(8, GELU)
    assert repr(Make(MLP, hidden=8)) == "MLP(hidden=8)"


@dataclasses.dataclass(frozen=True)
class _Holder:
    part: Make = Make(LayerNorm, epsilon=1e-3)
    parts: tuple[Make, ...] = ()


def test_swap_reaches_defaults_arguments_and_tuples():
    tree = (_Holder(parts=(Make(_Holder),)), Make(LayerNorm), 3)
    holder, norm, three = swap(tree, LayerNorm, RMSNorm)
    assert holder.part == Make(RMSNorm, epsilon=1e-3)
    assert holder.parts == (Make(_Holder, part=Make(RMSNorm, epsilon=1e-3)),)
    assert (norm, three) == (Make(RMSNorm), 3)
    assert swap(tree, MLP, RMSNorm) == tree
    assert swap(holder, RMSNorm, Make(MLP, hidden=8)).part == Make(MLP, hidden=8, epsilon=1e-3)
