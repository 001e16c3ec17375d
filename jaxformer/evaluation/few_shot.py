"""A model that reads demonstrations beside the same model trained on them.

In context: p(. | d_1 .. d_N, query). By descent: the parameters are trained on the demonstrations,
each alone and for its label only, and then asked for p(. | query), without any demonstration. The
two answers are compared by accuracy, by their likeliest tokens, and by how they react to another
order of the demonstrations (Shen, Mishra, Khashabi, arXiv 2310.08540).

Probabilities are (queries, V), over the whole vocabulary. Everything but the building of prompts is
a pure function of arrays.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer import paths
from jaxformer.errors import ConfigError
from jaxformer.recipe import Batch, Extra, Params, TrainState
from jaxformer.train.optim import Group
from jaxformer.train.updates import GradientUpdate

Array = jax.Array


class Encodes(Protocol):
    """A tokenizer, as far as labels need one."""

    def encode(self, text: str) -> Sequence[int] | np.ndarray: ...


class Shot(NamedTuple):
    """One example: the tokens of its prompt, T(x, .), and the one token of its label."""

    prompt: Sequence[int]
    label: int


class Prompts(NamedTuple):
    """Token sequences, filled up on the right, and where each of them ends."""

    tokens: np.ndarray  # (Q, L) int32
    last: np.ndarray  # (Q,) int32: the place of the last token


def label_token(tokenizer: Encodes, word: str, *, first: bool = False) -> int:
    """The token of a label word, as it follows a prompt (give it with its leading space).

    Raises:
        ConfigError: it is several tokens, unless `first` asks for the first of them.
    """
    tokens = [int(token) for token in tokenizer.encode(word)]
    if len(tokens) != 1 and not (first and tokens):
        raise ConfigError(
            f"label: {word!r} is {len(tokens)} tokens; take a word of one, or first=True"
        )
    return tokens[0]


@dataclasses.dataclass(frozen=True)
class FewShot:
    """Demonstrations, queries, and the tokens between two examples of a prompt.

    `context` is the most tokens that the model reads, `begin` what stands in front of all that it
    reads, in training too.
    """

    demonstrations: Sequence[Shot]
    queries: Sequence[Shot]
    separator: Sequence[int]
    context: int
    begin: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name in ("demonstrations", "queries"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: none; give at least one")
        self.prompts(range(len(self.demonstrations)))

    @property
    def labels(self) -> np.ndarray:
        """Of the queries, (Q,)."""
        return np.array([query.label for query in self.queries], np.int32)

    def prompts(self, order: Sequence[int]) -> Prompts:
        """The demonstrations in `order`, then each query; none of them for the order ()."""
        start = list(self.begin)
        for index in order:
            prompt, label = self.demonstrations[index]
            start += [*prompt, label, *self.separator]
        rows = [[*start, *query.prompt] for query in self.queries]
        longest = max(map(len, rows))
        if longest > self.context:
            raise ConfigError(
                f"context: {longest} tokens of a prompt, the model reads {self.context}; give "
                "fewer demonstrations or shorter ones"
            )
        return _filled(rows)

    def examples(self) -> Batch:
        """Each demonstration alone, for training: the weight is 1 on its label and 0 elsewhere."""
        rows = [[*self.begin, *prompt, label] for prompt, label in self.demonstrations]
        tokens, last = _filled(rows)
        weight = np.arange(tokens.shape[1] - 1) == last[:, None] - 1
        return {"tokens": tokens, "weight": weight.astype(np.float32)}


def _filled(rows: Sequence[Sequence[int]]) -> Prompts:
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, values in zip(tokens, rows, strict=True):
        row[: len(values)] = values
    return Prompts(tokens, np.array([len(row) - 1 for row in rows], np.int32))


def orders(count: int, demonstrations: int, seed: int = 0) -> np.ndarray:
    """`count` different orders of N demonstrations, (count, N).

    Raises:
        ConfigError: there are not so many.
    """
    if count > (most := math.factorial(demonstrations)):
        raise ConfigError(
            f"orders: {demonstrations} demonstrations have {most} orders, {count} are asked for"
        )
    draw, found = np.random.default_rng(seed), dict[tuple[int, ...], None]()
    while len(found) < count:
        found[tuple(map(int, draw.permutation(demonstrations)))] = None
    return np.array(list(found), np.int32)


def answers(
    task: Any, params: Params, extra: Extra, prompts: Prompts, rows: int | None = None
) -> Array:
    """P (Q, V) of the token after each prompt, `rows` prompts at a time; a `LanguageTask`'s."""

    def read(prompts: Prompts) -> Array:
        # Its batches have one token more than is read.
        batch = {"tokens": jnp.pad(prompts.tokens, ((0, 0), (0, 1)))}
        logits = task.predict(params, extra, batch, key=jax.random.key(0))
        chosen = logits[jnp.arange(len(prompts.last)), prompts.last]
        return jax.nn.softmax(chosen.astype(jnp.float32), axis=-1)

    prompts = Prompts(*map(jnp.asarray, prompts))
    count = len(prompts.last)
    if rows is None or rows >= count:
        return read(prompts)
    # The whole (Q, L, V) of a large vocabulary is never there; the last part is filled up.
    parts = jax.tree.map(
        lambda x: jnp.pad(x, [(0, -count % rows), *[(0, 0)] * (x.ndim - 1)]).reshape(
            -1, rows, *x.shape[1:]
        ),
        prompts,
    )
    p = jax.lax.map(read, parts)
    return p.reshape(-1, p.shape[-1])[:count]


