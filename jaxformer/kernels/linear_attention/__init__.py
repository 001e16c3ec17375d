"""Attention without softmax: sums of `(q . k) v`, in time and memory linear in the length."""

from jaxformer.kernels.linear_attention.api import (
    LinearAttentionUnsupported,
    causal_sum,
    explain,
    key_value_state,
    linear_attention,
    linear_attention_step,
    plan,
)
from jaxformer.kernels.linear_attention.sums import Tiles

__all__ = [
    "LinearAttentionUnsupported",
    "Tiles",
    "causal_sum",
    "explain",
    "key_value_state",
    "linear_attention",
    "linear_attention_step",
    "plan",
]
