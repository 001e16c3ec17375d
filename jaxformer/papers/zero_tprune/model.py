"""Zero-TPrune: tokens ranked by the attention graph, and dropped without any training.

Symbols of the paper: A (H, N, N) is softmax attention, s (N,) the score of each token, rho the
share that the I-stage keeps, r the number of tokens that the S-stage removes, VHF the
variance-based head filter, EIR the emphasising informative region aggregation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.compress.tokens import (
    Seen,
    keep_best,
    kept_count,
)
from jaxformer.errors import ConfigError

# ------------------------------------------------------------------------- weighted page rank


def page_rank(
    a_BxHxNxN: jax.Array,
    start_BxN: jax.Array,
    iterations: int,
    *,
    alive_BxN: jax.Array | None = None,
    damping: float = 0.0,
) -> jax.Array:
    """WPR (section 3.2): s^t = A^T s^(t-1) from s^0 = start, for each head; (B, H, N) float32.

    Every token votes for those it attends to, with the weight of its own score. Only tokens that
    are `alive` can be voted for, rows being normalised over them. With `damping` d,
    s^t = (1 - d) A^T s^(t-1) + d / N.

    Raises:
        ConfigError: rows of A, where they can be seen, do not sum to 1.
    """
    a_BxHxNxN = a_BxHxNxN.astype(jnp.float32)
    check_rows(a_BxHxNxN)
    batch, heads, tokens, _ = a_BxHxNxN.shape
    alive = jnp.ones((batch, tokens)) if alive_BxN is None else alive_BxN.astype(jnp.float32)
    weight_BxHxN = 1.0
    if alive_BxN is not None:  # the restricted graph, without a copy of it
        total_BxHxN = jnp.einsum("BHIJ,BJ->BHI", a_BxHxNxN, alive)
        weight_BxHxN = 1 / jnp.where(total_BxHxN == 0, 1.0, total_BxHxN)

    def vote(_: int, s_BxHxN: jax.Array) -> jax.Array:
        s_BxHxN = jnp.einsum("BHIJ,BHI->BHJ", a_BxHxNxN, s_BxHxN * weight_BxHxN)
        return ((1 - damping) * s_BxHxN + damping / tokens) * alive[:, None]

    start = jnp.broadcast_to(start_BxN[:, None], (batch, heads, tokens)).astype(jnp.float32)
    s_BxHxN = jax.lax.fori_loop(0, iterations, vote, start)
    if damping:
        return s_BxHxN
    # Rows sum to 1 but for rounding, of which 50 votes make 2.5e-6 of all (measured).
    return s_BxHxN * (start.sum(-1, keepdims=True) / s_BxHxN.sum(-1, keepdims=True))


def check_rows(a_BxHxNxN: jax.Array) -> None:
    """Raise a `ConfigError` if rows of a concrete A do not sum to 1, within 1e-3."""
    if isinstance(a_BxHxNxN, jax.core.Tracer):
        return
    off = float(jnp.abs(a_BxHxNxN.sum(-1) - 1).max())
    if not off <= 1e-3:
        raise ConfigError(
            f"page_rank.a: rows sum to 1 but for {off:.3g}; pass probabilities, after softmax"
        )


# --------------------------------------------------------------------------- one score of heads


class Aggregate(Protocol):
    """Scores of heads (B, H, N), of mean 1 over the tokens, as one (B, N)."""

    def __call__(self, s_BxHxN: jax.Array, counted_BxN: jax.Array) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class MeanOfHeads:
    """The plain mean: "WPR only"."""

    def __call__(self, s_BxHxN: jax.Array, counted_BxN: jax.Array) -> jax.Array:
        del counted_BxN
        return s_BxHxN.mean(1)


@dataclasses.dataclass(frozen=True)
class EIR:
    """sqrt of the mean square over heads (section 3.2), those of an odd variance left out.

    VHF leaves out heads whose scores vary over the counted tokens by less than `least` or by more
    than `most`; an image of which no head is left has all of them. `EIR(0, inf)` is without VHF.
    """

    least: float = 0.01
    most: float = 0.7

    def __call__(self, s_BxHxN: jax.Array, counted_BxN: jax.Array) -> jax.Array:
        eta_BxH = self.heads(s_BxHxN, counted_BxN)
        total = jnp.einsum("BHN,BH->BN", jnp.square(s_BxHxN), eta_BxH)
        return jnp.sqrt(total / eta_BxH.sum(1, keepdims=True))

    def heads(self, s_BxHxN: jax.Array, counted_BxN: jax.Array) -> jax.Array:
        """Which heads count: eta (B, H), 1 or 0."""
        counted = counted_BxN[:, None].astype(jnp.float32)
        count = counted.sum(-1, keepdims=True)
        mean = (s_BxHxN * counted).sum(-1, keepdims=True) / count
        variance = (jnp.square(s_BxHxN - mean) * counted).sum(-1) / count[..., 0]
        eta = ((variance >= self.least) & (variance <= self.most)).astype(jnp.float32)
        return jnp.where(eta.sum(1, keepdims=True) == 0, 1.0, eta)


@dataclasses.dataclass(frozen=True)
class Importance:
    """WPR and an aggregation of heads: the score of every token.

    `boost` starts the first class token at sqrt(N) times any other; all start alike without it, or
    without a class token ("Zero-TPrune-uni").
    """

    iterations: int
    boost: bool = True
    aggregate: Aggregate = EIR()

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ConfigError(f"prune.iterations={self.iterations}: must be at least 1")

    def __call__(self, seen: Seen, alive_BxN: jax.Array | None = None) -> jax.Array:
        """(B, N); 0 for what is not alive."""
        batch, _, tokens, _ = seen.p_BxHxNxN.shape
        alive = jnp.ones((batch, tokens), bool) if alive_BxN is None else alive_BxN
        start = alive.astype(jnp.float32)
        if self.boost and seen.protected:
            start = start.at[:, 0].multiply(tokens**0.5)
        start = start / start.sum(-1, keepdims=True)
        s = page_rank(seen.p_BxHxNxN, start, self.iterations, alive_BxN=alive_BxN)
        s = s * alive.sum(-1)[:, None, None]  # thresholds of variances are for a mean of 1
        return self.aggregate(s, alive & (jnp.arange(tokens) >= seen.protected))


# ------------------------------------------------------------------- similarity of two groups

Metric = Callable[[jax.Array, jax.Array], jax.Array]  # (B, M, F), (B, N, F) -> (B, M, N)


def dot(a_BxMxF: jax.Array, b_BxNxF: jax.Array) -> jax.Array:
    return jnp.einsum("BMF,BNF->BMN", a_BxMxF, b_BxNxF)


def cosine(a_BxMxF: jax.Array, b_BxNxF: jax.Array) -> jax.Array:
    return dot(
        *(x / jnp.linalg.norm(x, axis=-1, keepdims=True).clip(1e-12) for x in (a_BxMxF, b_BxNxF))
    )


@dataclasses.dataclass(frozen=True)
class Distance:
    """The negative distance of order p, which may be infinite."""

    p: float = 2.0

    def __call__(self, a_BxMxF: jax.Array, b_BxNxF: jax.Array) -> jax.Array:
        def row(a_BxF: jax.Array) -> jax.Array:
            return -jnp.linalg.norm(b_BxNxF - a_BxF[:, None], ord=self.p, axis=-1)

        # One row at a time: all differences at once would be M times as much memory.
        return jax.lax.map(row, a_BxMxF.swapaxes(0, 1)).swapaxes(0, 1)


METRICS: dict[str, Metric] = {
    "cosine": cosine,
    "dot": dot,
    "l1": Distance(1.0),
    "l2": Distance(2.0),
    "lp": Distance(3.0),
    "linf": Distance(float("inf")),
}
FEATURES: dict[str, Callable[[Seen], jax.Array]] = {
    "key": lambda seen: seen.k_BxNxGxK,
    "query": lambda seen: seen.q_BxNxHxK,
    "value": lambda seen: seen.v_BxNxGxK,
    "before": lambda seen: seen.before_BxNxD,
    "after": lambda seen: seen.after_BxNxD,
}


def halves(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(count // 2), np.arange(count // 2, count)


def unimportant(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequential-U: candidates are the less important half; places are of ascending importance."""
    return halves(count)


