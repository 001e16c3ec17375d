"""The Mosaic GPU kernels, run by the simulator: values, gradients, schedules, barriers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxformer.kernels.attention import (
    AttentionUnsupported,
    Causal,
    KeyPadding,
    PerK,
    Prefix,
    ProbMod,
    Window,
    api,
    attention,
    choice,
    plan,
    ste_round,
)
from jaxformer.kernels.attention.blocks import blocks
from jaxformer.kernels.attention.mosaic_gpu import device, mosaic_gpu
from jaxformer.kernels.attention.mosaic_gpu.elementwise import NotElementwise, Part, trace
from jaxformer.kernels.attention.mosaic_gpu.schedule import HeadTables, visit_table
from jaxformer.kernels.dispatch import Implementation
from tests.kernels.attention_reference import Case, attend, draw, slope
from tests.kernels.mosaic_simulator import simulated
from tests.kernels.test_attention import CASES, run
from tests.kernels.test_attention_pairs import case_of, share


@pytest.fixture
def simulator(monkeypatch):
    """Within, impl="simulated" runs the kernels eagerly, in the caller's float32."""
    kernels = Implementation("simulated", lambda request: None, mosaic_gpu)
    monkeypatch.setattr(choice, "IMPLEMENTATIONS", (*choice.IMPLEMENTATIONS, kernels))
    with simulated() as simulator, jax.disable_jit():
        yield simulator


def check(case, x, simulator):
    """Values and gradients against float64, as closely as in `test_attention`."""
    rng = np.random.default_rng(3)
    b, l, _, h, _, _, kv = case.sizes
    weights = rng.standard_normal((b, l, h, kv)), rng.standard_normal((b, h, l))
    (o, lse), grads = run(case, x, jax.tree.map(np.float32, weights), "simulated", None)
    want_o, want_lse = attend(case, x)
    np.testing.assert_allclose(o, want_o, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
    for key, grad in grads.items():
        direction = rng.standard_normal(np.shape(x[key]))
        want = slope(case, x, weights, key, direction)
        got = (np.float64(grad) * direction).sum()
        size = np.abs(np.float64(grad) * direction).sum()
        assert abs(got - want) <= 2e-5 * size + 1e-6, (key, got, want)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, simulator):
    x = draw(CASES[name])
    if "aux_cap" in x:
        x["aux_cap"] = np.float32(2.0)
    check(CASES[name], x, simulator)


@pytest.mark.parametrize(("mask", "mod", "shape"), share(2))
def test_masks_with_modifications(mask, mod, shape, simulator):
    case = case_of(mask, mod, shape)
    x = draw(case)
    if "aux_cap" in x:
        x["aux_cap"] = np.float32(2.0)
    check(case, x, simulator)


@pytest.mark.parametrize("sizes", [(72, 40), (200, 250)])
def test_rings_that_go_round_head_sizes_that_differ_and_launches_of_their_own(sizes, simulator):
    # Mods at head sizes above 64 have dK and dV in separate launches, above 128 narrower tiles.
    case = Case(
        (1, 270, 600, 2, 1, *sizes),
        lambda: Causal(offset=330),
        lambda b, i, j: j <= i + 330,
        call=dict(score_mod=lambda s, i, a: s + a["column"]),
        aux={"column": (PerK, (2, 600))},
        score=lambda s, b, h, i, j, a: s + a["column"][:, None],
    )
    check(case, draw(case), simulator)


def test_tiles_that_nobody_sees_are_neither_fetched_nor_computed(simulator):
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 512, 1, 64)) for i in range(3))
    poisoned = [x.at[:, 256:].set(jnp.nan) for x in (k, v)]
    want = attention(q, k, v, mask=Prefix(256), impl="xla")
    for mask in (Prefix(256), KeyPadding(jnp.array([256]))):
        got = attention(q, *poisoned, mask=mask, impl="simulated")
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    simulator.fetched.clear()
    attention(q, k, v, mask=Window(100, 0), impl="simulated")
    # Of 4 blocks of 128 queries each sees its own 128 keys and the 128 before, but the first.
    assert len(simulator.fetched) == 4 * 2 + 2 * (1 + 2 + 2 + 2)


@pytest.mark.slow
def test_every_interleaving_gives_the_same_result():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 130, 1, 8)) for i in range(3))
    request = api._request(q, k, v, mask=Causal())

    def loss(request):
        o, lse = mosaic_gpu(request)
        return jnp.square(o).sum() + lse.sum()

    runs = []
    for seed in range(5):
        with simulated(seed):
            runs.append(jax.grad(loss)(request))
    for other in runs[1:]:
        assert jax.tree.all(jax.tree.map(np.array_equal, runs[0], other))


