"""The choices that the plain models share, as they stand in a config, and the parts they name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from jaxformer.errors import ConfigError
from jaxformer.nn.activation import GELU, GELU_TANH, RELU, SILU
from jaxformer.nn.attention import Attention, head_sizes
from jaxformer.nn.block import Block, PostNorm, PreNorm, ScannedStack, Stack
from jaxformer.nn.make import Make
from jaxformer.nn.mlp import MLP, GatedMLP
from jaxformer.nn.norm import LayerNorm, RMSNorm
from jaxformer.nn.position import ALiBi, LearnedPosition, Position, RoPE, SinusoidalPosition
from jaxformer.nn.remat import REMATS

NORMS = {"layernorm": Make(LayerNorm), "rmsnorm": Make(RMSNorm)}
MLPS = {
    "gelu": Make(MLP, activation=GELU),
    "gelu_tanh": Make(MLP, activation=GELU_TANH),
    "relu": Make(MLP, activation=RELU),
    "silu": Make(MLP, activation=SILU),
    "swiglu": Make(GatedMLP, activation=SILU),
    "geglu": Make(GatedMLP, activation=GELU),
}
ORDERS = {"pre": PreNorm, "post": PostNorm}
STREAM_POSITIONS = ("learned", "sinusoidal", "none")
ATTENTION_POSITIONS = {"rope": Make(RoPE), "alibi": Make(ALiBi)}
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A plain Transformer trunk by names and numbers; `Transformer(**config.model)`.

    `hidden` defaults to 4 x width. `drop_path` grows linearly from 0 at the first block to its
    value at the last. All blocks run `repeat` times one after another, with the same weights.
    `scan` runs the blocks as one loop, `remat` names what is computed again backwards
    (`jaxformer.nn.remat`).

    Raises:
        ConfigError: a field has a value that is not allowed, or two fields do not fit.
    """

    width: int
    depth: int
    heads: int
    kv_heads: int | None = None
    hidden: int | None = None
    mlp: str = "gelu"
    norm: str = "layernorm"
    order: str = "pre"
    position: str = "learned"
    use_bias: bool = True
    dropout: float = 0.0
    drop_path: float = 0.0
    layer_scale: float | None = None
    repeat: int = 1
    scan: bool = False
    remat: str = "none"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for field in ("width", "depth", "heads", "repeat"):
            if getattr(self, field) < 1:
                raise ConfigError(f"model.{field}={getattr(self, field)}: must be at least 1")
        _, head_size = head_sizes(self.width, self.heads, self.kv_heads)
        require("model.mlp", self.mlp, MLPS)
        require("model.norm", self.norm, NORMS)
        require("model.order", self.order, ORDERS)
        require("model.position", self.position, (*STREAM_POSITIONS, *ATTENTION_POSITIONS))
        require("model.dtype", self.dtype, DTYPES)
        require("model.remat", self.remat, REMATS)
        if self.position == "rope" and head_size % 2:
            raise ConfigError(
                f"model.heads={self.heads}: gives a head size of {head_size}, and "
                "model.position='rope' needs an even one"
            )
        for field in ("dropout", "drop_path"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise ConfigError(f"model.{field}={getattr(self, field)}: must be in [0, 1)")
        if self.scan and self.drop_path:
            raise ConfigError(
                f"model.scan=True: scanned blocks are alike, but model.drop_path={self.drop_path} "
                "differs by block; set one of them to its default"
            )

    @property
    def compute_dtype(self) -> Any:
        return jnp.dtype(self.dtype)

    def attention(self) -> Make:
        """Softmax attention with these heads and, if it acts inside, this position scheme."""
        return Make(
            Attention,
            heads=self.heads,
            kv_heads=self.kv_heads,
            position=ATTENTION_POSITIONS.get(self.position, Make(Position)),
            use_bias=self.use_bias,
            dropout=self.dropout,
        )

    def stack(self, mixer: Make | None = None) -> Make:
        """All blocks, with `mixer` in place of softmax attention."""
        if mixer is None:
            mixer = self.attention()
        elif self.position in ATTENTION_POSITIONS and "position" not in dict(mixer.arguments):
            raise ConfigError(
                f"model.position={self.position!r}: acts inside softmax attention, which "
                f"{mixer.cls.__name__} replaces; give one of {', '.join(STREAM_POSITIONS)}"
            )
        cls, activation = MLPS[self.mlp].cls, dict(MLPS[self.mlp].arguments)["activation"]
        hidden = 4 * self.width if self.hidden is None else self.hidden
        mlp = Make(cls, hidden=hidden, activation=activation, use_bias=self.use_bias)

        def block(i: int) -> Make:
            residual = Make(
                ORDERS[self.order],
                norm=NORMS[self.norm],
                dropout=self.dropout,
                drop_path=self.drop_path * i / max(self.depth - 1, 1),
                layer_scale=self.layer_scale,
            )
            return Make(Block, mixer=mixer, mlp=mlp, residual=residual)

        how = {"remat": self.remat, "repeat": self.repeat}
        if self.scan:
            return Make(ScannedStack, block=block(0), depth=self.depth, **how)
        return Make(Stack, blocks=tuple(block(i) for i in range(self.depth)), **how)

    def stream_position(self, length: int) -> Make | None:
        """What is added to the embeddings; None where positions act inside attention or not."""
        if self.position == "learned":
            return Make(LearnedPosition, length=length)
        return Make(SinusoidalPosition) if self.position == "sinusoidal" else None

    def final_norm(self) -> Make | None:
        """The norm after the last block, which post-norm blocks do without."""
        return NORMS[self.norm] if self.order == "pre" else None


def require(field: str, value: str, allowed: Iterable[str]) -> None:
    """Raise a `ConfigError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{field}={value!r}: must be one of {', '.join(allowed)}")
