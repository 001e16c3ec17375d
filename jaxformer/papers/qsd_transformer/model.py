"""QSD-Transformer: a spike-driven vision transformer with weights of few bits.

Activations are whole numbers of spikes (`IntegerLIF`, IE-LIF in the paper) and weights have
learned steps (`LearnedSteps`), so that inference only adds. Fine-grained distillation aligns the
queries and keys of each attention layer with those of a network of floats (section 4).

Streams are maps (T B, H, W, C), steps of time outermost. S is a neuron, D its levels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.compress.intercepted import Intercepted
from jaxformer.compress.lsq import LearnedSteps
from jaxformer.errors import ConfigError
from jaxformer.nn.attention import head_sizes
from jaxformer.nn.batch_norm import BatchNorm, PaddedBatchNorm
from jaxformer.nn.conv import Conv
from jaxformer.nn.depthwise import DepthwiseConv
from jaxformer.nn.einsum import Einsum
from jaxformer.nn.make import Make
from jaxformer.nn.spiking import IntegerLIF, Rectifier
from jaxformer.parallel.sharding import constrain
from jaxformer.tasks.linen import Answer

ATTENTION_GAIN = 2.0  # of the neuron after attention: a threshold of 1/2
SCALE = 0.25
LAYER_SCALE = 1e-6
POINTWISE = "...C,CD->...D"
MAP_AXES = ("batch", None, None, "embed")

# ----------------------------------------------------------------------------------- convolutions


class SepConv(nn.Module):
    """S, 1x1 to twice the width, S, depth-wise 7x7, 1x1 back."""

    neuron: Make

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        width = x.shape[-1]
        x = self.neuron(name="neuron_1")(x)
        x = Einsum(POINTWISE, (2 * width,), use_bias=False, name="expand")(x)
        x = BatchNorm(name="norm_1")(x, train=train)
        x = self.neuron(name="neuron_2")(x)
        x = DepthwiseConv(7, use_bias=False, name="depthwise")(x)
        x = Einsum(POINTWISE, (width,), use_bias=False, name="reduce")(x)
        return BatchNorm(name="norm_2")(x, train=train)


class ConvBlock(nn.Module):
    """x + SepConv(x), then x + two 3x3 convolutions with four times the width between them."""

    neuron: Make

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        width = x.shape[-1]
        x = x + SepConv(self.neuron, name="separable")(x, train=train)
        y = self.neuron(name="neuron_1")(x)
        y = Conv(4 * width, use_bias=False, name="conv_1")(y)
        y = self.neuron(name="neuron_2")(BatchNorm(name="norm_1")(y, train=train))
        y = Conv(width, use_bias=False, name="conv_2")(y)
        return x + BatchNorm(name="norm_2")(y, train=train)


class RepConv(nn.Module):
    """1x1, norm, a border, depth-wise 3x3 without padding, 1x1, norm: one 3x3 when folded."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        width = x.shape[-1]
        x = Einsum(POINTWISE, (width,), use_bias=False, name="pointwise_1")(x)
        x = PaddedBatchNorm(name="norm_1")(x, train=train)
        x = DepthwiseConv(3, use_bias=False, name="depthwise")(x)[:, 1:-1, 1:-1]
        x = Einsum(POINTWISE, (width,), use_bias=False, name="pointwise_2")(x)
        return BatchNorm(name="norm_2")(x, train=train)


class Downsampling(nn.Module):
    """[S, but not in front of the image], a convolution with a stride, norm."""

    features: int
    size: int
    stride: int
    neuron: Make | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        if self.neuron is not None:
            x = self.neuron(name="neuron")(x)
        x = Conv(self.features, self.size, self.stride, name="conv")(x)
        return BatchNorm(name="norm")(x, train=train)


# --------------------------------------------------------------------------------------- blocks


class SpikeAttention(nn.Module):
    """Q-SDSA: q (k^T v) / 4 of spikes, head by head, without a softmax; linear in positions.

    Raises:
        ConfigError: heads do not divide the width.
    """

    heads: int
    neuron: Make

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        batch, rows, columns, width = x.shape
        _, size = head_sizes(width, self.heads)
        x = self.neuron(name="neuron")(x)

        def project(name: str) -> jax.Array:
            y = RepConv(name=name)(x, train=train)
            y = BatchNorm(name=f"{name}_norm")(y, train=train)
            y = self.neuron(name=f"{name}_neuron")(y)
            return y.reshape(batch, rows * columns, self.heads, size)

        q_BxNxHxK, k_BxNxHxK, v_BxNxHxK = (project(name) for name in ("query", "key", "value"))
        self.sow("intermediates", "query_spikes", q_BxNxHxK)
        self.sow("intermediates", "key_spikes", k_BxNxHxK)
        o = linear_attention(q_BxNxHxK, k_BxNxHxK, v_BxNxHxK).astype(x.dtype)
        o = o.reshape(batch, rows, columns, width)
        o = self.neuron.replace(gain=ATTENTION_GAIN)(name="out_neuron")(o)
        o = RepConv(name="out")(o, train=train)
        return BatchNorm(name="out_norm")(o, train=train)


def linear_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """(B, N, H, K) in float32, k^T v first: sums of up to N products."""
    # Not bfloat16 operands with a float32 sum: XLA's CPU runtime has no such product for k^T v.
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    kv_BxHxKxE = jnp.einsum("BNHK,BNHE->BHKE", k, v)
    return SCALE * jnp.einsum("BNHK,BHKE->BNHE", q, kv_BxHxKxE)