def test_dropout_draws_what_every_implementation_draws(simulator):
    q, k = (jax.random.normal(jax.random.key(i), (2, 70, 2, 8)) for i in range(2))
    v = jnp.broadcast_to(jnp.eye(70)[None, :, None], (2, 70, 2, 70))  # the output is the weights
    call = dict(dropout=(0.25, jax.random.key(7)), mask=Causal())
    ours, theirs = (attention(q, k, v, impl=i, **call) for i in ("simulated", "chunked"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    # Part of a call, as a device of several computes it, draws what the whole draws there.
    part = api._request(*(x[1:, :, 1:] for x in (q, k, v)), **call)
    part = dataclasses.replace(part, origin=jnp.array([1, 1], jnp.int32))
    np.testing.assert_allclose(mosaic_gpu(part)[0], theirs[1:, :, 1:], rtol=1e-4, atol=1e-6)


def test_bfloat16_is_accumulated_in_float32(simulator):
    case = Case((1, 200, 200, 2, 1, 16, 16), Causal, lambda b, i, j: j <= i)
    x = {name: jnp.asarray(value, jnp.bfloat16) for name, value in draw(case).items()}
    o, lse = attention(*x.values(), mask=Causal(), return_lse=True, impl="simulated")
    want, want_lse = attend(case, x)
    assert o.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    # Weights and outputs are rounded to 8 bits each.
    np.testing.assert_allclose(np.float64(o), want, rtol=2**-7, atol=4e-3)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


def test_rounded_probabilities_train_straight_through(simulator):
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 70, 1, 8)) for i in range(3))
    mod = ProbMod(lambda p, i, a: ste_round(p * 64.0) / 64.0, linear=False)

    def loss(x, impl):
        return jnp.square(attention(*x, prob_mod=mod, mask=Causal(), impl=impl)).sum()

    ours, theirs = (jax.grad(loss)([q, k, v], impl) for impl in ("simulated", "chunked"))
    for got, want in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------- schedules


def test_long_tiles_start_first_and_each_is_taken_once():
    x = jax.ShapeDtypeStruct((1, 1000, 2, 64), jnp.bfloat16)
    visits = blocks(api._request(x, x, x, mask=Causal()), 128, 128).by_q
    table = np.asarray(visit_table(visits))[0]
    assert sorted(table[:, 0]) == list(range(8)) and list(table[:, 2]) == list(range(8, 0, -1))
    for tile, full, count, *index in table:
        assert index[:count] == list(range(tile + 1))
        assert full == (tile if tile < 7 else 0)  # the last rows reach beyond the length


def test_head_tables_list_each_query_head_once():
    x, y = (jax.ShapeDtypeStruct((1, 8, n, 64), jnp.bfloat16) for n in (5, 3))
    tables = HeadTables.of(api._request(x, y, y, head_map=(2, 0, 0, 2, 2)))
    groups = np.split(tables.heads, tables.first[1:-1])
    assert [list(g) for g in groups] == [[1, 2], [], [0, 3, 4]]
    assert list(tables.key_head) == [2, 0, 0, 2, 2]


def test_a_key_head_that_nobody_reads_has_zero_gradient(simulator):
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 30, 2, 8)) for i in range(3))

    def loss(k, v):
        return attention(q, k, v, head_map=(1, 1), impl="simulated").sum()

    for grad in jax.grad(loss, (0, 1))(k, v):
        assert np.all(np.asarray(grad[:, :, 0]) == 0) and np.any(np.asarray(grad[:, :, 1]) != 0)


# ---------------------------------------------------------------------- elementwise programs

