"""Attention: two cores, one function; masks, positions, caches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import Causal, Full, KeyPadding, Window
from jaxformer.nn.attention import Attention, Softmax, Unfused
from jaxformer.nn.make import Make
from jaxformer.nn.position import ALiBi, RoPE

KEY = jax.random.key(0)
X, KV = jax.random.normal(KEY, (2, 9, 16)), jax.random.normal(jax.random.key(1), (2, 5, 16))
VALID = jnp.arange(9) < jnp.asarray([[9], [6]])
AT = jnp.asarray([[3, 1, 4, 15, 9, 2, 6, 5, 35], [0, 1, 2, 3, 4, 5, 6, 7, 8]])

CASES = {
    "grouped rope": (Attention(4, kv_heads=2, position=Make(RoPE)), {"mask": Causal()}),
    "alibi window": (
        Attention(4, head_size=3, position=Make(ALiBi)),
        {"mask": Window(3, 3) & KeyPadding(VALID)},
    ),
    "alibi positions": (Attention(4, position=Make(ALiBi)), {"mask": Full(), "positions": AT}),
    "values apart": (
        Attention(4, kv_heads=2, head_size=6, value_size=5, scale=0.3, position=Make(RoPE)),
        {"mask": Causal()},
    ),
    "cross": (Attention(4, kv_heads=1), {"mask": Full(), "kv_BxSxD": KV}),
    "dropout": (Attention(4, dropout=0.4), {"mask": Causal(), "train": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_fused_equals_unfused_in_values_and_gradients(case, weights):
    module, options = CASES[case]
    opened = module.clone(core=Make(Unfused))
    variables = weights(module.init, X, **options)

    @jax.jit
    def both(variables, x):
        def run(attention, variables, x):
            y = attention.apply(variables, x, rngs={"dropout": jax.random.key(2)}, **options)
            return jnp.sum(jnp.sin(y)), y

        grad = jax.grad(run, argnums=(1, 2), has_aux=True)
        return grad(module, variables, x), grad(opened, variables, x)

    fused, unfused = both(variables, X)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), fused, unfused
    )


@pytest.mark.parametrize("sizes", [{}, {"head_size": 8, "value_size": 3}])
def test_attention_is_the_formula(weights, sizes):
    module = Attention(2, kv_heads=1, use_bias=False, **sizes)
    variables = weights(module.init, X, mask=Causal())
    y = jax.jit(lambda: module.apply(variables, X, mask=Causal()))()
    p = {name: np.float64(leaf["kernel"]) for name, leaf in variables["params"].items()}
    q, k, v = (np.einsum("bld,dhk->bhlk", X, p[name]) for name in ("query", "key", "value"))
    s = np.einsum("bhlk,bgsk->bhls", q, k) / np.sqrt(8)
    s = np.where(np.tril(np.ones((9, 9), bool)), s, -np.inf)
    w = np.exp(s - s.max(-1, keepdims=True))
    o = np.einsum("bhls,bgsk->blhk", w / w.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(y, np.einsum("blhk,hkd->bld", o, p["out"]), atol=1e-5)


def test_positions_shift_nothing_but_the_distance(weights):
    module = Attention(4, position=Make(RoPE))
    variables = weights(module.init, X, mask=Causal())

    @jax.jit
    def run(at):
        return module.apply(variables, X, mask=Causal(), positions=at)

    shifted = run(jnp.arange(9) + 7)
    np.testing.assert_allclose(run(None), shifted, atol=2e-5)
    assert float(abs(run(2 * jnp.arange(9)) - shifted).max()) > 1e-3


def test_softmax_is_float32_and_zero_where_nothing_is_visible():
    visible = jnp.asarray([[True, False, True], [False, False, False]])
    weights = Softmax().apply({}, jnp.asarray([[1.0, 9.0, 1.0]] * 2, jnp.bfloat16), visible)
    assert weights.dtype == jnp.float32
    np.testing.assert_array_equal(weights, [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]])
    gradient = jax.grad(lambda s: jnp.square(Softmax().apply({}, s, visible)).sum())(
        jnp.asarray([[0.0, 1.0, 2.0]] * 2)
    )
    assert jnp.isfinite(gradient).all() and (gradient[~visible] == 0).all()
    assert float(gradient[0, 2]) > 0


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Attention(5), r"model\.heads=5: must divide the width 16 \(allowed: 1, 2, 4, 8, 16\)"),
        (
            Attention(4, kv_heads=3),
            r"model\.kv_heads=3: must divide the 4 heads \(allowed: 1, 2, 4",
        ),
        (Attention(16, position=Make(RoPE)), r"model\.head_size=1: RoPE needs an even head size"),
    ],
)
def test_attention_names_what_does_not_fit(module, message):
    with pytest.raises(ConfigError, match=message):
        module.init(KEY, X, mask=Causal())


def test_decoding_without_a_cache_or_with_positions_is_refused(weights):
    module = Attention(4, name="mixer")
    params = weights(module.init, X, mask=Causal())
    with pytest.raises(ConfigError, match=r"decode=True without a cache; start one with"):
        module.apply(params, X, mask=Causal(), decode=True, mutable=["cache"])
    with pytest.raises(ValueError, match="positions: decode=True counts them itself"):
        module.init(KEY, X, mask=Causal(), decode=True, positions=AT)


def test_every_sequence_has_its_own_write_index(weights):
    module = Attention(4, kv_heads=2, position=Make(RoPE))
    variables = weights(module.init, X, mask=Causal())
    whole = jax.jit(lambda: module.apply(variables, X, mask=Causal()))()
    empty = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(lambda: module.init(KEY, X, mask=Causal(), decode=True))["cache"],
    )

    @jax.jit
    def read(cache, x):
        variables_now = {**variables, "cache": cache}
        y, new = module.apply(variables_now, x, mask=Causal(), decode=True, mutable=["cache"])
        return y, new["cache"]

    _, after_2 = read(empty, X[:, :2])
    _, after_4 = read(after_2, X[:, 2:4])
    mixed = jax.tree.map(lambda a, b: jnp.stack([a[0], b[1]]), after_2, after_4)
    y, cache = read(mixed, jnp.stack([X[0, 2:4], X[1, 4:6]]))
    np.testing.assert_allclose(y, jnp.stack([whole[0, 2:4], whole[1, 4:6]]), atol=1e-5)
    np.testing.assert_array_equal(cache["index"], [4, 6])
