"""Meshes and rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxformer.data.base import Arrays, Epoch
from jaxformer.parallel.mesh import AXES, abstract_mesh, make_mesh
from jaxformer.parallel.sharding import (
    PARAMETER_RULES,
    axes_of,
    batch_sharding,
    constrain,
    host_rows,
    place_batch,
    rule_report,
    spec_for,
)
from jaxformer.recipe import ConfigError
from jaxformer.train.states import abstract_states
from tests.train.problem import recipe

POD = abstract_mesh({"data": 2, "fsdp": 4, "tensor": 2})


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def spec(name, *shape):
    return spec_for(name, leaf(*shape), POD)


def test_rules_give_the_known_layouts():
    assert spec("block_0/attention/query/kernel", 64, 8, 16) == P("fsdp", "tensor", None)
    assert spec("block_0/attention/out/kernel", 8, 16, 64) == P("tensor", None, "fsdp")
    assert spec("block_0/mlp/up/kernel", 64, 256) == P("fsdp", "tensor")
    assert spec("embed/table", 512, 64) == P("tensor", "fsdp")
    # Optimiser state and averages follow the parameter; stacked layers get one axis more.
    assert spec("opt_state/transform/0/mu/block_0/mlp/up/kernel", 64, 256) == P("fsdp", "tensor")
    assert spec("blocks/mlp/up/kernel", 3, 64, 256) == P(None, "fsdp", "tensor")
    assert axes_of("blocks/mlp/up/kernel", 3, PARAMETER_RULES) == (["layers", "embed"], ["mlp"])


def test_axes_that_do_not_divide_are_left_whole():
    assert spec("embed/table", 257, 64) == P(None, "fsdp")
    assert spec("block_0/attention/query/kernel", 6, 3, 16) == P(None, None, None)


def test_unknown_leaves_are_split_only_when_large():
    assert spec("thing/matrix", 64, 64) == P()
    assert spec("thing/matrix", 1023, 2048) == P(None, "fsdp")
    assert spec("thing/scale", 64) == P()


def test_meshes_cover_the_devices():
    assert make_mesh().shape == dict.fromkeys(AXES, 1) | {"data": 8}
    assert make_mesh({"data": -1, "fsdp": 4}).shape["data"] == 2
    with pytest.raises(ConfigError, match=r"mesh.modle: unknown axis; allowed: data, fsdp"):
        make_mesh({"modle": 2})
    with pytest.raises(ConfigError, match="does not cover 8 devices"):
        make_mesh({"data": 3})
    with pytest.raises(ConfigError, match="at most one of them -1"):
        make_mesh({"data": -1, "fsdp": -1})


def test_batches_are_placed_row_by_row():
    mesh = make_mesh({"data": 4, "fsdp": 2})
    data = Epoch(Arrays({"x": np.arange(16.0, dtype=np.float32)}), 16)
    assert host_rows(data, mesh) == slice(0, 16)
    x = place_batch(data.batch(0), mesh, 16)["x"]
    assert x.sharding == batch_sharding(mesh, 16)
    assert [float(s.data[0]) for s in x.addressable_shards] == [0, 2, 4, 6, 8, 10, 12, 14]


def test_constrain_shards_activations_under_a_mesh():
    x = jnp.zeros((8, 4, 6))
    assert constrain(x, ("batch", "length", "embed")) is x
    with jax.set_mesh(make_mesh({"data": 4, "tensor": 2})):
        y = jax.jit(lambda x: constrain(x * 2, ("batch", "length", "mlp")))(x)
    assert y.sharding.shard_shape(y.shape) == (2, 4, 3)


def test_rules_report_what_they_miss_and_what_they_hit_twice():
    leaves = {"a/up/kernel": leaf(4, 8), "a/thing": leaf(4, 4), "a/scale": leaf(4)}
    rules = (("up/kernel$", "embed -> mlp"), ("kernel$", "embed -> mlp"), ("dwon/kernel$", "embed"))
    report = rule_report(leaves, rules)
    assert report.unmatched == ("a/thing",)
    assert report.doubled == {"a/up/kernel": ("up/kernel$", "kernel$")}
    assert report.idle == ("dwon/kernel$",)


@pytest.mark.parametrize(
    "rules, message",
    [
        ([("frist/kernel$", "embed -> mlp")], "rule 'frist/kernel\\$' fits no leaf .* 'kernel'"),
        ([("first/kernel$", "embed -> mlp heads head")], "fits no leaf of the state by name and n"),
        ([("first/kernel$", "embd -> mlp")], "has axis 'embd'; allowed: embed, heads"),
        (
            [("first/kernel$", "embed -> mlp"), ("st/kernel$", "mlp -> embed")],
            "'params/first/kernel' fits the rules 'first/kernel\\$' and 'st/kernel\\$'",
        ),
    ],
)
def test_wrong_rules_of_a_recipe_are_named(rules, message):
    with pytest.raises(ConfigError, match=message):
        abstract_states(recipe(sharding=rules), POD)
    right = [("first/kernel$", "embed -> mlp"), ("second/kernel$", "mlp -> embed")]
    state = abstract_states(recipe(sharding=right), POD)[1]
    assert state.params["first"]["kernel"].sharding.spec == P(None, "tensor")
