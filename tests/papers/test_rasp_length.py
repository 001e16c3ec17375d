"""RASP-L against loops, its programs on all tasks, packed rows, and the length sweep."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.catalogue import load
from jaxformer.data.base import DeviceData
from jaxformer.data.packing import Alone, Packed
from jaxformer.errors import ConfigError
from jaxformer.evaluation.lengths import LengthSweep, exact_match
from jaxformer.papers.rasp_length import core, formats, library, programs
from jaxformer.papers.rasp_length.recipe import TASKS
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import EvalContext, TrainState
from jaxformer.sampling.autoregressive import generate
from jaxformer.train.states import new_state

RNG = np.random.default_rng(0)
PREDICATES = (library.equals, library.leq, library.lt, library.geq, library.gt)

FORMATS = {
    "count": formats.Count(60),
    "unique_copy": formats.Copy(30),
    "repeat_copy": formats.Copy(2, unique=False),
    "sort": formats.Sort(30),
    "mode": formats.Mode(6),
    "mode, frequency": formats.Mode(20, scratchpad="frequency"),
    "mode, appearance": formats.Mode(20, scratchpad="appearance"),
    "parity": formats.Parity(2),
    "parity_with_hints": formats.ParityWithHints(4, 25),
    "and": formats.And(2, zeros=(0.0, 0.5)),
    "addition": formats.Addition(10, 20),
    "addition, forward": formats.Addition(10, 20, reverse=False),
    "addition, plain": formats.Addition(10),
}
LONGEST = 12


@functools.cache
def examples(name, count=500):
    """`count` examples of lengths 1 to 12: values, where answers begin, sizes and lengths."""
    format = FORMATS[name]
    lengths = jnp.asarray(1 + np.arange(count) % LONGEST)
    keys = jax.random.split(jax.random.key(0), count)
    draw = jax.jit(jax.vmap(format, (0, 0, None)), static_argnums=2)
    tokens, answer, size = (np.asarray(x) for x in draw(keys, lengths, LONGEST))
    return format.values[tokens], answer, size, np.asarray(lengths)


def questions_and_answers(name):
    for row, answer, size, length in zip(*examples(name), strict=True):
        yield row[:answer].tolist(), row[answer:size].tolist(), int(length)


# The core.


def loops(k, q, pred):
    return np.array(
        [[j <= i and bool(pred(k[j], q[i])) for j in range(len(k))] for i in range(len(k))]
    )


@pytest.mark.parametrize("pred", PREDICATES, ids=lambda pred: pred.__name__)
def test_primitives_are_what_loops_give(pred):
    k, q, v = RNG.integers(-4, 5, (3, 40, 9))
    A = core.select(k, q, pred)
    for reduction, reduce in {"mean": np.mean, "max": np.max, "min": np.min}.items():
        found = core.aggr(A, v, -3, reduction)
        for i in range(40):
            rows = loops(k[i], q[i], pred)
            np.testing.assert_array_equal(A[i], rows)
            wanted = [int(reduce(v[i][row])) if row.any() else -3 for row in rows]
            np.testing.assert_array_equal(found[i], wanted)
        np.testing.assert_array_equal(
            core.aggr(jnp.asarray(A), jnp.asarray(v), -3, reduction), found
        )
    np.testing.assert_array_equal(core.sel_width(A), A.sum(-1))


def test_mean_truncates_towards_zero_and_empty_rows_have_the_default():
    x = np.array([1, 2])
    assert core.aggr(np.array([[True, True]] * 2), x).tolist() == [1, 1]
    assert core.aggr(np.array([[True, True]] * 2), -x).tolist() == [-1, -1]
    nothing = np.zeros((2, 2), bool)
    for reduction in ("mean", "max", "min"):
        assert core.aggr(nothing, x, 7, reduction).tolist() == [7, 7]
    assert core.tok_map(np.array([-3, 3]), lambda a: a / 2).tolist() == [-1, 1]


def test_argmax_and_mode_are_as_intended():
    x = np.array([3, 1, 3, 5, 5, 1])
    assert library.argmax(x).tolist() == [0, 0, 2, 3, 4, 4]
    assert library.argmin(x).tolist() == [0, 1, 1, 1, 1, 5]
    assert library.mode(np.array([4, 2, 2, 4, 4])).tolist() == [4, 2, 2, 4, 4]


# Causality and JAX.

UNARY = {
    "shift_right": lambda x: library.shift_right(x, 2, 7),
    "cumsum": lambda x: library.cumsum(x > 0),
    "maximum": library.maximum,
    "minimum": library.minimum,
    "argmax": library.argmax,
    "argmin": library.argmin,
    "mode": library.mode,
    "binary_mode": library.binary_mode,
    "first_true": lambda x: library.first_true(core.integers(x == 1)),
    "mask": lambda x: library.mask(x, x > 1, -9),
    "num_prev": lambda x: library.num_prev(x, x[::-1][::-1] + 1),
    "has_seen": lambda x: library.has_seen(x, x + 1),
    "firsts": lambda x: library.firsts(x, x - 1, -5),
    "lasts": lambda x: library.lasts(x, x - 1, -5),
    "index_select": lambda x: library.index_select(x, x, -7),
    "induct": lambda x: library.induct(x, x, 1),
    "induct_prev": lambda x: library.induct_prev(x, x, -1, -8),
    "forward addition": lambda x: programs.addition(x, reverse=False),
    **programs.PROGRAMS,
}


@pytest.mark.parametrize("name", UNARY)
def test_is_causal_and_the_same_in_jax(name):
    function = UNARY[name]
    tokens = np.concatenate([np.arange(-5, 10), np.arange(-104, -99)])
    for x in RNG.choice(tokens, (5, 16)):
        whole = function(x)
        for t in (1, 7, 15):
            other = np.append(x[:t], RNG.choice(tokens, 16 - t))
            np.testing.assert_array_equal(function(other)[:t], whole[:t])
        np.testing.assert_array_equal(function(jnp.asarray(x)), whole)


# The programs.


@pytest.mark.parametrize("name", [n for n in FORMATS if n.split(",")[0] in programs.PROGRAMS])
def test_programs_solve_their_tasks(name):
    """At every place of an answer, from what is right before it: so by themselves too."""
    if "plain" in name or name.startswith("mode,"):
        pytest.skip("has no short program, or none in the paper")
    program = programs.PROGRAMS[name.split(",")[0]]
    values, answer, size, _ = examples(name)
    options = {"top": values[:, 1:2]} if "addition" in name else {}
    if "addition" in name:
        options["reverse"] = "forward" not in name
    found = program(values, **options)[:, :-1]
    at = np.arange(1, values.shape[1])
    scored = (at >= answer[:, None]) & (at < size[:, None])
    np.testing.assert_array_equal(found[scored], values[:, 1:][scored])


@pytest.mark.parametrize("reverse", [True, False])
def test_addition_by_itself(reverse):
    """500 pairs of 1 to 12 digits, written token by token."""
    for _ in range(500):
        digits = int(RNG.integers(1, 13))
        a, b = (int(x) for x in RNG.integers(0, 10**digits, 2))
        hints = [-100 - i for i in range(digits + 1)]

        def written(number, hints=hints):
            return [
                x
                for pair in zip(hints, map(int, f"{number:0{len(hints)}}"), strict=True)
                for x in pair
            ]

        prompt = [-1, *written(a), -2, *written(b), -3]
        pairs = list(zip(hints, map(int, f"{a + b:0{digits + 1}}"), strict=True))
        wanted = [x for pair in (pairs[::-1] if reverse else pairs) for x in pair] + [-5]
        # All next tokens at once where they are right are those of writing one by one.
        found = programs.addition(np.array(prompt + wanted), reverse)[len(prompt) - 1 : -1]
        assert found.tolist() == wanted
    assert (
        core.complete(
            functools.partial(programs.addition, reverse=reverse), prompt, end=-5
        ).tolist()
        == prompt + wanted
    )


def test_counting_by_itself():
    for a in range(41):
        for b in range(a, 41):
            answer = [*range(a, b + 1), -5]
            for question in ([-1, a, b], [-1, a, b, -3]):
                found = programs.count(np.array([*question, *answer]))
                assert found[len(question) - 1 : -1].tolist() == answer
    assert core.complete(programs.count, [-1, 3, 6], end=-5).tolist() == [-1, 3, 6, 3, 4, 5, 6, -5]


# The tasks.


def test_answers_are_right():
    for question, answer, length in questions_and_answers("count"):
        _, a, b, _ = question
        assert answer == [*range(a, b + 1), -5] and b - a + 1 == length
    for name in ("unique_copy", "repeat_copy", "sort"):
        for question, answer, length in questions_and_answers(name):
            x = question[1:-1]
            assert len(x) == length and answer == [*(sorted(x) if name == "sort" else x), -5]
            assert name == "repeat_copy" or len(set(x)) == length
    for name in ("parity", "and"):
        for question, answer, _ in questions_and_answers(name):
            bits = question[1:-1]
            assert answer == [sum(bits) % 2 if name == "parity" else min(bits), -5]
            assert name == "parity" or all(bits[len(bits) // 2 :])
    shares = [answer[0] for _, answer, length in questions_and_answers("and") if length > 1]
    assert 0.4 < np.mean(shares) < 0.6


@pytest.mark.parametrize("name", ["mode", "mode, frequency", "mode, appearance"])
def test_mode_is_unique_and_its_scratchpad_counts(name):
    for question, answer, _ in questions_and_answers(name):
        x = question[1:-1]
        kinds = list(dict.fromkeys(x))
        times = [x.count(kind) for kind in kinds]
        assert sorted(times)[-2:] != [max(times)] * 2
        if "frequency" in name:
            kinds.sort(key=lambda kind: -x.count(kind))
        pad = [y for kind in kinds for y in (x.count(kind), kind)] if "," in name else []
        assert answer == [*pad, max(kinds, key=x.count), -5]


@pytest.mark.parametrize("name", ["addition", "addition, forward", "addition, plain"])
def test_addition_is_right_with_one_run_of_carries(name):
    runs = []
    for question, answer, length in questions_and_answers(name):
        digits = [x for x in question + answer if x >= 0]
        size = length + 1
        a, b, total = digits[:size], digits[size : 2 * size], digits[2 * size :]
        total = total if name == "addition, forward" else total[::-1]
        assert a[0] == b[0] == 0
        assert [int("".join(map(str, x))) for x in (total,)] == [
            int("".join(map(str, a))) + int("".join(map(str, b)))
        ]
        sums = np.add(a, b)[::-1]
        (start,) = np.flatnonzero(sums > 9)
        nines = np.flatnonzero(sums == 9)
        assert nines.tolist() == [*range(start + 1, start + 1 + len(nines))]
        runs.append((length, 1 + len(nines)))
        if name != "addition, plain":
            hints = [x for x in question if x <= -100]
            assert hints[:size] == hints[size:] == [hints[0] - i for i in range(size)]
    longest = [run for length, run in runs if length == LONGEST]
    assert set(longest) == set(range(1, LONGEST + 1))


def test_hints_are_a_random_block_of_their_set():
    """Contiguous, within the set, every start equally often."""
    format = formats.Addition(10, hints=20)
    draw = jax.jit(jax.vmap(lambda key: format.hint_block(key, jnp.asarray(12), 12)))
    blocks = (
        np.asarray(draw(jax.random.split(jax.random.key(1), 18_000))) - FORMATS["addition"].symbols
    )
    blocks = blocks - formats.FIRST
    assert np.all(np.diff(blocks, axis=1) == 1) and blocks.min() == 0 and blocks.max() == 19
    counts = np.bincount(blocks[:, 0], minlength=9)
    assert len(counts) == 9 and abs(counts / 2000 - 1).max() < 0.1


# Packed rows.


@pytest.mark.parametrize("name", ["count", "parity_with_hints", "unique_copy"])
def test_packed_rows_hold_whole_examples_whose_answers_are_scored(name):
    format, row = FORMATS[name], 63
    packed = Packed(format, 1, LONGEST, row, reset=True)
    keys = jax.random.split(jax.random.key(2), 64)
    rings = jax.device_get(jax.jit(jax.vmap(packed.ring))(keys))
    batch = jax.device_get(jax.jit(lambda k: packed(k[0], k))(keys))
    np.testing.assert_array_equal(batch["weight"], rings.scored[:, 1:])
    whole = 0
    for tokens, segment, scored, start in zip(*rings, strict=True):
        for one in set(segment.tolist()) - {0}:
            place = np.flatnonzero(segment == one)
            assert place.tolist() == [*range(place[0], place[-1] + 1)]
            part = format.values[tokens[place]].tolist()
            if not start[place[0]]:
                assert place[0] == 0 and not scored[place].any()
                continue
            assert part[0] == -1
            if part[-1] != -5:  # the end is at the front of the row
                assert place[-1] == row
                continue
            whole += 1
            question = part.index(-3) + 1
            assert scored[place].tolist() == [False] * question + [True] * (len(part) - question)
            if name == "count":
                assert part[4:-1] == [*range(part[1], part[2] + 1)]
        assert not scored[segment == 0].any()
    assert whole > 64


def test_examples_begin_everywhere_equally_often():
    packed = Packed(FORMATS["count"], 1, LONGEST, row=31)
    ring = jax.jit(jax.vmap(packed.ring))(jax.random.split(jax.random.key(3), 20_000))
    share = np.asarray(ring.start).sum(0)
    assert share.min() > 1000 and abs(share / share.mean() - 1).max() < 0.1
    still = dataclasses.replace(packed, shift=False)
    ring = jax.jit(jax.vmap(still.ring))(jax.random.split(jax.random.key(3), 100))
    assert np.asarray(ring.start)[:, 0].all() and not np.asarray(ring.segment[:, -1] > 99).any()


def test_segments_hide_other_examples():
    """With "reset" a token's logits are those of its example alone at the same positions."""
    recipe = load("rasp_length:tiny", data__reset=True, model__position="none")
    state = new_state(recipe, jax.random.key(0))
    data = recipe.phases[0].data
    batch = data.draw(data.batch(0))
    task = recipe.task
    predict = jax.jit(functools.partial(task.predict, key=jax.random.key(0)))
    together = predict(state.params, state.extra, batch)[0]
    segment = np.asarray(batch["segment"][0])
    (first, last) = np.flatnonzero(segment == segment[len(segment) // 2])[[0, -1]]
    alone = (
        jnp.zeros_like(batch["tokens"][:1])
        .at[0, : last - first]
        .set(batch["tokens"][0, first:last])
    )
    found = predict(state.params, state.extra, {"tokens": alone})[0]
    np.testing.assert_allclose(found[: last - first], together[first:last], atol=1e-5)


# The sweep.


def test_sweep_counts_whole_answers():
    class Knows:
        """The true tokens, but for one of each answer's in half of the rows."""

        def predict(self, params, extra, batch, *, key):
            del params, extra, key
            right = jax.nn.one_hot(batch["tokens"][:, 1:], 6)
            lost = jnp.zeros(right.shape[:2], bool).at[::2, 3].set(True)
            return jnp.where(lost[..., None], jnp.roll(right, 1, -1), right)

    # START x > y END: the answer is predicted at columns 2 and 3.
    sweep = LengthSweep(Knows(), lambda n: DeviceData(Alone(formats.Parity(2), n, 8), 16), (1,), 3)
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        found = sweep(NO_STATE, EvalContext(mesh, "end"))
    assert found == {"exact_1": 0.5, "token_1": 0.75}


NO_STATE = TrainState(*[jnp.zeros(())] * 5)


def test_exact_match_is_what_greedy_decoding_writes():
    """One pass over true answers finds the rows that decoding token by token gets right."""
    recipe = load("rasp_length:tiny")
    state, task = new_state(recipe, jax.random.key(0)), recipe.task
    rows = 16
    data = DeviceData(Alone(formats.Parity(2), 3, recipe.config["data"]["row"]), rows)
    batch = jax.device_get(data.draw(data.batch(0)))
    tokens, weight = np.array(batch["tokens"]), batch["weight"]
    begin = int(np.flatnonzero(weight[0])[0]) + 1
    prompts = [row[:begin].tolist() for row in tokens]
    settings = {"length": 2, "key": jax.random.key(1), "temperature": 0.0}
    written = np.array(generate(task, state.params, state.extra, prompts, **settings))
    tokens[::2, begin : begin + 2] = written[::2]  # that some are right
    tokens[::4, begin + 1] += 1  # and some only at first
    logits = task.predict(state.params, state.extra, {"tokens": tokens}, key=jax.random.key(0))
    found = exact_match(logits, tokens[:, 1:], weight)
    right = (written == tokens[:, begin : begin + 2]).all(1)
    assert found.astype(bool).tolist() == right.tolist() and 0 < right.sum() < rows


# What is refused.


def test_bad_input_is_named():
    x = np.array([-1, 2, 3])
    with pytest.raises(ConfigError, match="count: an empty sequence"):
        programs.count([])
    with pytest.raises(ConfigError, match="sort: tokens from -1 to 300"):
        programs.sort(np.array([-1, 300]))
    peeking = core.program(lambda x: core.sel_width(core.select(x, x, library.equals, False)))
    with pytest.raises(ConfigError, match="causal=False"):
        peeking(x)
    assert core.sel_width(core.select(x, x, library.equals, False)).tolist() == [1, 1, 1]
    with pytest.raises(ConfigError, match=r"aggr.reduction='median'"):
        core.aggr(np.eye(3, dtype=bool), x, reduction="median")
    for overrides, says in (
        ({"data__task": "addition", "data__hints": 5, "data__longest": 5}, "data.hints=5"),
        ({"data__task": "unique_copy", "data__symbols": 3}, "data.symbols=3"),
        ({"data__longest": 40, "data__symbols": 40}, "data.row=.*: an example of length 40"),
        ({"data__task": "subtraction"}, "data.task='subtraction'"),
        ({"data__task": "mode", "data__scratchpad": "yes"}, "data.scratchpad='yes'"),
        ({"data__shortest": 9}, "data.shortest=9"),
        ({"data__lengths": (4, 16)}, "data.row=16: an example of length 16"),
    ):
        with pytest.raises(ConfigError, match=says):
            load("rasp_length:tiny", **overrides)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_built(task):
    recipe = load("rasp_length:tiny", data__task=task, data__row=64)
    batch = jax.eval_shape(recipe.phases[0].data.draw, recipe.phases[0].data.spec())
    assert batch["tokens"].shape == (recipe.config["batch_size"], 65)
