"""The adapters of cuDNN and Splash: what they refuse, what they are chosen for, Splash's values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxformer.kernels.attention import (
    AttentionUnsupported,
    Causal,
    Full,
    KeyPadding,
    Prefix,
    ScoreMod,
    Segments,
    Window,
    api,
    attention,
    choice,
    cudnn,
    plan,
    splash,
)
from jaxformer.kernels.target import target

KINDS = {"gpu": "NVIDIA H200", "tpu": "TPU v5 lite", "cpu": "cpu"}


def on(platform):
    """As if the program were traced for a device of this platform."""
    device = AbstractDevice(KINDS[platform], None, platform)
    mesh = AbstractMesh((1,), ("data",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def shape(b=2, l=1024, h=4, k=64, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((b, l, h, k), dtype)


def softcap(s, idx, aux) -> ScoreMod:
    return 30 * jnp.tanh(s / 30)


def test_the_target_is_that_of_the_mesh():
    assert target().platform == "cpu"
    with on("gpu"):
        assert target().hopper
    with on("tpu"):
        assert target() == ("tpu", "TPU v5 lite") and not target().hopper


@pytest.mark.parametrize(
    "platform, call, expected",
    [
        ("gpu", dict(), "cudnn"),
        ("gpu", dict(mask=Causal()), "cudnn"),
        ("gpu", dict(mask=Window(100, 0)), "cudnn"),
        ("gpu", dict(mask=Causal() & KeyPadding(jnp.array([5, 9]))), "cudnn"),
        ("tpu", dict(), "splash"),
        ("tpu", dict(mask=Window(100, 100)), "splash"),
        ("tpu", dict(mask=Causal() & KeyPadding(jnp.array([5, 9]))), "splash"),
        ("cpu", dict(), "chunked"),
    ],
)
def test_plain_calls_go_to_the_library(platform, call, expected):
    with on(platform):
        assert plan(shape(), shape(), shape(), **call).impl == expected


@pytest.mark.parametrize(
    "platform, expected, tiles",
    [("gpu", "mosaic_gpu", (128, 128)), ("tpu", "mosaic_tpu", (512, 512))],
)
def test_the_rest_goes_to_our_kernels(platform, expected, tiles):
    q = shape()
    with on(platform):
        found = plan(q, q, q, mask=Causal(), score_mod=softcap)
        assert (found.impl, found.tiles) == (expected, tiles)
        assert "score_mod" in found.why  # what the library's kernel could not
        assert found.flops == pytest.approx(4 * 2 * 4 * 1024 * 1024 * 64 / 2, rel=0.01)
    before_hopper = AbstractDevice("NVIDIA A100-SXM4-80GB", None, "gpu")
    mesh = AbstractMesh((1,), ("data",), abstract_device=before_hopper)
    with jax.sharding.use_abstract_mesh(mesh):
        assert plan(q, q, q, score_mod=softcap).impl == "triton"


@pytest.mark.parametrize(
    "call, arrays, feature",
    [
        (dict(score_mod=softcap), {}, "score_mod"),
        (dict(return_lse=True), {}, "return_lse"),
        (dict(dropout=(0.1, jax.random.key(0))), {}, "dropout"),
        (dict(sink=jnp.zeros(4)), {}, "a sink"),
        (dict(head_map=(3, 1, 2, 0)), {}, "head_map"),
        (dict(q_pos=jnp.arange(1024)), {}, "q_pos"),
        (dict(mask=Prefix(jnp.array([3]))), {}, "mask Prefix"),
        (dict(mask=Segments(jnp.zeros((2, 1024), int), jnp.zeros((2, 1024), int))), {}, "Segments"),
        (dict(), dict(dtype=jnp.float16), None),
        (dict(), dict(k=320), None),
        (dict(), dict(l=1), None),
    ],
)
def test_what_is_not_plain_is_refused_by_name(call, arrays, feature):
    q = shape(**arrays)
    refusals = 0
    for platform, impl in (("gpu", "cudnn"), ("tpu", "splash")):
        with on(platform):
            chosen = plan(q, q, q, **call)
            try:
                asked = plan(q, q, q, impl=impl, **call).impl
            except AttentionUnsupported as error:
                refusals += 1
                assert chosen.impl != impl and impl not in error.who_can
                assert feature is None or feature in error.feature
            else:
                assert asked == impl
    assert refusals == 2 if feature else refusals == 1


@pytest.mark.parametrize("impl", ["cudnn", "splash"])
def test_a_library_kernel_needs_its_hardware(impl):
    q = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(AttentionUnsupported, match=f"impl='{impl}' does not support cpu"):
        attention(q, q, q, impl=impl)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mask, l, s",
    [
        (Full(), 130, 100),
        (Causal(), 140, 140),
        (Window(20, 5), 128, 150),
        (Causal(2) & KeyPadding(jnp.array([70, 0])), 100, 100),
    ],
)
def test_splash_computes_the_same(mask, l, s):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal(n), jnp.float32)
        for n in ((2, l, 4, 64), (2, s, 2, 64), (2, s, 2, 64))
    )
    request = api._request(q, k, v, mask=mask)

    def output(run):
        def scalar(q, k, v):
            o, _ = run(api._request(q, k, v, mask=mask))
            return jnp.square(o).sum(), o

        return jax.value_and_grad(scalar, (0, 1, 2), has_aux=True)(q, k, v)

    found = output(lambda r: splash.splash(r, interpret=True))
    expected = output(choice.xla)
    assert request.sizes.l == l
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)  # exp and sums in another order


def test_cudnn_gets_the_mask_in_its_own_words():
    def words(mask, l=64):
        q = shape(l=l)
        return cudnn._mask(api._request(q, shape(l=64), shape(l=64), mask=mask))

    assert words(Full()) == {}
    assert words(Causal()) == {"is_causal": True}
    assert words(Window(7, 0)) == {"is_causal": True, "local_window_size": (7, 0)}
    assert words(Causal(1)) is None and words(Window(7, 1)) is None
    assert words(Causal(), l=32) is None  # where cuDNN puts the diagonal is not documented
    lengths = words(KeyPadding(jnp.array([0, 9])))["key_value_seq_lengths"]
    assert lengths.tolist() == [1, 9]
    assert words(KeyPadding(jnp.ones((2, 64), bool))) is None
