"""An encoder of queries whose positions and attention follow their logic (section 5).

score_ij = (q_i . k_j + q_i . a_{j-i} + q_i . b^{(t_i, t_j)}_{j-i}) / sqrt(d) + gamma_h M_ij: t is
the kind of a token, M what the parse relates it to. With b = 0 and gamma = 0, where training
starts, it is the encoder with relative keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import KeyPadding, PerHead, PerK, PerQ, Tile
from jaxformer.models.transformer import Transformer, require
from jaxformer.nn.attention import Attention
from jaxformer.nn.dropout import Dropout
from jaxformer.nn.embed import Embed
from jaxformer.nn.heads import DensePool
from jaxformer.nn.make import Make
from jaxformer.nn.norm import LayerNorm
from jaxformer.nn.position import At, Mods, RoPE
from jaxformer.nn.relative_key import Disentangled, LayerScheme, RelativeKey, Together
from jaxformer.papers.tega.tokens import FIRST_ENTITY, KINDS, PAD, VARIABLES, Vocabulary
from jaxformer.parallel.sharding import constrain
from jaxformer.recipe import Batch, Extra, LossOutput, Mean, Params
from jaxformer.tasks import linen
from jaxformer.tasks.losses import cross_entropy, is_correct

POSITIONS = ("ape", "rpe", "dpe", "rope", "none")
GUIDES = ("none", "soft", "hard", "half", "distance")
HIDDEN = -1e9  # a score that no softmax sees


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Parse:
    """What the parse says of each token: its kind (B, L), its span (B, L, 2), its variable (B, L).

    The variable is its token, or -1 for what is none.
    """

    kinds: jax.Array
    spans: jax.Array
    variables: jax.Array


def parse_of(tokens_BxL: jax.Array, spans_BxLx2: jax.Array, kinds_V: np.ndarray) -> Parse:
    """From tokens and their spans, by the kinds of the vocabulary."""
    variable = jnp.isin(tokens_BxL, jnp.asarray(VARIABLES))
    kinds = jnp.take(jnp.asarray(kinds_V), tokens_BxL)
    return Parse(kinds, spans_BxLx2, jnp.where(variable, tokens_BxL, -1))


@dataclasses.dataclass(frozen=True, eq=False)
class GuideScheme:
    """exp(gamma_h M_ij) times the kernel of softmax, or in `hard` heads the kernel where M is 1.

    M is made of spans, tile by tile: it takes no quadratic memory.
    """

    parse: Parse
    gamma: jax.Array  # (H,)
    hard: jax.Array  # (H,) 1.0 for heads that M masks

    def mods(self, heads: int, at: At) -> Mods:
        del heads, at
        spans = self.parse.spans[:, None]
        aux = {
            "start": PerQ(spans[..., 0]),
            "end": PerQ(spans[..., 1]),
            "q": PerQ(self.parse.variables[:, None]),
            "k": PerK(self.parse.variables[:, None]),
            "gamma": PerHead(self.gamma),
            "hard": PerHead(self.hard),
        }
        return Mods(_guide, aux=aux)


def _guide(score: jax.Array, at: Any, aux: Mapping[str, jax.Array]) -> jax.Array:
    inside = (aux["start"] <= at.k) & (at.k < aux["end"])
    same = (aux["q"] == aux["k"]) & (aux["q"] >= 0)
    m = inside | same | (at.q == at.k)
    # The first token is what is read out: it sees everything.
    hidden = (aux["hard"] > 0) & ~m & (at.q > 0)
    return jnp.where(hidden, HIDDEN, score + jnp.where(m, aux["gamma"], 0.0))


class Guide(nn.Module):
    """A gamma for each head; of `masked` of them M is a mask instead, the first ones."""

    heads: int
    masked: int = 0

    @nn.compact
    def __call__(self, parse: Parse) -> GuideScheme:
        hard = (jnp.arange(self.heads) < self.masked).astype(jnp.float32)
        gamma = jnp.zeros((self.heads,), jnp.float32)
        if self.masked < self.heads:
            gamma = self.param("gamma", jax.nn.initializers.zeros, (self.heads,), jnp.float32)
        return GuideScheme(parse, gamma, hard)


@dataclasses.dataclass(frozen=True, eq=False)
class DistanceScheme:
    """A bias by how many levels of parentheses lie up and down between two tokens: (H, U, U)."""

    inside: jax.Array  # (B, L, L): whether token i is between the parentheses that open at j
    table: jax.Array

    def mods(self, heads: int, at: At) -> Mods:
        del heads, at
        inside = self.inside.astype(jnp.float32)
        both = jnp.einsum("BLP,BSP->BLS", inside, inside)
        depth = inside.sum(-1)
        most = self.table.shape[-1] - 1
        up, down = (
            jnp.clip(x - both, 0, most).astype(jnp.int32)
            for x in (depth[:, :, None], depth[:, None, :])
        )
        return Mods(_add, aux={"bias": Tile(jnp.moveaxis(self.table[:, up, down], 0, 1))})


def _add(score: jax.Array, at: Any, aux: Mapping[str, jax.Array]) -> jax.Array:
    del at
    return score + aux["bias"]


class Distance(nn.Module):
    """Directed distances in the parse tree, up to `longest` levels each way, as biases of heads."""

    heads: int
    longest: int = 4

    @nn.compact
    def __call__(self, parse: Parse) -> DistanceScheme:
        shape = (self.heads, self.longest + 1, self.longest + 1)
        table = self.param("table", jax.nn.initializers.zeros, shape, jnp.float32)
        place = jnp.arange(parse.kinds.shape[1])
        start, end = (parse.spans[:, None, :, i] for i in (0, 1))
        opens = start == place  # a token whose span begins at itself opens parentheses
        inside = opens & (start <= place[:, None]) & (place[:, None] < end)
        return DistanceScheme(inside, table)


class QueryScheme(nn.Module):
    """What a layer makes of the parse: relative keys, typed or not, and a guide."""

    position: Make | None
    guide: Make | None
    typed: bool = False

    @nn.compact
    def __call__(self, parse: Parse) -> Together:
        schemes = []
        if self.position is not None:
            position = self.position(name="position")
            schemes.append(position(parse.kinds) if self.typed else position())
        if self.guide is not None:
            schemes.append(self.guide(name="guide")(parse))
        return Together(schemes)


class QueryEncoder(nn.Module):
    """Tokens (B, L) and their spans (B, L, 2) to scores (B, N) of all entities.

    The first token is read out by BERT's pooler, and meets the embeddings of the entities.
    """

    vocabulary: Vocabulary
    width: int
    stack: Make
    position: Make | None = None  # added to the stream
    norm: Make | None = None
    dropout: float = 0.0
    split_terms: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.embed = Embed(self.vocabulary.size, self.width, self.dtype)
        self.place = None if self.position is None else self.position()
        self.embed_norm = LayerNorm()
        self.drop = Dropout(self.dropout)
        self.blocks = self.stack()
        self.last_norm = None if self.norm is None else self.norm()
        self.pool = DensePool()

    def __call__(
        self, tokens_BxL: jax.Array, spans_BxLx2: jax.Array, *, train: bool = False
    ) -> jax.Array:
        query_BxD = self.pool(self.states(tokens_BxL, spans_BxLx2, train=train))
        last = FIRST_ENTITY + self.vocabulary.entities
        entities_NxD = self.embed.table[FIRST_ENTITY:last].astype(query_BxD.dtype)
        scores = jnp.einsum(
            "BD,ND->BN", query_BxD, entities_NxD, preferred_element_type=jnp.float32
        )
        return constrain(scores, ("batch", "vocab"))

    def states(
        self, tokens_BxL: jax.Array, spans_BxLx2: jax.Array, *, train: bool = False
    ) -> jax.Array:
        """(B, L, D) of all tokens."""
        x_BxLxD = self.embed(tokens_BxL)
        if self.place is not None:
            x_BxLxD = self.place(x_BxLxD)
        x_BxLxD = self.drop(self.embed_norm(x_BxLxD), train=train)
        x_BxLxD = constrain(x_BxLxD, ("batch", "length", "embed"))
        parse = parse_of(tokens_BxL, spans_BxLx2, self.vocabulary.kinds(self.split_terms))
        mask = KeyPadding(tokens_BxL != PAD)
        x_BxLxD = self.blocks(x_BxLxD, mask=mask, scheme=parse, train=train)
        return x_BxLxD if self.last_norm is None else self.last_norm(x_BxLxD)


def encoder(
    trunk: Transformer,
    vocabulary: Vocabulary,
    *,
    length: int,
    position: str = "rpe",
    longest: int = 0,
    typed: bool = False,
    guide: str = "none",
    split_terms: bool = False,
) -> QueryEncoder:
    """The encoder of the paper and its variants; `trunk` has no positions of its own.

    `position` is "ape", "rpe" (relative keys), "dpe" (disentangled), "rope" or "none"; `longest` 0
    has an offset for all there are. `typed` adds vectors by pairs of kinds to "rpe". `guide` "soft"
    has gamma, "hard" masks all heads, "half" half of them; "distance" is a bias by tree distance.

    Raises:
        ConfigError: no such position or guide, or types without relative keys.
    """
    require("model.position", position, POSITIONS)
    require("model.guide", guide, GUIDES)
    if typed and position != "rpe":
        raise ConfigError(f"model.typed=True: is of relative keys, model.position={position!r}")
    heads, size = trunk.heads, trunk.width // trunk.heads
    longest = longest or length - 1
    kinds = len(KINDS) + 2 * split_terms if typed else 0
    inside = {
        "rpe": Make(RelativeKey, head_size=size, longest=longest, types=kinds),
        "dpe": Make(Disentangled, heads=heads, head_size=size, longest=longest),
    }.get(position)
    masked = {"hard": heads, "half": heads // 2}.get(guide, 0)
    guided = {
        "none": None,
        "distance": Make(Distance, heads=heads),
    }.get(guide, Make(Guide, heads=heads, masked=masked))
    attention = Make(Attention, heads=heads, dropout=trunk.dropout)
    if position == "rope":
        attention = attention.replace(position=Make(RoPE))
    if position == "dpe":
        attention = attention.replace(scale=(3 * size) ** -0.5)
    own = Make(QueryScheme, position=inside, guide=guided, typed=typed)
    ape = dataclasses.replace(trunk, position="learned").stream_position(length)
    return QueryEncoder(
        vocabulary,
        trunk.width,
        trunk.stack(Make(LayerScheme, own=own, mixer=attention)),
        position=ape if position == "ape" else None,
        norm=trunk.final_norm(),
        dropout=trunk.dropout,
        split_terms=split_terms,
        dtype=trunk.compute_dtype,
    )


@dataclasses.dataclass(frozen=True)
class EntailmentTask:
    """Cross-entropy over entities of one answer that the observed graph has. It also `Predicts`.

    Batches are {"tokens": (B, L), "spans": (B, L, 2), "answer": (B,)}, and "weight" (B,) at will.
    """

    model: QueryEncoder
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.smoothing < 1.0:
            raise ConfigError(f"model.smoothing={self.smoothing}: must be in [0, 1)")

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extra]:
        tokens, spans = (jnp.asarray(batch[name])[:1] for name in ("tokens", "spans"))
        return linen.init(self.model, key, tokens, spans)

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> LossOutput:
        inputs = [jnp.asarray(batch[name]) for name in ("tokens", "spans")]
        scores, extra = linen.apply(self.model, params, extra, *inputs, key=key, train=train)
        answer, weight = jnp.asarray(batch["answer"]), batch.get("weight")
        loss = Mean.of(cross_entropy(scores, answer, self.smoothing), weight)
        first = Mean.of(is_correct(scores, answer), weight)
        return LossOutput(loss.value(), loss.weight, {"loss": loss, "first": first}, extra)

    def predict(self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array) -> jax.Array:
        """Scores (B, N) of all entities."""
        inputs = [jnp.asarray(batch[name]) for name in ("tokens", "spans")]
        return linen.apply(self.model, params, extra, *inputs, key=key, train=False)[0]
