"""Batches are pure in (seed, step), whoever asks for which rows."""

import itertools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.data.base import (
    Arrays,
    Deferred,
    DeviceData,
    Epoch,
    FixedData,
    IndexedData,
    prefetch,
)
from jaxformer.recipe import ConfigError, DrawsOnDevice


def numbers(n):
    return Arrays({"x": np.arange(n), "y": np.arange(2.0 * n).reshape(n, 2)})


def jitter(example, rng):
    return {**example, "noise": rng.normal(size=3)}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_a_batch_depends_on_seed_and_step_alone():
    first, again = (IndexedData(numbers(50), 8, 3, [jitter]) for _ in range(2))
    expected = [first.batch(k) for k in range(10)]
    for k in (7, 0, 9, 7):  # any order, another object
        assert_equal(again.batch(k), expected[k])
    other = IndexedData(numbers(50), 8, 4, [jitter])
    assert not np.array_equal(other.batch(0)["x"], expected[0]["x"])


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_read_slices_of_one_global_batch(hosts):
    data = IndexedData(numbers(50), 8, 3, [jitter])
    n = 8 // hosts
    for step in (0, 6):  # step 6 crosses from epoch 0 to epoch 1
        parts = [data.batch(step, slice(h * n, (h + 1) * n)) for h in range(hosts)]
        whole = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        assert_equal(whole, data.batch(step))


def test_each_epoch_is_a_new_permutation():
    data = IndexedData(numbers(30), 6, 0)
    stream = np.concatenate([data.batch(k)["x"] for k in range(15)]).reshape(3, 30)
    assert (np.sort(stream) == np.arange(30)).all()
    assert len({tuple(epoch) for epoch in stream}) == 3
    ordered = IndexedData(numbers(30), 6, 0, shuffle=False)
    np.testing.assert_array_equal(ordered.batch(6)["x"], np.arange(6, 12))


def test_transforms_draw_anew_per_row_and_epoch():
    data = IndexedData(numbers(4), 4, 0, [jitter, jitter], shuffle=False)
    noise = np.stack([data.batch(0)["noise"], data.batch(1)["noise"]])
    assert len(np.unique(noise)) == noise.size


def test_epoch_covers_the_source_once_and_pads_with_weight_zero():
    epoch = Epoch(numbers(10), 4)
    batches = [epoch.batch(k) for k in range(len(epoch))]
    weight = np.concatenate([b["weight"] for b in batches])
    x = np.concatenate([b["x"] for b in batches])
    assert len(epoch) == 3 and x.shape == (12,) and weight.dtype == np.float32
    np.testing.assert_array_equal(weight, [1] * 10 + [0] * 2)
    np.testing.assert_array_equal(x[weight == 1], np.arange(10))
    np.testing.assert_array_equal(epoch.batch(2, slice(2, 4))["weight"], [0, 0])
    assert len(Epoch(numbers(10), 4, limit=2)) == 2
    with pytest.raises(IndexError, match="batch 3 of an epoch of 3"):
        epoch.batch(3)


def test_epoch_keeps_the_weights_of_the_source():
    source = Arrays({"x": np.arange(3), "weight": np.array([0.5, 2.0, 1.0])})
    np.testing.assert_array_equal(Epoch(source, 4).batch(0)["weight"], [0.5, 2, 1, 0])


def test_fixed_data_slices_its_rows():
    data = FixedData({"x": np.arange(6)})
    assert data.batch_size == 6
    np.testing.assert_array_equal(data.batch(99, slice(2, 4))["x"], [2, 3])


def draw_rows(step_key, row_keys):
    shared = jax.random.normal(step_key)
    own = jax.vmap(jax.random.normal)(row_keys)
    return {"shared": jnp.full_like(own, shared), "own": own}


@pytest.fixture(scope="module")
def drawn():
    data = DeviceData(draw_rows, 8, seed=5)
    return data, jax.jit(data.draw)


def test_device_data_is_the_same_however_it_is_sliced(drawn):
    data, draw = drawn
    assert isinstance(data, DrawsOnDevice)
    whole = draw(data.batch(3))
    parts = [draw(data.batch(3, slice(i, i + 2))) for i in range(0, 8, 2)]
    assert_equal({k: np.concatenate([p[k] for p in parts]) for k in whole}, whole)
    micro = jax.tree.map(lambda x: x.reshape(4, 2), data.batch(3))
    scanned = jax.lax.map(data.draw, micro)
    assert_equal({k: v.reshape(8) for k, v in scanned.items()}, whole)


