"""Every mask with every modification, shapes in turn: values and gradients against float64.

`test_attention` has the calls that papers make; here each of the two is met with each of the other,
and both with every class of shapes, so that nothing works only in the company it is known in.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.kernels.attention import (
    BlockSparse,
    Causal,
    DenseMask,
    Diagonal,
    Full,
    KeyPadding,
    MaskMod,
    PerHead,
    PerK,
    PerQ,
    Prefix,
    ProbMod,
    Scalar,
    Segments,
    Tile,
    Toeplitz,
    Window,
)
from tests.kernels.attention_reference import Case, toeplitz
from tests.kernels.test_attention import KERNELS, check

RNG = np.random.default_rng(5)
TABLE = RNG.random((9, 9)) < 0.6
SEEN = RNG.random((1, 1, 64, 64)) < 0.5
IDS = np.sort(RNG.integers(0, 3, (2, 64)), 1)
LENGTHS = np.array([11, 0])  # the second row of the batch sees nothing

# Sizes (B, L, S, H, G, K, Kv) and the head map.
SHAPES = {
    "odd": ((2, 21, 35, 2, 2, 8, 8), None),
    "one_query": ((2, 1, 35, 4, 2, 8, 8), None),
    "grouped": ((2, 32, 32, 4, 2, 8, 8), None),
    "mapped": ((2, 35, 21, 3, 2, 8, 12), (1, 0, 1)),
}

# Of lengths l and s: the mask, and the same set as a function of indices.
MASKS = {
    "full": lambda l, s: (Full(), lambda b, i, j: np.bool_(True)),
    "causal": lambda l, s: (Causal(s - l), lambda b, i, j: j <= i + s - l),
    "window": lambda l, s: (Window(9, 2), lambda b, i, j: (j >= i - 9) & (j <= i + 2)),
    "prefix": lambda l, s: (
        Prefix(7) | Diagonal(),
        lambda b, i, j: (j < 7) | (i == j),
    ),
    "prefix_array": lambda l, s: (Prefix(jnp.array(LENGTHS)), lambda b, i, j: j < LENGTHS[b]),
    "segments": lambda l, s: (
        Segments(jnp.array(IDS[:, :l]), jnp.array(IDS[:, :s])),
        lambda b, i, j: IDS[b, i] == IDS[b, j],
    ),
    "padding": lambda l, s: (
        KeyPadding(jnp.array(LENGTHS)) & Causal(),
        lambda b, i, j: (j < LENGTHS[b]) & (j <= i),
    ),
    "blocks": lambda l, s: (BlockSparse(TABLE, 5, 7), lambda b, i, j: TABLE[i // 5, j // 7]),
    "mask_mod": lambda l, s: (
        MaskMod(lambda idx: (idx.q * 3 + idx.k) % 5 < 3),
        lambda b, i, j: (i * 3 + j) % 5 < 3,
    ),
    "dense": lambda l, s: (
        DenseMask(jnp.array(SEEN[:, :, :l, :s])),
        lambda b, i, j: SEEN[:, :, :l, :s],
    ),
}


def cap(s, idx, aux):
    return aux["cap"] * jnp.tanh(s / aux["cap"])


def levels(p, idx, aux):
    return jnp.sqrt(p + jnp.square(aux["e"]))


# Of the sizes: the parts of a `Case`.
MODS = {
    "none": lambda b, h, l, s: {},
    "sink": lambda b, h, l, s: dict(sink=True),
    "capped": lambda b, h, l, s: dict(
        call=dict(score_mod=cap),
        aux={"cap": (Scalar, ())},
        score=lambda x, b, h, i, j, a: a["cap"] * np.tanh(x / a["cap"]),
    ),
    "alibi": lambda b, h, l, s: dict(
        call=dict(score_mod=lambda x, i, a: x - a["slope"] * jnp.abs(i.q - i.k)),
        aux={"slope": (PerHead, (h,))},
        score=lambda x, b, h, i, j, a: x - a["slope"][:, None, None] * np.abs(i - j),
    ),
    "rows_and_columns": lambda b, h, l, s: dict(
        call=dict(score_mod=lambda x, i, a: x + a["row"] * a["column"]),
        aux={"row": (PerQ, (b, 1, l)), "column": (PerK, (h, s))},
        score=lambda x, b, h, i, j, a: x + a["row"][..., None] * a["column"][:, None],
    ),
    "bias": lambda b, h, l, s: dict(
        call=dict(score_mod=lambda x, i, a: x + a["bias"]),
        aux={"bias": (Tile, (1, h, l, s))},
        score=lambda x, b, h, i, j, a: x + a["bias"],
    ),
    "band": lambda b, h, l, s: dict(
        call=dict(score_mod=lambda x, i, a: x + a["band"]),
        aux={"band": (Toeplitz, (h, l + s - 1))},
        score=lambda x, b, h, i, j, a: x + toeplitz(a["band"], l, s),
    ),
    "weights": lambda b, h, l, s: dict(
        call=dict(prob_mod=ProbMod(lambda p, i, a: p * a["band"], linear=True)),
        aux={"band": (Toeplitz, (l + s - 1,))},
        prob=lambda p, b, h, i, j, a: p * toeplitz(a["band"], l, s),
    ),
    "two_pass": lambda b, h, l, s: dict(
        call=dict(prob_mod=ProbMod(levels, linear=False)),
        aux={"e": (PerHead, (h,))},
        prob=lambda p, b, h, i, j, a: np.sqrt(p + np.square(a["e"])[:, None, None]),
    ),
}

PAIRS = [
    (mask, mod, list(SHAPES)[(i + j) % len(SHAPES)])
    for i, mask in enumerate(MASKS)
    for j, mod in enumerate(MODS)
]


def case_of(mask, mod, shape):
    sizes, head_map = SHAPES[shape]
    b, l, s, h, *_ = sizes
    made, visible = MASKS[mask](l, s)
    return Case(sizes, lambda: made, visible, head_map=head_map, **MODS[mod](b, h, l, s))


@pytest.mark.slow
@pytest.mark.parametrize(("mask", "mod", "shape"), PAIRS)
def test_every_mask_with_every_modification(mask, mod, shape):
    check(case_of(mask, mod, shape), "chunked")


def share(n):
    """A fifth of the pairs, in which are every mask and every modification."""
    place = {name: i for names in (MASKS, MODS) for i, name in enumerate(names)}
    return [pair for pair in PAIRS if (place[pair[0]] + 2 * place[pair[1]]) % 5 == n]


@pytest.mark.parametrize(
    ("impl", "mask", "mod", "shape"),
    [(impl, *pair) for n, impl in enumerate(KERNELS) for pair in share(n)],
)
def test_interpreted_kernels(impl, mask, mod, shape):
    check(case_of(mask, mod, shape), impl)
