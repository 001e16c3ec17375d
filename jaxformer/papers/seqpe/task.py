"""What SeqPE adds to the loss of a task (section 3.3): L = L_task + 0.1 L_ct + 0.1 L_tr."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.papers.seqpe.losses import contrastive, transfer
from jaxformer.papers.seqpe.model import GIVEN, SequentialPE, encode
from jaxformer.papers.seqpe.sampler import Draw, Sampler
from jaxformer.recipe import Batch, Extra, LossOutput, Mean, Params


@dataclasses.dataclass(frozen=True)
class Encoder:
    """g of a model whose scheme is at `path`, as a pure function of the model's parameters."""

    g: SequentialPE
    path: tuple[str, ...] = ("scheme",)

    def __call__(self, params: Params, key: jax.Array, *positions: jax.Array) -> list[jax.Array]:
        """Vectors (..., D) of several arrays (..., axes) of positions, all in one batch."""
        for name in (*self.path, "encoder"):
            params = params[name]
        g = self.g.bind({"params": params}, rngs={"dropout": key})
        axes = self.g.strings.axes
        flat = jnp.concatenate([p.reshape(-1, axes) for p in positions])
        s = encode(g, flat if axes > 1 else flat[:, 0], train=True)
        parts = jnp.split(s, np.cumsum([p.size // axes for p in positions])[:-1])
        return [part.reshape(*p.shape[:-1], -1) for part, p in zip(parts, positions, strict=True)]

    def given(self, vectors: jax.Array, block: jax.Array) -> dict[str, Any]:
        """The variables by which the scheme receives vectors (b, L, D), and each row's b (B,)."""
        leaf: dict[str, Any] = {"vectors": vectors, "block": block}
        for name in reversed(self.path):
            leaf = {name: leaf}
        return {GIVEN: leaf}


@dataclasses.dataclass(frozen=True)
class SequentialTask:
    """`task` on a model with SeqPE: shifted at random, with the two losses on its encoder.

    It needs batches with the address of their rows (`jaxformer.data.base.Numbered`) to train on;
    everything else the task answers itself. Row i of a shifted batch lies at the start i mod b.
    """

    task: Any
    encoder: Encoder
    sampler: Sampler
    heads: int
    contrast: float = 0.1
    transfer: float = 0.1
    beta: float = 1.0

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
        seed, step, row = (jnp.asarray(batch[name]) for name in ("seed", "step", "row"))
        draw = self.sampler.draw(seed[0], step[0])
        vectors, l_ct, l_tr = self.positions(params, draw, jax.random.fold_in(key, 1))
        given = self.encoder.given(vectors, row % self.sampler.starts)
        output = self.task.loss(params, {**extra, **given}, batch, key=key, train=True)
        metrics = {
            **output.metrics,
            "contrastive": Mean.of(l_ct),
            "transfer": Mean.of(l_tr, ~draw.shifted),
        }
        loss = output.loss + self.contrast * l_ct + self.transfer * l_tr
        kept = {name: tree for name, tree in output.extra.items() if name != GIVEN}
        return output._replace(loss=loss, metrics=metrics, extra=kept)

    def positions(
        self, params: Params, draw: Draw, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Vectors (b, L, D) of the main task, L_ct and L_tr, which is 0 where it is shifted."""
        encoder = functools.partial(self.encoder, params, key)
        inside, (pivot, candidates, label) = jnp.asarray(self.sampler.inside), draw.contrast

        def shifted() -> tuple[jax.Array, jax.Array, jax.Array]:
            blocks = draw.start[:, None] + inside
            s, of_pivot, of_candidates = encoder(blocks, pivot, candidates)
            l_ct = contrastive(of_pivot, of_candidates, label).mean()
            return s, l_ct, jnp.zeros_like(l_ct)

        def plain() -> tuple[jax.Array, jax.Array, jax.Array]:
            far = draw.comparison.far
            s, of_pivot, of_candidates, student = encoder(inside, pivot, candidates, far)
            l_ct = contrastive(of_pivot, of_candidates, label).mean()
            l_tr = transfer(s[draw.comparison.index], student, self.heads, self.beta)
            return jnp.broadcast_to(s, (self.sampler.starts, *s.shape)), l_ct, l_tr

        branches: tuple[Callable[[], Any], ...] = (shifted, plain)
        return jax.lax.cond(draw.shifted, *branches)
