"""What SeqPE adds to the loss of a task (section 3.3): L = L_task + 0.1 L_ct + 0.1 L_tr."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.papers.seqpe.encoder import SequentialPE, encode
from jaxformer.papers.seqpe.losses import contrastive, finds_nearest, transfer
from jaxformer.papers.seqpe.model import GIVEN
from jaxformer.papers.seqpe.sampler import Draw, Sampler
from jaxformer.recipe import Batch, Extra, LossOutput, Mean, Params


@dataclasses.dataclass(frozen=True)
class Encoder:
    """g of a model whose scheme is at `path`, as a pure function of the model's parameters."""

    g: SequentialPE
    path: tuple[str, ...] = ("scheme",)

    def init(self, key: jax.Array) -> Params:
        """Parameters of g alone, where those of the model have them."""
        zeros = jnp.zeros((1, self.g.strings.length), jnp.int32)
        leaf = self.g.init(key, zeros)["params"]
        for name in reversed((*self.path, "encoder")):
            leaf = {name: leaf}
        return leaf

    def __call__(
        self, params: Params, key: jax.Array, train: bool, *positions: jax.Array
    ) -> list[jax.Array]:
        """Vectors (..., D) of several arrays (..., axes) of positions, all in one batch."""
        for name in (*self.path, "encoder"):
            params = params[name]
        g = self.g.bind({"params": params}, rngs={"dropout": key})
        axes = self.g.strings.axes
        flat = jnp.concatenate([p.reshape(-1, axes) for p in positions])
        s = encode(g, flat if axes > 1 else flat[:, 0], train=train)
        parts = jnp.split(s, np.cumsum([p.size // axes for p in positions])[:-1])
        return [part.reshape(*p.shape[:-1], -1) for part, p in zip(parts, positions, strict=True)]

    def given(self, vectors: jax.Array, block: jax.Array) -> dict[str, Any]:
        """The variables by which the scheme receives vectors (b, L, D), and each row's b (B,)."""
        leaf: dict[str, Any] = {"vectors": vectors, "block": block}
        for name in reversed(self.path):
            leaf = {name: leaf}
        return {GIVEN: leaf}


class Found(NamedTuple):
    """Vectors (b, L, D) of the main task, the two losses, and how often the nearest is found.

    The transfer is 0 where the main task is shifted.
    """

    vectors: jax.Array
    contrast: jax.Array
    transfer: jax.Array
    nearest: jax.Array


@dataclasses.dataclass(frozen=True)
class PositionTask:
    """The encoder alone: L_ct + L_tr on batches that are the address of their rows.

    `weights` are those of the two losses, `heads` those of the transfer, `beta` its share that goes
    to the student.
    """

    encoder: Encoder
    sampler: Sampler
    heads: int
    weights: tuple[float, float] = (0.1, 0.1)
    beta: float = 1.0

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extra]:
        del batch
        return self.encoder.init(key), {}

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> LossOutput:
        found, metrics = self.learn(params, batch, key, train)
        loss = Mean.of(self.auxiliary(found), batch.get("weight"))
        return LossOutput(loss.value(), loss.weight, metrics, extra)

    def auxiliary(self, found: Found) -> jax.Array:
        """What is added to the loss of a main task."""
        contrast, transfer = self.weights
        return contrast * found.contrast + transfer * found.transfer

    def learn(
        self, params: Params, batch: Batch, key: jax.Array, train: bool
    ) -> tuple[Found, dict[str, Mean]]:
        """What the positions of a step show, and its metrics."""
        draw = self.sampler.draw(*(jnp.asarray(batch[name])[0] for name in ("seed", "step")))
        found = self.positions(params, draw, key, train)
        return found, {
            "contrastive": Mean.of(found.contrast),
            "transfer": Mean.of(found.transfer, ~draw.shifted),
            "nearest": Mean.of(found.nearest),
        }

    def positions(self, params: Params, draw: Draw, key: jax.Array, train: bool = True) -> Found:
        """All positions of a step, encoded together."""
        encoder = functools.partial(self.encoder, params, key, train)
        inside, (pivot, candidates, label) = jnp.asarray(self.sampler.inside), draw.contrast

        def contrast(*pair: jax.Array) -> tuple[jax.Array, jax.Array]:
            return contrastive(*pair, label).mean(), finds_nearest(*pair, label).mean()

        def shifted() -> Found:
            s, *pair = encoder(draw.start[:, None] + inside, pivot, candidates)
            l_ct, nearest = contrast(*pair)
            return Found(s, l_ct, jnp.zeros_like(l_ct), nearest)

        def plain() -> Found:
            s, student, *pair = encoder(inside, draw.comparison.far, pivot, candidates)
            l_ct, nearest = contrast(*pair)
            l_tr = transfer(s[draw.comparison.index], student, self.heads, self.beta)
            return Found(jnp.broadcast_to(s, (self.sampler.starts, *s.shape)), l_ct, l_tr, nearest)

        branches: tuple[Callable[[], Found], ...] = (shifted, plain)
        return jax.lax.cond(draw.shifted, *branches)


@dataclasses.dataclass(frozen=True)
class SequentialTask:
    """`task` on a model with SeqPE: shifted at random, with the losses of `positions` beside.

    It needs batches with the address of their rows (`jaxformer.data.base.Numbered`) to train on;
    everything else the task answers itself. Row i of a shifted batch lies at the start i mod b.
    """

    task: Any
    positions: PositionTask

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.task, name)

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extra]:
        return self.task.init(key, batch)

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> LossOutput:
        if not train or "step" not in batch:
            return self.task.loss(params, extra, batch, key=key, train=train)
        positions = self.positions
        found, metrics = positions.learn(params, batch, jax.random.fold_in(key, 1), train)
        block = jnp.asarray(batch["row"]) % positions.sampler.starts
        given = positions.encoder.given(found.vectors, block)
        output = self.task.loss(params, {**extra, **given}, batch, key=key, train=True)
        loss = output.loss + positions.auxiliary(found)
        kept = {name: tree for name, tree in output.extra.items() if name != GIVEN}
        return output._replace(loss=loss, metrics={**output.metrics, **metrics}, extra=kept)
