"""ReLU attention: causality, homogeneity, and linear attention where nothing is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import Causal, Full, KeyPadding, Window
from jaxformer.nn.relu_attention import ReLUAttention

B, L, D = 2, 9, 6
X = jax.random.normal(jax.random.key(0), (B, L, D))
LAYER = ReLUAttention(heads=2)
PARAMS = LAYER.init(jax.random.key(1), X, mask=Causal())["params"]


def run(x=X, params=PARAMS, mask=Causal(), **options):  # noqa: B008
    return LAYER.apply({"params": params}, x, mask=mask, **options)


def scaled(name, factor):
    return {**PARAMS, name: {"kernel": factor * PARAMS[name]["kernel"]}}


def test_a_row_sees_itself_and_what_is_before():
    for i in range(L):
        changed = X.at[:, i + 1 :].set(7.0)
        np.testing.assert_allclose(run(changed)[:, : i + 1], run()[:, : i + 1], atol=1e-5)
        assert np.abs(run(X.at[:, i].add(1.0)) - run())[:, i].max() > 1e-3


def test_scores_are_homogeneous():
    np.testing.assert_allclose(run(params=scaled("query", 3.0)), 3 * run(), rtol=1e-4, atol=1e-4)


def test_equals_the_sum_of_the_definition():
    q, k, v = (
        np.einsum("bld,dhk->bhlk", X, PARAMS[n]["kernel"]) for n in ("query", "key", "value")
    )
    wanted = np.zeros((B, L, D))
    for i in range(L):
        for j in range(i + 1):
            score = np.maximum(np.einsum("bhk,bhk->bh", q[:, :, i], k[:, :, j]), 0)
            wanted[:, i] += np.einsum("bh,bhk->bk", score, v[:, :, j]) / (i + 1)
    np.testing.assert_allclose(run(), wanted, atol=1e-4)


def test_where_nothing_is_cut_it_is_linear_attention():
    positive = jax.tree.map(jnp.abs, PARAMS)
    x = jnp.abs(X)
    q, k, v = (
        jnp.einsum("bld,dhk->blhk", x, positive[n]["kernel"]) for n in ("query", "key", "value")
    )
    states = jnp.cumsum(jnp.einsum("blhk,blhe->blhke", k, v), axis=1)
    wanted = jnp.einsum("blhk,blhke->ble", q, states) / jnp.arange(1, L + 1)[:, None]
    np.testing.assert_allclose(run(x, positive), wanted, rtol=1e-4)


def test_without_an_order_it_divides_by_all_that_are_valid():
    valid = jnp.arange(L)[None] < jnp.array([[5], [L]])
    padded = run(mask=KeyPadding(valid))
    np.testing.assert_allclose(padded[0, :5], run(X[:1, :5], mask=Full())[0], atol=1e-5)
    np.testing.assert_allclose(padded[1], run(X[1:], mask=Full())[0], atol=1e-5)


def test_other_masks_and_decoding_are_refused():
    with pytest.raises(ConfigError, match="Window"):
        run(mask=Window(left=2, right=0))
    with pytest.raises(ConfigError, match="decode"):
        run(decode=True)
