"""Runs the Mosaic GPU kernels without a GPU: `device` played by Python threads.

Every warpgroup is a thread; one runs at a time, and a seeded draw decides which one goes on after
each operation. Copies land as late as the barrier allows and ruin their target at once, so that
reading too early or overwriting too early gives NaN; barriers count phases as the hardware does, by
parity; a deadlock, a phase missed or an access out of bounds raises. What is left to a GPU: the
layouts and instructions that the compiler chooses.
"""

import contextlib
import math
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.kernels.attention.mosaic_gpu import device


class Ref:
    """A window of an array: per axis an index or (start, size)."""

    def __init__(self, base, window=None, flipped=False):
        self.base, self.flipped = base, flipped
        self.window = window or tuple((0, n) for n in base.shape)

    @property
    def shape(self):
        shape = tuple(w[1] for w in self.window if isinstance(w, tuple))
        return shape[::-1] if self.flipped else shape

    @property
    def dtype(self):
        return self.base.dtype

    @property
    def at(self):
        return _At(self)

    @property
    def inside(self):
        """Whether the window lies within the array."""
        return all(
            w[0] >= 0 and w[0] + w[1] <= n if isinstance(w, tuple) else 0 <= w < n
            for w, n in zip(self.window, self.base.shape, strict=True)
        )

    def view(self):
        assert self.inside, f"window {self.window} of an array {self.base.shape}"
        cut = tuple(slice(w[0], w[0] + w[1]) if isinstance(w, tuple) else w for w in self.window)
        x = self.base[cut]
        return x.T if self.flipped else x

    def __getitem__(self, at):
        return jnp.asarray(np.array(self.at[at].view()))

    def __setitem__(self, at, value):
        target = self.at[at]
        assert value.shape == target.shape and value.dtype == target.dtype
        target.view()[...] = np.asarray(value)


class _At:
    def __init__(self, ref):
        self.ref = ref

    def __getitem__(self, at):
        at = at if isinstance(at, tuple) else (at,)
        left = list(() if at == (...,) else at)
        window = []
        for w in self.ref.window:
            if not isinstance(w, tuple) or not left:
                window.append(w)
                continue
            index = left.pop(0)
            if isinstance(index, slice):
                assert index == slice(None)
                window.append(w)
            elif hasattr(index, "size") and hasattr(index, "start"):
                window.append((w[0] + int(index.start), int(index.size)))
            else:
                window.append(w[0] + int(index))
        assert not left
        return Ref(self.ref.base, tuple(window), self.ref.flipped)


class Barrier:
    """An mbarrier: completes a phase after `arrivals`; waiting looks at the parity alone."""

    def __init__(self, arrivals):
        self.arrivals, self.arrived, self.phases, self.landing = arrivals, 0, 0, []
        self.waited = {}

    def arrive(self):
        self.arrived += 1
        if self.arrived == self.arrivals:
            self.arrived, self.phases = 0, self.phases + 1

    def ready(self):
        seen = self.waited.get(threading.current_thread(), 0)
        assert self.phases <= seen + 1, "a warpgroup missed a phase: the parity would mislead it"
        return self.phases > seen

    def land(self):
        for copy in self.landing:
            copy()
            self.arrive()
        self.landing.clear()


class Machine:
    """One thread block."""

    def __init__(self, position, warpgroups, rng):
        self.position, self.rng = position, rng
        self.turns = [threading.Semaphore(0) for _ in range(warpgroups)]
        self.waiting = [None] * warpgroups  # for which barrier
        self.alive = set(range(warpgroups))
        self.failure = None

    def run(self, body, refs):
        local = threading.local()

        def warpgroup(i):
            local.i = i
            self.turns[i].acquire()
            try:
                if self.failure is None:
                    body(refs)
            except BaseException as error:
                self.failure = self.failure or error
            self.alive.discard(i)
            self.pass_on()

        self.local = local
        threads = [threading.Thread(target=warpgroup, args=(i,)) for i in range(len(self.turns))]
        for thread in threads:
            thread.start()
        self.pass_on()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def pass_on(self):
        """Let a warpgroup that can go on do so."""
        alive = sorted(self.alive)
        able = alive if self.failure else [i for i in alive if self.able(i)]
        if alive and not able:
            self.failure, able = AssertionError(f"deadlock of warpgroups {alive}"), alive
        if able:
            self.turns[able[self.rng.integers(len(able))]].release()

    def able(self, i):
        barrier = self.waiting[i]
        return barrier is None or barrier[0].phases > barrier[1] or bool(barrier[0].landing)

    def step(self):
        self.pass_on()
        self.turns[self.local.i].acquire()
        if self.failure is not None:
            raise self.failure

    def wait(self, barrier):
        thread = threading.current_thread()
        self.waiting[self.local.i] = barrier, barrier.waited.get(thread, 0)
        self.step()
        barrier.land()
        assert barrier.ready()
        self.waiting[self.local.i] = None
        barrier.waited[thread] = barrier.waited.get(thread, 0) + 1