def important(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequential-I: candidates are the more important half."""
    less, more = halves(count)
    return more, less


def alternate(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Every second token is a candidate, beginning with the first."""
    return np.arange(0, count, 2), np.arange(1, count, 2)


def shuffled(count: int) -> tuple[np.ndarray, np.ndarray]:
    """A random half, always the same places, are candidates."""
    order = np.random.default_rng(0).permutation(count)
    return np.sort(order[: count // 2]), np.sort(order[count // 2 :])


def everyone(count: int) -> tuple[np.ndarray, np.ndarray]:
    """No partition: all are candidates, and compared with all others."""
    return np.arange(count), np.arange(count)


PARTITIONS: dict[str, Callable[[int], tuple[np.ndarray, np.ndarray]]] = {
    "seq_u": unimportant,
    "seq_i": important,
    "alternate": alternate,
    "random": shuffled,
    "none": everyone,
}


@dataclasses.dataclass(frozen=True)
class SStage:
    """Which `removed` tokens of group A are most like one of group B (section 3.3).

    The groups are of the free tokens in the order of ascending `order`, a score, or in the order
    of their places if it is None, where "alternate" is the matching of ToMe (arXiv 2210.09461).
    """

    removed: int
    order: Importance | None = Importance(1)  # the I'-stage: one vote
    feature: str = "key"
    metric: str = "cosine"
    partition: str = "seq_u"

    def __post_init__(self) -> None:
        for field, table in (("feature", FEATURES), ("metric", METRICS), ("partition", PARTITIONS)):
            value = getattr(self, field)
            if value not in table:
                allowed = ", ".join(table)
                raise ConfigError(f"prune.{field}={value!r}: must be one of {allowed}")
        if self.removed < 0:
            raise ConfigError(f"prune.removed={self.removed}: must be at least 0")

    def __call__(self, seen: Seen) -> jax.Array:
        """(B, N) bool: what is left alive.

        Raises:
            ConfigError: group A has too few tokens.
        """
        batch, tokens = seen.after_BxNxD.shape[:2]
        group_a, group_b = PARTITIONS[self.partition](seen.free)
        if self.removed and self.removed >= len(group_a):
            raise ConfigError(
                f"prune.removed={self.removed}: must be less than the {len(group_a)} of "
                f"{seen.free} tokens that can be removed"
            )
        alive_BxN = jnp.ones((batch, tokens), bool)
        if not self.removed:
            return alive_BxN
        order_BxF = jnp.broadcast_to(jnp.arange(seen.free), (batch, seen.free))
        if self.order is not None:
            scores = self.order(seen)[:, seen.protected :]
            order_BxF = jnp.argsort(scores, axis=-1, stable=True)
        order_BxF = order_BxF + seen.protected
        a_BxM, b_BxM = order_BxF[:, group_a], order_BxF[:, group_b]
        feature = FEATURES[self.feature](seen).reshape(batch, tokens, -1).astype(jnp.float32)
        a, b = (jnp.take_along_axis(feature, i[..., None], axis=1) for i in (a_BxM, b_BxM))
        similarity = METRICS[self.metric](a, b)
        if self.partition == "none":
            similarity = jnp.where(jnp.eye(len(group_a), dtype=bool), -jnp.inf, similarity)
        _, most_BxR = jax.lax.top_k(similarity.max(-1), self.removed)
        gone_BxR = jnp.take_along_axis(a_BxM, most_BxR, axis=1)
        return alive_BxN.at[jnp.arange(batch)[:, None], gone_BxR].set(False)


# ------------------------------------------------------------------------------- the pruning layer


@dataclasses.dataclass(frozen=True)
class ZeroTPrune:
    """I' -> S -> I: redundant tokens go first, then of the others the least important.

    rho = 1 leaves the removal to the S-stage, a `similar` that removes 0 to the I-stage. The
    I-stage sees the graph of the survivors, or the whole graph with `restrict=False`.
    """

    keep: float  # rho
    similar: SStage
    importance: Importance
    restrict: bool = True

    def __post_init__(self) -> None:
        kept_count(self.keep, 10**6)

    def __call__(self, seen: Seen) -> jax.Array:
        left = seen.free - self.similar.removed
        count = kept_count(self.keep, left)
        alive_BxN = self.similar(seen)
        if count == left:  # what is alive, in its order
            return keep_best(alive_BxN.astype(jnp.float32), left, seen.protected)
        whole = not self.restrict or not self.similar.removed
        scores_BxN = self.importance(seen, None if whole else alive_BxN)
        scores_BxN = jnp.where(alive_BxN, scores_BxN, -jnp.inf)
        return keep_best(scores_BxN, count, seen.protected)