FUNCTIONS = {
    "floor": jnp.floor,
    "ceil": jnp.ceil,
    "round": jnp.round,
    "sqrt": lambda x: jnp.sqrt(jnp.abs(x)),
    "log1p": lambda x: jnp.log1p(jnp.abs(x)),
    "expm1": jnp.expm1,
    "tan": jnp.tan,
    "softplus": jax.nn.softplus,
    "gelu": jax.nn.gelu,
    "cube": lambda x: x**3 + x**-3,
    "is_finite": lambda x: jnp.where(jnp.isfinite(x), 1.0, 2.0),
    "log2": lambda x: jnp.exp2(-jnp.round(jnp.log2(jnp.abs(x) + 1e-3))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_programs_compute_what_they_were_traced_from(name):
    fn = FUNCTIONS[name]
    x = jnp.concatenate([jnp.linspace(-3, 3, 62), jnp.array([1e-6, 40.0])]).reshape(8, 8)
    program = trace(lambda x: (fn(x["x"]), jax.grad(lambda y: fn(y).sum())(x["x"])), {"x": x.dtype})
    with simulated():
        got = program((8, 8), lambda name: Part("rc", x))
    for part, want in zip(got, (fn(x), jax.grad(lambda y: fn(y).sum())(x)), strict=True):
        np.testing.assert_allclose(
            np.broadcast_to(part.value, want.shape), want, rtol=2e-5, atol=1e-6
        )


def test_values_stay_on_the_axes_on_which_they_vary():
    def fn(x):
        return (x["s"] * x["q"]) * x["q"] + x["k"], x["q"] * 2 + x["s"]

    program = trace(fn, dict.fromkeys("sqk", jnp.float32))
    parts = {
        "s": Part("", jnp.float32(2)),
        "q": Part("r", jnp.arange(4.0)),
        "k": Part("c", jnp.ones(3)),
    }
    with simulated():
        tile, row = program((4, 3), parts.__getitem__)
    assert (tile.over, row.over) == ("rc", "r")
    np.testing.assert_array_equal(tile.value, 2 * jnp.arange(4.0)[:, None] ** 2 + jnp.ones(3))
    assert set(program.select(lambda out: out[1]).inputs) == {"s", "q"}


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: jnp.array([1.0, 2.0])[(x > 0).astype(int)], "array"),
        (lambda x: jnp.cumsum(jnp.broadcast_to(x, (4, 4, 4, 4)), 0), "array"),
        (lambda x: jax.lax.lgamma(x), "lgamma has no Mosaic GPU instruction"),
    ],
)
def test_what_is_not_elementwise_is_refused(fn, message):
    with pytest.raises(NotElementwise, match=message):
        trace(lambda x: fn(x["x"]), {"x": jnp.float32})


# --------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype=jnp.float32), "float32 inputs"),
        (dict(size=512), "head size 512"),
        (dict(tiles=(64, 64)), r"tiles \(64, 64\).*one of \(\(128, 64\), \(128, 128\)\)"),
        (dict(score_mod=lambda s, i, a: jax.lax.lgamma(s)), "lgamma"),
        (dict(), "platform cpu: its kernels are for Hopper"),
    ],
)
def test_refusals_name_what_is_in_the_way(change, message):
    call = dict(change)
    x = jnp.zeros((1, 16, 1, call.pop("size", 64)), call.pop("dtype", jnp.bfloat16))
    with pytest.raises(AttentionUnsupported, match=f"'mosaic_gpu' does not support.*{message}"):
        attention(x, x, x, impl="mosaic_gpu", **call)


def test_on_a_mesh_of_hoppers_they_are_the_first_choice():
    # `jnp.where` traces to other operations where a mesh is set: they must be understood, too.
    mesh = AbstractMesh(
        (1,), ("data",), (AxisType.Auto,),
        abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu"),
    )  # fmt: skip
    x = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        found = plan(x, x, x, mask=Causal(), score_mod=lambda s, i, a: jnp.where(s > 0, s, 0.0))
    assert found.impl == "mosaic_gpu"


# ---------------------------------------------------------------------- the simulator itself


def launch_copy(body):
    """Run a body on a buffer of ones, with a shared buffer and two barriers."""
    return device.launch(
        body, {"x": jnp.ones((8, 8))}, {"y": jax.ShapeDtypeStruct((8, 8), jnp.float32)},
        {"s": device.Shared((8, 8), jnp.float32), "bar": device.Barriers(2)},
        name="copy", grid={"i": 1}, warpgroups=2,
    )["y"]  # fmt: skip


def test_the_simulator_sees_races_and_deadlocks():
    def no_wait(refs):
        if device.index("warpgroup") == 0:
            device.fetch(refs["x"], refs["s"], refs["bar"].at[0])
            refs["y"][...] = refs["s"][...]

    def deadlock(refs):
        device.wait(refs["bar"].at[device.index("warpgroup")])

    def missed(refs):
        if device.index("warpgroup") == 0:
            for _ in range(2):
                device.arrive(refs["bar"].at[0])
            device.arrive(refs["bar"].at[1])
        else:
            device.wait(refs["bar"].at[1])
            device.wait(refs["bar"].at[0])

    with simulated():
        assert np.isnan(launch_copy(no_wait)).all()
        with pytest.raises(AssertionError, match="deadlock"):
            launch_copy(deadlock)
        with pytest.raises(AssertionError, match="missed a phase"):
            launch_copy(missed)
