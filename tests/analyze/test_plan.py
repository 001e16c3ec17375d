"""What is counted without running: products, traffic, and plans for pods that are not here."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxformer import cli
from jaxformer.analyze.flops import count
from jaxformer.analyze.hlo import collectives
from jaxformer.catalogue import load
from jaxformer.config import configs_folder, load_config, load_mesh
from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import Causal, Full, Window, attention
from jaxformer.parallel.mesh import axis_sizes, make_mesh
from jaxformer.parallel.topology import topology


@pytest.mark.parametrize(
    "mask, share, tolerance",
    [(Full(), 1.0, 0.0), (Causal(), 0.5, 2e-3), (Window(255, 0), 256 / 2048, 0.07)],
)
def test_attention_counts_what_its_mask_leaves(mask, share, tolerance):
    B, L, H, G, K = 2, 2048, 4, 2, 32
    q, k = (jax.ShapeDtypeStruct((B, L, n, K), jnp.float32) for n in (H, G))
    attend = functools.partial(attention, mask=mask, impl="chunked")
    forward = 4 * B * H * L * L * K * share
    assert count(attend, q, k, k) == pytest.approx(forward, rel=tolerance)
    gradients = jax.grad(lambda *x: attend(*x).sum(), (0, 1, 2))
    assert count(gradients, q, k, k) == pytest.approx(3 * forward, rel=tolerance)


def test_collectives_of_a_loop_count_every_turn():
    mesh = make_mesh({"data": 2, "fsdp": 4})

    def layers(w, x):
        def layer(x, part):
            whole = jax.lax.all_gather(part, "fsdp", axis=0, tiled=True)
            return jnp.tanh(x @ whole), None

        x, _ = jax.lax.scan(layer, x, w)
        return x, jax.lax.psum(x.sum(), ("data", "fsdp"))

    rows, split = P(("data", "fsdp")), P(None, "fsdp")
    run = jax.shard_map(
        layers, mesh=mesh, in_specs=(split, rows), out_specs=(rows, P()), check_vma=False
    )
    w = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, split))
    x = jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=NamedSharding(mesh, rows))
    found = collectives(jax.jit(run).lower(w, x).compile().as_text())
    assert found["all-gather"].calls == 5
    assert found["all-gather"].sent == 5 * 64 * 64 * 4 * 3 / 4
    assert found["all-reduce"].calls == 1 and found["all-reduce"].sent == 4 * 2 * 7 / 8


def test_names_of_the_tpu_compiler_are_read():
    text = """
%region_c (p: (s32[], f32[8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}
%all-reduce-scatter.2 (i: f32[64,8]) -> f32[8,8] {
  %all-reduce.3 = f32[64,8]{1,0} all-reduce(%i), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7}}
}
%first (p: bf16[8,8]) -> bf16[64,8] {
  %k = bf16[8,8] custom-call(%p), backend_config={"kernel":"a{
}}, metadata={}
  %g.1 = bf16[64,8]{1,0:S(1)} all-gather(%p), channel_id=1, replica_groups=mesh['a'=8] {'a'}
}
%second (p: bf16[8,8]) -> bf16[64,8] {
  %g.2 = bf16[64,8] all-gather(%p), channel_id=1, replica_groups=mesh['a'=8], ids=([8]T(0)) {'a'}
}
%region_b (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %f.1 = bf16[64,8] fusion(%p), kind=kCustom, calls=%first
  %f.2 = bf16[64,8] fusion(%p), kind=kCustom, calls=%second
  %f.3 = f32[8,8] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.2
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%region_c, body=%region_b, metadata={}
}
"""
    found = collectives(text)
    assert found["all-gather"].calls == 3  # its two halves are one collective
    assert found["all-gather"].sent == 3 * 64 * 8 * 2 * 7 / 8
    assert found["reduce-scatter"].sent == pytest.approx(3 * 2 * 64 * 8 * 4 * 7 / 8 / 2)
    assert set(found) == {"all-gather", "reduce-scatter"}


def test_collectives_that_leave_a_slice_are_told():
    text = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %a = f32[8] all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}
  %s = (f32[4]{0}, u32[], token[]) send(%a, %t), channel_id=9, a={x="xla_megascale_runtime"}
  %b = f32[8] all-reduce(%p), channel_id=2, replica_groups=[4,2]<=[2,4]T(1,0)
  %c = f32[8] all-reduce(%p), channel_id=3, replica_groups=[2,4]<=[8]
  %d = f32[8] all-reduce(%p), channel_id=4, replica_groups=mesh['a'=2,'b'=4] {'a'}
  %e = f32[8] all-reduce(%p), channel_id=5, replica_groups=mesh['a'=2,'b'=4] {'b'}
  %f = f32[8] all-reduce(%p), channel_id=6, replica_groups=mesh['a'=4,'b'=2], x=([2,4]T(1,0)) {'b'}
}
"""
    found = collectives(text, slice_size=4)["all-reduce"]
    assert found.sent == 2 * 32 * (3 * 3 / 4 + 3 / 2)
    assert found.between == 2 * 32 * 3 / 2  # b, d and f join a device of each slice
    assert collectives(text)["all-reduce"].between == 0
    assert collectives(text)["send"].between == 16  # by the hosts of TPU slices


