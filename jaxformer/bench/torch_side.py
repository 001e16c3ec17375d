"""The same attention in PyTorch, where it is installed with CUDA: SDPA and compiled FlexAttention.

Nothing else in the repository needs PyTorch.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

from jaxformer.bench.clock import Run

MODS = ("soft-cap", "ALiBi", "window 1k", "prefix", "Toeplitz add", "dense bias")


@functools.cache
def available() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


def sdpa(shape: tuple[int, int, int, int], causal: bool, direction: str) -> Run:
    """`scaled_dot_product_attention`, which picks cuDNN or FlashAttention itself."""
    import torch

    attend = torch.nn.functional.scaled_dot_product_attention
    return _run(lambda q, k, v: attend(q, k, v, is_causal=causal), shape, direction)


def flex(shape: tuple[int, int, int, int], mod: str, direction: str) -> Run:
    """`flex_attention` under `torch.compile`, with one of MODS."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # it would give up compiling after the eighth mod
    _, length, heads, _ = shape
    score, visible = _mod(mod, length, heads)
    mask = create_block_mask(visible, None, None, length, length, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return _run(lambda q, k, v: compiled(q, k, v, score, mask), shape, direction)


def _mod(name: str, length: int, heads: int) -> tuple[Callable[..., Any] | None, Callable]:
    """(score_mod, mask_mod) as FlexAttention takes them."""
    import torch

    def random(*size: int, dtype: Any = torch.float32) -> Any:
        return torch.randn(*size, device="cuda", dtype=dtype)

    slopes = 2.0 ** -torch.linspace(1, 8, heads, device="cuda")
    window = min(1023, length // 2)
    score = {
        "soft-cap": lambda s, b, h, q, k: 30.0 * torch.tanh(s / 30.0),
        "ALiBi": lambda s, b, h, q, k: s - slopes[h] * (q - k),
    }.get(name)
    if name == "Toeplitz add":
        band = random(heads, 2 * length - 1).requires_grad_()
        score = lambda s, b, h, q, k: s + band[h, q - k + length - 1]  # noqa: E731
    if name == "dense bias":
        bias = random(heads, length, length, dtype=torch.bfloat16).requires_grad_()
        score = lambda s, b, h, q, k: s + bias[h, q, k]  # noqa: E731
    visible = {
        "window 1k": lambda b, h, q, k: (q >= k) & (q - k <= window),
        "prefix": lambda b, h, q, k: (k < length // 2) | (q == k),
    }.get(name, lambda b, h, q, k: q >= k)
    return score, visible


def _run(attend: Callable[..., Any], shape: tuple[int, int, int, int], direction: str) -> Run:
    import torch

    batch, length, heads, size = shape
    x = [
        torch.randn(batch, heads, length, size, device="cuda", dtype=torch.bfloat16)
        for _ in range(4)
    ]
    *qkv, do = x
    if direction == "forward":

        def start() -> Any:
            with torch.no_grad():
                return attend(*qkv)
    else:
        qkv = [tensor.requires_grad_() for tensor in qkv]
        o = attend(*qkv)

        def start() -> Any:
            return torch.autograd.grad(o, qkv, do, retain_graph=True)

    return Run(start, lambda _: torch.cuda.synchronize())