class SpikeMLP(nn.Module):
    """S, 1x1, norm, S, 1x1, norm."""

    hidden: int
    neuron: Make

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        width = x.shape[-1]
        x = self.neuron(name="neuron_1")(x)
        x = Einsum(POINTWISE, (self.hidden,), name="up")(x)
        x = self.neuron(name="neuron_2")(BatchNorm(name="norm_1")(x, train=train))
        x = Einsum(POINTWISE, (width,), name="down")(x)
        return BatchNorm(name="norm_2")(x, train=train)


class SpikeBlock(nn.Module):
    """x + lambda_1 attention(x), then x + lambda_2 mlp(x); lambdas start at `layer_scale`."""

    heads: int
    neuron: Make
    mlp_ratio: float = 4.0
    layer_scale: float = LAYER_SCALE

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        start = jax.nn.initializers.constant(self.layer_scale)

        def add(x: jax.Array, y: jax.Array, name: str) -> jax.Array:
            gain = self.param(name, start, x.shape[-1:], jnp.float32)
            return x + gain.astype(y.dtype) * y

        hidden = int(self.mlp_ratio * x.shape[-1])
        attention = SpikeAttention(self.heads, self.neuron, name="mixer")
        x = add(x, attention(x, train=train), "layer_scale_1")
        mlp = SpikeMLP(hidden, self.neuron, name="mlp")
        return add(x, mlp(x, train=train), "layer_scale_2")


# -------------------------------------------------------------------------------------- network


@dataclasses.dataclass(frozen=True)
class Stage:
    """A downsampling and blocks of one kind, "conv" or "attention"."""

    width: int
    kind: str
    depth: int
    size: int = 3
    stride: int = 2

    def __post_init__(self) -> None:
        if self.kind not in ("conv", "attention"):
            raise ConfigError(f"model.kinds: {self.kind!r} must be one of conv, attention")


class SpikeNetwork(nn.Module):
    """Images (B, H, W, C), or (T, B, H, W, C) in `steps` steps of time, to classes (B, classes).

    An image is shown in every step of time; what is read off the last map is averaged over them.

    Raises:
        ConfigError: the images have another number of steps.
    """

    stages: tuple[Stage, ...]
    heads: int
    classes: int
    neuron: Make = Make(IntegerLIF)
    steps: int = 1
    mlp_ratio: float = 4.0
    layer_scale: float = LAYER_SCALE
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        x = self._in_time(image.astype(self.dtype))
        for i, stage in enumerate(self.stages):
            neuron = self.neuron if i else None
            down = Downsampling(
                stage.width, stage.size, stage.stride, neuron, name=f"downsampling_{i}"
            )
            x = constrain(down(x, train=train), MAP_AXES)
            for j in range(stage.depth):
                x = self._block(stage, name=f"stage_{i}_block_{j}")(x, train=train)
                x = constrain(x, MAP_AXES)
        x = self.neuron(name="neuron")(x.mean((1, 2)))
        logits = Einsum("...C,CD->...D", (self.classes,), out_dtype=jnp.float32, name="head")(x)
        return constrain(logits.reshape(self.steps, -1, self.classes).mean(0), ("batch", "vocab"))

    def _in_time(self, image: jax.Array) -> jax.Array:
        if image.ndim == 5:
            if len(image) != self.steps:
                raise ConfigError(
                    f"model.steps={self.steps}: the images have {len(image)} steps of time"
                )
            return image.reshape(-1, *image.shape[2:])
        return jnp.tile(image, (self.steps, 1, 1, 1))

    def _block(self, stage: Stage, name: str) -> nn.Module:
        if stage.kind == "conv":
            return ConvBlock(self.neuron, name=name)
        return SpikeBlock(self.heads, self.neuron, self.mlp_ratio, self.layer_scale, name=name)


def quantized(network: SpikeNetwork, bits: int) -> Intercepted:
    """`network` with weights of so many bits, stem and head too."""
    return Intercepted(network, (LearnedSteps(bits),))


def floating(network: SpikeNetwork, limit: float | None = None) -> SpikeNetwork:
    """The network of floats that teaches: rectifiers in the places of neurons."""
    return network.clone(neuron=Make(Rectifier, limit=limit))


# ----------------------------------------------------------------------------- fine distillation


def similarity(x_BxNxHxK: jax.Array) -> jax.Array:
    """G (B, H, N, N): the cosines between positions, head by head; 0 where there are no spikes.

    A position without spikes has no direction, and no gradient: with 1e-6 added to its norm that
    would be a million, beside which a clipped gradient of all else vanishes.
    """
    x = x_BxNxHxK.astype(jnp.float32)
    square = jnp.square(x).sum(-1, keepdims=True)
    x = x * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return jnp.einsum("BNHK,BMHK->BHNM", x, x)


def mismatch(student: Answer, teacher: Answer) -> jax.Array:
    """L_FGD (B,): squared distances of G of queries and keys over N^2, of all layers and heads.

    The mean over steps of time. The paper's formula is not in the released code; this is a choice.
    """
    rows = len(student.output)
    total = jnp.zeros(rows)
    for s, t in zip(jax.tree.leaves(student.sown), jax.tree.leaves(teacher.sown), strict=True):
        each = jnp.square(similarity(t) - similarity(s)).mean((-2, -1)).sum(-1)
        total = total + each.reshape(-1, rows).mean(0)
    return total