def test_topologies_are_named():
    assert topology("2*v5p:8x8x8").size == 1024
    assert topology("h200:8x8").size == 64
    for wrong in ("v5e", "v9:2x2", "v5e:2", "h200:2x2x2", "0*v5e:2x2", "v5e:0x2"):
        with pytest.raises(ConfigError, match=f"topology: '{wrong[:2].replace('*', '.')}"):
            topology(wrong)


def test_sizes_of_the_decoders_are_the_published_ones():
    from jaxformer.analyze.summary import parameter_count
    from jaxformer.train.states import new_state

    published = {
        "gpt2_124m": 124.4e6,
        "gpt_1p3b": 1.315e9,
        "llama_7b": 6.738e9,
        "llama_70b": 69.0e9,
    }
    for preset, size in published.items():
        recipe = load(f"decoder:{preset}")
        state = jax.eval_shape(lambda: new_state(recipe, jax.random.key(0)))  # noqa: B023
        assert parameter_count(state.params) == pytest.approx(size, rel=1e-2), preset


MESHES = [path.stem for path in (configs_folder() / "mesh").glob("*.py")]


@pytest.mark.parametrize("name", MESHES)
def test_mesh_files_cover_their_topology(name):
    sizes, where = load_mesh(name)
    config = load_config("decoder:llama_7b", sizes)
    if where is not None:
        axis_sizes(config.mesh.to_dict(), topology(where).size)


def test_a_mesh_that_does_not_exist_is_named(capsys):
    assert cli.main(["plan", "--mesh", "v5e_17"]) == 2
    assert "mesh: no file 'v5e_17'; give a file or one of: cpu, gpu_1" in capsys.readouterr().err
    assert cli.main(["plan", "--mesh", "cpu"]) == 2
    assert "plan: give --topology" in capsys.readouterr().err


@pytest.mark.aot
def test_slices_are_the_outer_level_of_the_data_axis():
    from tests.kernels.aot import need

    need("v5e")
    mesh = make_mesh({"data": 4, "fsdp": 2}, topology("2*v5e:2x2").devices())
    slices = [[d.slice_index for d in row.flat] for row in mesh.devices]
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(ConfigError, match=r"mesh.data: 1 copies cannot be shared by 2 slices"):
        make_mesh({"data": 1, "fsdp": 8}, topology("2*v5e:2x2").devices())


@pytest.mark.aot
@pytest.mark.parametrize("name", ["v5e:2x4", "h200:1x8"])
def test_a_plan_needs_no_device(name, capsys):
    from tests.kernels.aot import need

    need("v5e" if name.startswith("v5e") else "h200")
    mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=8", "--config.model.scan=true"]
    sizes = ["--config.model.width=256", "--config.batch_size=16"]
    verb = ["plan", "--config", "decoder:small", "--topology", name, *mesh, *sizes]
    assert cli.main(verb) == 0
    text = capsys.readouterr().out
    assert f"on {name}: 8 devices (fsdp=8)" in text and ": fits" in text
    assert "all-gather" in text and "TFLOP" in text
    assert cli.main([*verb, "--config.batch_size=2000000", "--config.data.length=4096"])
    assert "DOES NOT FIT" in capsys.readouterr().out
