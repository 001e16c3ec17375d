"""Attention without softmax: sums of `(q . k) v`, in time and memory linear in the length."""

from jaxformer.kernels.linear_attention.api import (
    causal_sum,
    key_value_state,
    linear_attention,
    linear_attention_step,
)

__all__ = ["causal_sum", "key_value_state", "linear_attention", "linear_attention_step"]