def descend(
    update: GradientUpdate,
    params: Params,
    extra: Extra,
    examples: Batch,
    order: Array,
    observe: Callable[[Params, Extra], Any],
    *,
    epochs: int,
    rows: int,
) -> Any:
    """What `observe(params, extra)` sees before training and after each epoch: (epochs + 1, ...).

    Every epoch goes through `examples` in `order` (N,), `rows` at a time; with rows = N it is
    full-batch. Always from the given parameters and a new optimiser, so runs do not mix; map it
    over orders. A model must be deterministic in training: dropout 0.

    Raises:
        ConfigError: rows does not divide the number of examples.
    """
    count = order.shape[-1]
    if rows < 1 or count % rows:
        raise ConfigError(f"rows: {rows} does not divide the {count} examples")
    start = TrainState(jnp.zeros((), jnp.int32), params, extra, {}, jax.random.key(0))
    examples = jax.tree.map(jnp.asarray, dict(examples))

    def step(state: TrainState, index: Array) -> tuple[TrainState, None]:
        return update(state, jax.tree.map(lambda x: x[index], examples))[0], None

    def epoch(state: TrainState, _: None) -> tuple[TrainState, Any]:
        state, _ = jax.lax.scan(step, state, order.reshape(-1, rows))
        return state, observe(state.params, state.extra)

    _, seen = jax.lax.scan(epoch, update.init(start), length=epochs)
    before = observe(params, extra)
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), before, seen)


def only(pattern: str) -> tuple[Group, Group]:
    """Optimiser groups that train the parameters whose names match, and leave the others alone."""
    return Group(pattern), Group(rf"^(?!.*(?:{pattern}))", frozen=True)


# What is compared.


def sensitivity(p: Array) -> Array:
    """How far p (R, Q, V) depends on the order: standard deviations over R orders.

    Summed over the vocabulary, the mean over queries.
    """
    return jnp.std(p, axis=0).sum(-1).mean()


def accuracy(p: Array, labels: Array, among: Array | None = None) -> Array:
    """The share of queries whose likeliest token, of all or `among` (k,), is their label (Q,)."""
    chosen = p.argmax(-1) if among is None else jnp.asarray(among)[p[:, among].argmax(-1)]
    return jnp.mean(chosen == labels)


def token_overlap(p: Array, q: Array, k: int = 10) -> Array:
    """The share of the k likeliest tokens that p and q (Q, V) have in common, the mean over Q."""
    return jnp.mean((_likeliest(p, k) & _likeliest(q, k)).sum(-1) / k)


def overlap_cosine(
    p: Array, q: Array, k: int = 10, penalty: Literal["none", "product", "topk"] = "product"
) -> Array:
    """The cosine of p and q (Q, V) on the tokens O that are among the k likeliest of both.

    The mean over Q; 0 where O is empty. `penalty` is what makes a small O count less: "product",
    |O| being n, multiplies the squared norms by max(1, k - n) under the root; "topk" takes each
    norm over the k of its own side; "none" nothing. The paper's own placement is not established.
    """
    if penalty not in ("none", "product", "topk"):
        raise ConfigError(f"penalty={penalty!r}: must be one of none, product, topk")
    of_p, of_q = _likeliest(p, k), _likeliest(q, k)
    both = of_p & of_q
    own = (of_p, of_q) if penalty == "topk" else (both, both)
    size_p, size_q = (
        jnp.sum(jnp.where(m, x, 0) ** 2, -1) for m, x in zip(own, (p, q), strict=True)
    )
    factor = jnp.maximum(1, k - both.sum(-1)) if penalty == "product" else 1
    square = size_p * size_q * factor
    dot = jnp.sum(jnp.where(both, p * q, 0), -1)
    return jnp.mean(jnp.where(square > 0, dot / jnp.sqrt(jnp.where(square > 0, square, 1)), 0))


def _likeliest(p: Array, k: int) -> Array:
    """Which tokens are the k likeliest, (Q, V) bool; exactly k of them."""
    if not 1 <= k <= p.shape[-1]:
        raise ConfigError(f"k: {k} of a vocabulary of {p.shape[-1]}; give 1 to {p.shape[-1]}")
    _, index = jax.lax.top_k(p, k)
    return jax.nn.one_hot(index, p.shape[-1], dtype=bool).any(-2)


def sparsity(
    params: Params, pattern: str, below: Sequence[float] = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
) -> Mapping[float, float]:
    """{delta: share of entries with |w| < delta}, the mean over the leaves that match `pattern`.

    Raises:
        ConfigError: none does.
    """
    leaves = [np.abs(x) for name, x in paths.leaves(params).items() if re.search(pattern, name)]
    if not leaves:
        raise ConfigError(f"pattern: {pattern!r} fits no parameter")
    return {delta: float(np.mean([np.mean(leaf < delta) for leaf in leaves])) for delta in below}
