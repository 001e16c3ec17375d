"""Authors' weights, by their names, as our parameters: the pieces that papers' mappings share.

`jaxformer.papers.<slug>.authors` maps the names of that paper's own code. Its functions take
{name: array} and return nested dicts; they are plain `jnp`, so that the golden tests differentiate
through them and compare gradients by the authors' names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.interop.tensors import TensorFileError, Tensors

Weights = Mapping[str, jax.Array]
Tree = dict[str, Any]
QKV = ("query", "key", "value")


class Used(Mapping[str, jax.Array]):
    """The tensors of a file as `Weights` that remember what was asked for."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors, self._used = tensors, set[str]()

    def __getitem__(self, name: str) -> jax.Array:
        if name not in self._tensors.names:
            first = self._tensors.names[0] if self._tensors.names else "nothing"
            raise TensorFileError(
                f"{self._tensors.where(first)}: tensor {name!r} is missing (it begins with "
                f"{first!r}); are these weights of this paper, and of this config?"
            )
        self._used.add(name)
        return jnp.asarray(self._tensors.read(name))

    def __contains__(self, name: object) -> bool:
        return name in self._tensors.names

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors.names)

    def __len__(self) -> int:
        return len(self._tensors.names)

    @property
    def unused(self) -> list[str]:
        """Tensors that nobody asked for."""
        return [name for name in self._tensors.names if name not in self._used]


def linear(weights: Weights, name: str) -> Tree:
    """A torch Linear, (out, in), with or without bias, as an `Einsum` of one axis to one axis."""
    bias = {"bias": weights[f"{name}.bias"]} if f"{name}.bias" in weights else {}
    return {"kernel": weights[f"{name}.weight"].T, **bias}


def conv1d(weights: Weights, name: str) -> Tree:
    """The Conv1D of GPT-2's code, (in, out)."""
    return {"kernel": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}


def norm(weights: Weights, name: str) -> Tree:
    """A LayerNorm, or without a bias an RMSNorm."""
    bias = {"bias": weights[f"{name}.bias"]} if f"{name}.bias" in weights else {}
    return {"scale": weights[f"{name}.weight"], **bias}


def to_heads(layer: Tree, heads: int) -> Tree:
    """A projection D -> H K, with the head axes split."""
    return {name: x.reshape(*x.shape[:-1], heads, -1) for name, x in layer.items()}


def from_heads(layer: Tree, heads: int) -> Tree:
    """A projection H K -> D, with the head axes split."""
    kernel = layer["kernel"]
    return {**layer, "kernel": kernel.reshape(heads, -1, kernel.shape[-1])}


def attention(weights: Weights, prefix: str, names: Sequence[str], heads: int) -> Tree:
    """An `Attention` of four Linears, `names` being those of query, key, value and out."""
    found = {
        part: to_heads(linear(weights, prefix + name), heads)
        for part, name in zip(QKV, names, strict=False)
    }
    return {**found, "out": from_heads(linear(weights, prefix + names[3]), heads)}


def fused_attention(fused: Tree, out: Tree, heads: int) -> Tree:
    """An `Attention` of one projection to queries, keys and values, in this order, and one back."""
    parts = {name: jnp.split(x, 3, axis=-1) for name, x in fused.items()}
    found = {
        part: to_heads({name: x[i] for name, x in parts.items()}, heads)
        for i, part in enumerate(QKV)
    }
    return {**found, "out": from_heads(out, heads)}


def multihead_attention(weights: Weights, name: str, heads: int) -> Tree:
    """A torch MultiheadAttention."""
    fused = {
        "kernel": weights[f"{name}.in_proj_weight"].T,
        "bias": weights[f"{name}.in_proj_bias"],
    }
    return fused_attention(fused, linear(weights, f"{name}.out_proj"), heads)


def block(mixer: Tree, mixer_norm: Tree, up: Tree, down: Tree, mlp_norm: Tree) -> Tree:
    """A `Block` with an `MLP`."""
    return {
        "mixer": mixer,
        "mixer_residual": {"norm": mixer_norm},
        "mlp": {"up": up, "down": down},
        "mlp_residual": {"norm": mlp_norm},
    }


def gpt2_block(
    weights: Weights, name: str, heads: int, norms: tuple[str, str] = ("ln_1", "ln_2")
) -> Tree:
    """A block of GPT-2's code in the `transformers` library; `name` ends with a dot."""
    fused, out = (conv1d(weights, f"{name}attn.{part}") for part in ("c_attn", "c_proj"))
    return block(
        fused_attention(fused, out, heads),
        norm(weights, name + norms[0]),
        conv1d(weights, f"{name}mlp.c_fc"),
        conv1d(weights, f"{name}mlp.c_proj"),
        norm(weights, name + norms[1]),
    )


def vit_block(weights: Weights, name: str, heads: int) -> Tree:
    """A block of the `timm` library's ViT; `name` ends with a dot."""
    fused, out = (linear(weights, f"{name}attn.{part}") for part in ("qkv", "proj"))
    return block(
        fused_attention(fused, out, heads),
        norm(weights, f"{name}norm1"),
        linear(weights, f"{name}mlp.fc1"),
        linear(weights, f"{name}mlp.fc2"),
        norm(weights, f"{name}norm2"),
    )