class Simulator:
    """The functions of `device`; `fetched` lists (grid position, window) of what was."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.fetched = []

    def launch(self, body, inputs, outputs, scratch, *, name, grid, warpgroups):
        def new(shape, dtype):
            x = np.zeros(shape, dtype)
            x.fill(np.nan if jnp.issubdtype(dtype, jnp.floating) else 123456789)
            return x

        arrays = {name: Ref(np.asarray(x)) for name, x in inputs.items()}
        results = {name: Ref(new(x.shape, x.dtype)) for name, x in outputs.items()}
        for where in np.ndindex(*grid.values()):
            local = {
                name: Ref(new(x.shape, x.dtype))
                if isinstance(x, device.Shared)
                else _Row([Barrier(x.arrivals) for _ in range(x.number)])
                for name, x in scratch.items()
            }
            self.machine = Machine(dict(zip(grid, where, strict=True)), warpgroups, self.rng)
            self.machine.run(body, {**arrays, **results, **local})
        return {name: jnp.asarray(x.base) for name, x in results.items()}

    def index(self, axis):
        if axis == "warpgroup":
            return self.machine.local.i
        return self.machine.position[axis]

    @staticmethod
    def when(condition):
        return lambda fn: fn() if bool(condition) else None

    @staticmethod
    def loop(start, stop, body, carry):
        for t in range(int(start), int(stop)):
            carry = body(np.int32(t), carry)
        return carry

    def registers(self, number, *, more):
        pass

    def fetch(self, source, target, barrier):
        assert source.shape == target.shape and source.dtype == target.dtype
        self.fetched.append((self.machine.position, source.window))
        ruined = target.view()
        ruined[...] = np.nan

        def land():
            ruined[...] = _clipped(source)

        barrier.landing.append(land)
        self.machine.step()

    def put(self, value, staging, target):
        assert value.shape == staging.shape == target.shape
        staging.view()[...] = np.asarray(value.astype(staging.dtype))
        keep = [
            min(w[1], n - w[0]) if isinstance(w, tuple) else None
            for w, n in zip(target.window, target.base.shape, strict=True)
        ]
        inside = tuple(
            w if k is None else (w[0], max(k, 0)) for w, k in zip(target.window, keep, strict=True)
        )
        lengths = [k for k in keep if k is not None]
        if min(lengths) > 0:
            Ref(target.base, inside).view()[...] = staging.view()[
                tuple(slice(0, n) for n in lengths)
            ]
        self.machine.step()

    def keep(self, value, target):
        target[...] = value.astype(target.dtype)
        self.machine.step()

    def finish_puts(self):
        pass

    def arrive(self, barrier):
        barrier.arrive()
        self.machine.step()

    def wait(self, barrier):
        self.machine.wait(barrier)

    @staticmethod
    def transposed(ref):
        return Ref(ref.base, ref.window, not ref.flipped)

    @staticmethod
    def opaque(x):
        return x

    @staticmethod
    def multiply(a, b, then=None):
        if then is not None:
            then()
        return _product(a, b)

    @staticmethod
    def add_products(*terms):
        return tuple(
            total + _product(a if isinstance(a, Ref) else a.astype(b.dtype), b)
            for total, a, b in terms
        )

    @staticmethod
    def load(ref, over):
        assert len(ref.shape) == len(over)
        return ref[...]

    @staticmethod
    def full(shape, value, over):
        return jnp.full(shape, value, jnp.float32)

    @staticmethod
    def count(n, over):
        return jnp.arange(n, dtype=jnp.int32)

    @staticmethod
    def spread(x, shape, over):
        return jax.lax.broadcast_in_dim(jnp.asarray(x), shape, {"r": (0,), "c": (1,), "": ()}[over])


class _Row:
    """A row of barriers."""

    def __init__(self, barriers):
        self.at = [*barriers]


def _product(a, b):
    # By XLA: the threads of NumPy's BLAS wait for one another 14 ms per product on a busy machine.
    a, b = (np.ascontiguousarray(x.view()) if isinstance(x, Ref) else x for x in (a, b))
    return jax.lax.dot(a, b, preferred_element_type=jnp.float32)


def _clipped(source):
    """A window of which what is out of bounds reads 0."""
    x = source.base
    pads, cut = [], []
    for w, n in zip(source.window, x.shape, strict=True):
        if isinstance(w, tuple):
            end = min(w[0] + w[1], n)
            cut.append(slice(min(w[0], n), end))
            pads.append((0, w[1] - max(end - w[0], 0)))
        else:
            assert 0 <= w < n
            cut.append(w)
    assert math.prod(source.shape)
    return np.pad(x[tuple(cut)], pads)


@contextlib.contextmanager
def simulated(seed=0):
    """Within, `device` is simulated; gives the `Simulator`."""
    simulator = Simulator(seed)
    names = [n for n in vars(Simulator) if not n.startswith("_")]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(device, name, getattr(simulator, name))
        yield simulator