def test_device_data_shares_and_separates(drawn):
    data, draw = drawn
    a, b = draw(data.batch(0)), draw(data.batch(1))
    assert len(np.unique(a["shared"])) == 1 and len(np.unique(a["own"])) == 8
    assert a["shared"][0] != b["shared"][0] and not np.intersect1d(a["own"], b["own"]).size
    compiled = draw._cache_size()
    other = draw(DeviceData(draw_rows, 8, seed=6).batch(0))
    assert other["shared"][0] != a["shared"][0]
    assert draw._cache_size() == compiled  # another seed does not retrace


def test_prefetch_yields_steps_in_order_from_anywhere():
    data = IndexedData(numbers(50), 8, 3)
    for step, batch in itertools.islice(prefetch(data, 5, slice(2, 4)), 6):
        assert_equal(batch, data.batch(step, slice(2, 4)))
    assert [step for step, _ in prefetch(Epoch(numbers(10), 4), stop=3, depth=5)] == [0, 1, 2]
    assert list(prefetch(data, 3, stop=3)) == []


class Failing:
    batch_size = 1

    def __init__(self, fails_at, pause=0.0):
        self.fails_at, self.pause, self.read = fails_at, pause, []

    def batch(self, step, rows=slice(None)):
        time.sleep(self.pause)
        self.read.append(step)
        if step == self.fails_at:
            raise OSError(f"disk gone at {step}")
        return {}


def test_prefetch_raises_the_error_where_its_step_is_asked_for():
    seen = []
    with pytest.raises(OSError, match="disk gone at 3"):
        for step, _ in prefetch(Failing(3), depth=2):
            seen.append(step)
    assert seen == [0, 1, 2]


def test_prefetch_reads_no_further_than_its_depth_and_stop():
    data = Failing(None)
    steps = prefetch(data, 0, depth=2, stop=100)
    next(steps)
    steps.close()
    assert set(data.read) <= {0, 1, 2}


def test_closing_prefetch_ends_its_threads():
    steps = prefetch(Failing(None, pause=0.01), depth=3)
    next(steps)
    threads = [t for t in threading.enumerate() if t.name.startswith("prefetch")]
    assert threads
    steps.close()
    for thread in threads:
        thread.join(timeout=5)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: IndexedData(numbers(3), 4), "data.batch_size: 4 exceeds the 3 examples of Arrays"),
        (lambda: IndexedData(numbers(3), 0), "data.batch_size: 0; give at least 1"),
        (lambda: IndexedData(numbers(0), 1), "Arrays has no examples"),
        (lambda: IndexedData(numbers(3), 1, seed=-1), "data.seed: -1"),
        (lambda: Epoch(numbers(0), 1), "Arrays has no examples"),
        (lambda: Epoch(numbers(3), 1, limit=0), "data.limit: 0"),
        (lambda: DeviceData(draw_rows, -2), "data.batch_size: -2"),
        (lambda: Arrays({"a": np.zeros(2), "b": np.zeros(3)}), "one common first axis"),
        (lambda: next(prefetch(Failing(None), depth=0)), "data.prefetch: depth 0"),
        (lambda: IndexedData([{"x": np.zeros(2)}, {"x": np.zeros(3)}], 2).batch(0), "shape of 'x'"),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


@pytest.mark.parametrize(
    "data",
    [
        IndexedData(numbers(9), 4, transforms=[jitter]),
        Epoch(numbers(9), 4),
        FixedData({"x": np.zeros((4, 2), np.int32)}),
        DeviceData(draw_rows, 4),
    ],
    ids=lambda data: type(data).__name__,
)
def test_spec_is_the_shape_of_every_batch(data):
    batch = data.batch(0)
    assert batch.keys() == data.spec().keys()
    for name, spec in data.spec().items():
        assert (spec.shape, spec.dtype) == (batch[name].shape, batch[name].dtype)


def test_deferred_data_reads_nothing_before_its_first_batch():
    made = []

    def make():
        made.append(1)
        return Epoch(numbers(9), 4)

    row = {"x": ((), np.int64), "weight": ((), np.float32)}
    data = Deferred(make, 4, row)
    assert data.spec()["x"].shape == (4,) and not made
    assert_equal(data.batch(1, slice(1, 3)), Epoch(numbers(9), 4).batch(1, slice(1, 3)))
    assert len(data) == 3 and len(made) == 1
    with pytest.raises(
        ConfigError, match=r"'x' is int64\(\) in the files, the config says float32"
    ):
        Deferred(make, 4, {"x": ((), np.float32)}).batch(0)
