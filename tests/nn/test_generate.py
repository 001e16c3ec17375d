"""Sampling: the exact distribution, ragged batches, stopping, streaming, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.errors import ConfigError
from jaxformer.models.lm import decoder_lm
from jaxformer.models.transformer import Transformer
from jaxformer.sampling.autoregressive import Sampler, generate
from jaxformer.tasks.language import LanguageTask

KEY = jax.random.key(0)


class Letters:
    """a = 0, b = 1, ..."""

    def encode(self, text):
        return [ord(c) - ord("a") for c in text]

    def decode(self, tokens):
        return "".join(chr(ord("a") + t) for t in tokens)


TASK = LanguageTask(
    decoder_lm(Transformer(width=16, depth=1, heads=2), vocabulary=9, length=24, tied=False),
    Letters(),
)
# Three times the usual weights: an untrained model whose tokens depend on the prompt.
PARAMS = jax.tree.map(
    lambda x: 3.0 * x,
    jax.jit(lambda: TASK.init(KEY, {"tokens": np.zeros((1, 4), int)})[0])(),
)


def run(prompts, length=5, temperature=0.0, key=KEY, **options):
    return generate(
        TASK, PARAMS, {}, prompts, length=length, temperature=temperature, key=key, **options
    )


def distribution(logits, temperature, top_k, top_p):
    """The definition, one row at a time."""
    logits = np.asarray(logits, np.float64) / temperature
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k]
    p = np.exp(logits[order] - logits[order[0]])
    p /= p.sum()
    if top_p is not None:
        fewest = next(n for n in range(1, len(p) + 1) if n == len(p) or p[:n].sum() >= top_p)
        order, p = order[:fewest], p[:fewest] / p[:fewest].sum()
    full = np.zeros(len(logits))
    full[order] = p
    return full


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("top_k", [None, 1, 3, 50])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.6, 0.95])
def test_the_restricted_distribution_is_exact(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 2, (6, 12))
    logits[4] = np.repeat([1.0, 0.0, -1.0], 4)  # ties: the lower token goes first
    restricted = Sampler(temperature, top_k, top_p).restrict(jnp.asarray(logits))
    expected = [distribution(row, temperature, top_k, top_p) for row in np.float32(logits)]
    np.testing.assert_allclose(jax.nn.softmax(restricted), expected, atol=2e-6)
    assert ((np.asarray(restricted) == -np.inf) == (np.asarray(expected) == 0)).all()


def test_draws_follow_the_distribution():
    logits = jnp.asarray([2.0, 1.0, 0.0, -1.0, 1.5])
    sampler = Sampler(0.8, top_k=4, top_p=0.95)
    n = 20_000
    keys = jax.random.split(KEY, n)
    drawn = sampler.draw(keys, jnp.broadcast_to(logits, (n, 5)))
    expected = n * distribution(logits, 0.8, 4, 0.95)
    found = np.bincount(drawn, minlength=5)
    assert (found[expected == 0] == 0).all()
    kept = expected > 0
    chi2 = ((found - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi2 < 20  # 3 or fewer degrees of freedom: passed by chance with 1 - 2e-4


def test_greedy_draws_are_those_of_the_restricted_distribution():
    logits = jnp.asarray(np.random.default_rng(0).integers(0, 3, (64, 9)), jnp.float32)  # ties
    greedy = Sampler(temperature=0.0)
    drawn = greedy.draw(jax.random.split(KEY, 64), logits)
    np.testing.assert_array_equal(drawn, greedy.restrict(logits).argmax(-1))


def test_greedy_generation_is_the_argmax_of_the_whole_model():
    prompts = [[1, 2, 3, 4, 5], [7], [0, 8, 3]]
    completions = run(prompts)
    forward = jax.jit(lambda tokens: TASK.model.apply({"params": PARAMS}, tokens))
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = list(prompt)
        for _ in range(5):
            padded = jnp.asarray([tokens + [0] * (10 - len(tokens))])
            tokens.append(int(forward(padded)[0, len(tokens) - 1].argmax()))
        assert completion == tokens[len(prompt) :]
    assert len({token for completion in completions for token in completion}) > 3


def test_a_completion_does_not_depend_on_its_neighbours():
    options = {"temperature": 1.3, "top_k": 6, "top_p": 0.9}
    first, second = ([3, 1, 4, 1], [5, 8]), ([3, 1, 4, 1], [2, 0])
    together, other = run(first, **options), run(second, **options)
    assert together[0] == other[0] == run(first[:1], **options)[0]
    assert run(first, key=jax.random.key(9), **options) != together
    assert run(first, **options) == together


def test_text_comes_back_as_text():
    assert run(["abc"]) == [Letters().decode(run([[0, 1, 2]])[0])]


def test_generation_ends_with_a_stop_token_row_by_row():
    prompts = [[1, 2, 3], [7, 7]]
    free = run(prompts, length=8, stop=[-1])
    stop = free[0][2]
    ended = run(prompts, length=8, stop=[stop])
    for row, cut in zip(free, ended, strict=True):
        assert cut == row[: row.index(stop) + 1 if stop in row else 8]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streaming_tells_every_token_in_order(temperature):
    prompts = [[1, 2, 3], [7], [5, 0, 2, 8, 1]]
    heard = [[], [], []]
    options = {"temperature": temperature, "stop": [4]}
    streamed = run(prompts, on_token=lambda row, token: heard[row].append(token), **options)
    assert streamed == run(prompts, **options)
    assert heard == streamed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length=0: must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0: must be finite and at least 0"),
        ({"top_k": 0}, "top_k=0: must be at least 1"),
        ({"top_p": 1.5}, r"top_p=1.5: must be in \(0, 1\]"),
        ({"prompts": []}, "prompts: none given"),
        ({"prompts": [[1], []]}, "prompts: number 1 is empty"),
        ({"length": 24}, r"LearnedPosition\.length=24: shorter than a sequence of 25"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        run(**{"prompts": [[1, 2]], **options})


def test_a_task_that_cannot_generate_is_refused():
    with pytest.raises(ConfigError, match="task: object does not generate; it needs the methods"):
        generate(object(), {}, {}, [[1]], length=1, key=KEY)
