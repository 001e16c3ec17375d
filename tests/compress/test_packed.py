"""Packed leaves: what they unpack to, how many bytes they take, and that they travel as arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxformer import paths
from jaxformer.compress.observers import min_max, symmetric_max
from jaxformer.compress.packed import Codes, Packed, nbytes, unpacked
from jaxformer.compress.quantizers import Symmetric, Uniform
from jaxformer.errors import ConfigError
from jaxformer.recipe import TrainState
from jaxformer.train.checkpoint import Checkpoints

SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), SHAPES, st.integers(0, 2**32 - 1))
def test_codes_come_back_and_lie_without_gaps(bits, shape, seed):
    u = np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)
    codes = Codes.of(jnp.asarray(u), bits)
    np.testing.assert_array_equal(codes.unpack(), u)
    assert codes.data.dtype == jnp.uint8 and codes.data.size == -(-u.size * bits // 8)


def test_two_codes_of_four_bits_are_a_byte_the_lower_first():
    assert Codes.of(jnp.array([0x3, 0xA, 0x7]), 4).data.tolist() == [0xA3, 0x07]
    assert Codes.of(jnp.array([1, 0, 0, 1, 0, 0, 0, 0, 1]), 1).data.tolist() == [0b1001, 1]


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 8), arrays.array_shapes(min_dims=2, max_dims=3, max_side=9), st.booleans())
def test_unpacking_is_the_quantiser_to_the_bit(bits, shape, symmetric):
    x = jnp.asarray(np.random.default_rng(bits).normal(size=shape), jnp.float32)
    quantizer, observe = (Symmetric, symmetric_max) if symmetric else (Uniform, min_max)
    # Scales are of half the range, so that the outer codes are clipped ones.
    state = observe(bits, 0.5 * x, (0,))
    packed = Packed.of(x, quantizer(bits), **state)
    expected = np.asarray(quantizer(bits)(x, **state))
    np.testing.assert_array_equal(np.asarray(packed.unpack()), expected)
    np.testing.assert_array_equal(np.asarray(jax.jit(lambda p: p.unpack())(packed)), expected)


def test_packed_leaves_are_trees_of_named_arrays():
    x = jnp.linspace(-1, 1, 24).reshape(4, 6)
    packed = Packed.of(x, Uniform(4), **min_max(4, x, (0,)))
    tree = {"kernel": packed, "bias": jnp.ones(6)}
    names = ["bias", "kernel/codes/data", "kernel/scale", "kernel/zero"]
    assert list(paths.leaves(tree)) == names
    assert nbytes(tree) == 6 * 4 + 12 + 2 * 6 * 4
    found = unpacked(tree)
    assert found["kernel"].shape == x.shape and found["bias"] is tree["bias"]
    abstract = jax.eval_shape(lambda x: Packed.of(x, Uniform(4), **min_max(4, x, (0,))), x)
    assert jax.tree.structure(abstract) == jax.tree.structure(packed)


def test_codes_have_from_one_to_eight_bits():
    with pytest.raises(ConfigError, match=r"Codes.bits=9: must be from 1 to 8"):
        Codes.of(jnp.zeros(3), 9)


def test_a_saved_leaf_takes_its_claimed_size_on_disk(tmp_path):
    x = jax.random.normal(jax.random.key(0), (1024, 512))
    # Scaled so that all codes are as likely, for what is stored is compressed as well.
    x = jax.scipy.stats.norm.cdf(x)
    params = {"kernel": Packed.of(x, Uniform(4), **min_max(4, x, (0,)))}
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, params, {}, {}, jax.random.key(0))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, {})
    files = (tmp_path / "checkpoints").rglob("*")
    size = sum(file.stat().st_size for file in files if file.is_file())
    assert nbytes(params) == 1024 * 512 // 2 + 2 * 512 * 4
    assert size == pytest.approx(nbytes(params), rel=0.05)
    with Checkpoints(tmp_path) as checkpoints:
        kernel = checkpoints.restore(0, state).params["kernel"]
    np.testing.assert_array_equal(kernel.unpack(), params["kernel"].unpack())
