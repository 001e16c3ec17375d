"""A transformer whose embeddings are one-hot and lie side by side (section 3.3).

The stream has a dimension for each word, h more, and one for each position: D = V + 5 + h + n.
Token and position are written there as they are, without weights, and what is read off at the end
are the dimensions of the words.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.kernels.attention import Causal, KeyPadding, Mask
from jaxformer.models.transformer import Transformer, require
from jaxformer.nn.activation import RELU
from jaxformer.nn.attention import Attention, Fused
from jaxformer.nn.block import Block, Branch, PreNorm, Residual, Stack
from jaxformer.nn.einsum import Axes, Einsum, Initializer
from jaxformer.nn.make import Make
from jaxformer.nn.mlp import MLP
from jaxformer.nn.norm import LayerNorm
from jaxformer.nn.position import At, Position
from jaxformer.parallel.sharding import constrain
from jaxformer.recipe import Batch, Extra, LossOutput, Mean, Params
from jaxformer.tasks import linen
from jaxformer.tasks.losses import cross_entropy

ABLATIONS = ("none", "out", "value_out")


def torch_uniform(equation: str) -> Initializer:
    """Uniform within 1 / sqrt(fan-in), the default of a torch Linear."""
    axes = Axes.of(equation)
    kept = [i for i in range(len(axes.kernel)) if i not in axes.contracted]
    return jax.nn.initializers.variance_scaling(
        1 / 3, "fan_in", "uniform", list(axes.contracted), kept
    )


class OneHot(nn.Module):
    """Tokens (B, n) to the stream (B, n, words + hidden + n): a 1 for each token and position."""

    words: int
    hidden: int
    length: int
    dtype: Any = jnp.float32

    def __call__(self, tokens_Bxn: jax.Array) -> jax.Array:
        token = jax.nn.one_hot(tokens_Bxn, self.words + self.hidden, dtype=self.dtype)
        place = jnp.eye(self.length, dtype=self.dtype)[: tokens_Bxn.shape[1]]
        place = jnp.broadcast_to(place, (*tokens_Bxn.shape, self.length))
        return jnp.concatenate([token, place], -1)


class Plain(Residual):
    """x + branch(x): no norm before the branch."""

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, branch: Branch, *, train: bool) -> jax.Array:
        return self.join(x_BxLxD, branch(x_BxLxD), train=train)


class Ablated(nn.Module):
    """Attention whose output is not projected, nor with `values` False the values."""

    heads: int = 1
    values: bool = True
    core: Make = Make(Fused)

    @nn.compact
    def __call__(
        self, x_BxLxD: jax.Array, kv: None = None, *, mask: Mask, train: bool = False, **_: Any
    ) -> jax.Array:
        del kv, train
        heads = (self.heads, x_BxLxD.shape[-1] // self.heads)
        equation = "...D,DHK->...HK"
        projected = [
            Einsum(equation, heads, kernel_init=torch_uniform(equation), name=name)(x_BxLxD)
            for name in ("query", "key", *(["value"] if self.values else []))
        ]
        q, k, v = (*projected, x_BxLxD.reshape(*x_BxLxD.shape[:-1], *heads))[:3]
        mods = Position(name="position").mods(self.heads, At(q.shape[1], k.shape[1]))
        return self.core(name="core")(q, k, v, mask=mask, mods=mods).reshape(x_BxLxD.shape)


class Nothing(nn.Module):
    """An MLP that adds nothing."""

    def __call__(self, x_BxLxD: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        return jnp.zeros_like(x_BxLxD)


class Searcher(nn.Module):
    """Tokens (B, n), padded at the left, to logits (B, n, words)."""

    words: int
    hidden: int
    length: int
    pad: int
    stack: Make
    causal: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens_Bxn: jax.Array, *, train: bool = False) -> jax.Array:
        embed = OneHot(self.words, self.hidden, self.length, self.dtype, name="embed")
        mask: Mask = KeyPadding(tokens_Bxn != self.pad)
        mask = mask & Causal() if self.causal else mask
        x_BxnxD = constrain(embed(tokens_Bxn), ("batch", "length", "embed"))
        x_BxnxD = self.stack(name="stack")(x_BxnxD, mask=mask, train=train)
        x_BxnxD = LayerNorm(name="norm")(x_BxnxD)
        logits = x_BxnxD[..., : self.words].astype(jnp.float32)
        return constrain(logits, ("batch", "length", "vocab"))


def searcher(
    *,
    words: int,
    length: int,
    hidden: int,
    depth: int,
    heads: int = 1,
    rate: int = 1,
    ablate: str = "none",
    causal: bool = False,
    repeat: int = 1,
    remat: str = "none",
    dtype: str = "float32",
) -> Searcher:
    """The model of the paper; `rate` is the width of the MLPs in widths of the stream.

    `ablate` "out" takes the output projection away, "value_out" that of values too; the last layer
    then has no MLP, and with "value_out" queries, keys and values are of the stream without a norm.
    `repeat` loops the layers.

    Raises:
        ConfigError: no such ablation, or heads that do not divide the width.
    """
    require("model.ablate", ablate, ABLATIONS)
    width = words + hidden + length
    trunk = Transformer(width=width, depth=depth, heads=heads, repeat=repeat, position="none")
    mixer = Make(Attention, heads=heads, kernel_init=torch_uniform)
    if ablate != "none":
        mixer = Make(Ablated, heads=heads, values=ablate == "out")
    mlp = Make(MLP, hidden=rate * width, activation=RELU, kernel_init=torch_uniform)

    def block(i: int) -> Make:
        last = ablate != "none" and i == depth - 1
        return Make(
            Block,
            mixer=mixer,
            mlp=Make(Nothing) if last else mlp,
            residual=Make(Plain) if ablate == "value_out" else Make(PreNorm),
            mlp_residual=Make(Plain) if last else Make(PreNorm),
        )

    stack = Make(Stack, blocks=tuple(map(block, range(depth))), remat=remat, repeat=trunk.repeat)
    pad = words - 2
    return Searcher(words, hidden, length, pad, stack, causal, jnp.dtype(dtype))


@dataclasses.dataclass(frozen=True)
class SearchTask:
    """Cross-entropy of the label at the last position; right is any useful token.

    Batches are {"inputs": (B, n), "label": (B,), "useful": (B, words), "difficulty": (B,)}, and
    "weight" (B,) at will. "accuracy_k" is that of difficulty k, for those up to `difficulties`.
    """

    model: nn.Module
    difficulties: int = -1

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extra]:
        return linen.init(self.model, key, jnp.asarray(batch["inputs"])[:1])

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> LossOutput:
        logits, extra = linen.apply(
            self.model, params, extra, batch["inputs"], key=key, train=train
        )
        last, weight = logits[:, -1], batch.get("weight")
        loss = Mean.of(cross_entropy(last, batch["label"]), weight)
        said = jnp.take_along_axis(batch["useful"], last.argmax(-1)[:, None], -1)[:, 0]
        metrics = {"loss": loss, "accuracy": Mean.of(said, weight)}
        for k in range(self.difficulties + 1):
            of_k = (batch["difficulty"] == k) * (1.0 if weight is None else weight)
            metrics[f"accuracy_{k}"] = Mean.of(said, of_k)
        return LossOutput(loss.value(), loss.weight, metrics, extra)

    def predict(self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array) -> jax.Array:
        """Logits (B, words) of the next token."""
        output, _ = linen.apply(self.model, params, extra, batch["inputs"], key=key, train=False)
        return output[:, -1]
