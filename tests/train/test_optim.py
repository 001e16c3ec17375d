"""Optimisers: groups that cover, Muon's axes, schedules, the schedule-free average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformer.config import base
from jaxformer.recipe import ConfigError
from jaxformer.train import optim

PARAMS = {
    "embed": {"table": jnp.ones((11, 6))},
    "block_0": {
        "attention": {
            "query": {"kernel": jnp.ones((6, 2, 3)), "bias": jnp.ones((2, 3))},
            "out": {"kernel": jnp.ones((2, 3, 6))},
        },
        "norm": {"scale": jnp.ones(6)},
    },
    "layers": {"mlp": {"up": {"kernel": jnp.ones((4, 6, 8))}}, "norm": {"scale": jnp.ones((4, 6))}},
    "other": {"kernel": jnp.ones((5, 7))},
}


def test_muon_takes_linear_maps_and_only_them():
    """Optax alone would give the 3-D kernels to Adam and the stacked scales to Muon."""
    found = optim.muon_dimensions()(PARAMS)
    attention = found["block_0"]["attention"]
    assert attention["query"]["kernel"] == optax.contrib.MuonDimensionNumbers((0,), (1, 2))
    assert attention["out"]["kernel"] == optax.contrib.MuonDimensionNumbers((0, 1), (2,))
    assert found["layers"]["mlp"]["up"]["kernel"] == optax.contrib.MuonDimensionNumbers((1,), (2,))
    assert found["other"]["kernel"] == optax.contrib.MuonDimensionNumbers(0, 1)
    assert attention["query"]["bias"] is None and found["layers"]["norm"]["scale"] is None
    assert found["embed"]["table"] is None


def test_muon_steps_are_orthogonal():
    tx = optim.muon()(1.0, 0.0)
    key = jax.random.key(0)
    params = {"up": {"kernel": jnp.zeros((3, 6, 8))}}
    grads = {"up": {"kernel": jax.random.normal(key, (3, 6, 8))}}
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    singular = np.linalg.svd(np.asarray(updates["up"]["kernel"]), compute_uv=False)
    # Newton-Schulz brings singular values near a common size, here 0.2 sqrt(max(6, 8)).
    assert np.all(np.abs(singular / (0.2 * np.sqrt(8)) - 1) < 0.4)


def test_lamb_steps_are_at_most_as_large_as_a_leaf():
    params = {"a": {"kernel": jnp.array([[3.0, 4.0]])}, "b": {"kernel": jnp.array([[30.0, 40.0]])}}
    params["zero"] = {"kernel": jnp.zeros((1, 2))}
    grads = jax.tree.map(jnp.ones_like, params)
    transform = optim.lamb()(0.1, 0.0)
    updates, _ = transform.update(grads, transform.init(params), params)
    # Adam's first step is 1 for each weight, of norm sqrt(2): less than 5, and than 50.
    for name in params:
        np.testing.assert_allclose(updates[name]["kernel"], -0.1 * np.ones((1, 2)), rtol=1e-4)
    small = jax.tree.map(lambda x: x / 50, params)
    updates, _ = transform.update(grads, transform.init(small), small)
    np.testing.assert_allclose(jnp.linalg.norm(updates["a"]["kernel"]), 0.1 * 0.1, rtol=1e-4)
    np.testing.assert_allclose(jnp.linalg.norm(updates["b"]["kernel"]), 0.1 * 1.0, rtol=1e-4)


def test_groups_must_cover_every_parameter_once():
    rate = optim.schedule(0.1, 10, kind="constant")

    def init(*patterns):
        groups = [optim.Group(p) for p in patterns]
        return optim.optimizer(optim.sgd(), rate, groups=groups).transform.init(PARAMS)

    init("embed", "^(?!embed)")
    with pytest.raises(ConfigError, match=r"'other/kernel' is in 0 groups"):
        init("embed", "block_0", "layers")
    with pytest.raises(ConfigError, match=r"is in 2 groups"):
        init("embed", "")


def test_groups_have_their_own_rate_and_can_be_frozen():
    groups = [
        optim.Group("embed", frozen=True),
        optim.Group("block_0", rate_scale=0.5),
        optim.Group("layers|other"),
    ]
    rate = optim.schedule(0.1, 10, kind="constant")
    tx = optim.optimizer(optim.sgd(), rate, groups=groups).transform
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert float(jnp.abs(updates["embed"]["table"]).max()) == 0
    np.testing.assert_allclose(updates["block_0"]["norm"]["scale"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["other"]["kernel"], -0.1, rtol=1e-6)


def test_groups_are_clipped_each_by_itself():
    rate = optim.schedule(1.0, 10, kind="constant")
    groups = [optim.Group("embed", clip=0.5), optim.Group("^(?!embed)", clip=2.0)]
    tx = optim.optimizer(optim.sgd(), rate, groups=groups).transform
    grads = jax.tree.map(lambda x: 10 * jnp.ones_like(x), PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    embed = updates.pop("embed")
    np.testing.assert_allclose(optax.tree.norm(embed), 0.5, rtol=1e-5)
    np.testing.assert_allclose(optax.tree.norm(updates), 2.0, rtol=1e-5)


def test_weight_decay_spares_biases_and_scales():
    decays = optim.decays(PARAMS)
    assert decays["embed"]["table"] and decays["other"]["kernel"]
    assert not decays["layers"]["norm"]["scale"]
    assert not decays["block_0"]["attention"]["query"]["bias"]


def test_schedules():
    cosine = optim.schedule(1.0, 100, warmup=10, final=0.1)
    values = [float(cosine(k)) for k in (0, 10, 55, 100)]
    np.testing.assert_allclose(values, [1 / 11, 1.0, 0.55, 0.1], rtol=1e-5)
    rsqrt = optim.schedule(1.0, 0, kind="rsqrt", warmup=10)
    np.testing.assert_allclose([float(rsqrt(9)), float(rsqrt(39))], [1.0, 0.5], rtol=1e-6)
    linear = optim.schedule(1.0, 10, kind="linear")
    np.testing.assert_allclose([float(linear(0)), float(linear(5))], [1.0, 0.5], rtol=1e-6)
    with pytest.raises(ConfigError, match=r"optim.schedule: 'cosin' .*constant, cosine, linear"):
        optim.schedule(1.0, 10, kind="cosin")


def test_schedule_free_average_solves_a_noisy_problem():
    """Its average is nearer the minimum than the point it steps at."""
    built = optim.optimizer(optim.schedule_free(), optim.schedule(0.1, 0, kind="constant"))
    params = {"w": jnp.full((8,), 5.0)}
    state = built.transform.init(params)

    @jax.jit
    def step(params, state, key):
        grads = {"w": params["w"] + jax.random.normal(key, (8,))}
        updates, state = built.transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for k in range(400):
        params, state = step(params, state, jax.random.fold_in(jax.random.key(0), k))
    average = built.averaged(state, params)
    assert float(jnp.abs(average["w"]).mean()) < float(jnp.abs(params["w"]).mean()) < 1.0


def test_build_reads_a_config():
    config = base("x").optim
    for name in optim.FACTORIES:
        config.name = name
        built = optim.build(config, 10)
        tx = built.transform
        grads = jax.tree.map(jnp.ones_like, PARAMS)
        updates, _ = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)
        assert all(np.all(np.isfinite(u)) and np.any(u) for u in jax.tree.leaves(updates)), name
    config.name = "adamm"
    with pytest.raises(ConfigError, match=r"optim.name: 'adamm' is unknown; allowed: adamw"):
        optim.build(config, 10)
