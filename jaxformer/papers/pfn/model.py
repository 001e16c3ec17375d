"""The set transformer: context rows (x, y) and query rows x in, one output per row.

No position is encoded, so the answer to a query depends on the context as a set. Axes: B data
sets, T rows, F features, D width; n rows of each data set are context, the others queries.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxformer import paths
from jaxformer.kernels.attention import Diagonal, Mask, Prefix
from jaxformer.models.transformer import Transformer
from jaxformer.nn.activation import GELU
from jaxformer.nn.einsum import Einsum
from jaxformer.nn.embed import Embed
from jaxformer.nn.make import Make
from jaxformer.parallel.sharding import constrain
from jaxformer.recipe import Params


class NumberEmbed(nn.Module):
    """y (B, T) to (B, T, D), linear with a bias."""

    width: int

    @nn.compact
    def __call__(self, y_BxT: jax.Array) -> jax.Array:
        y_BxTx1 = y_BxT[..., None].astype(jnp.float32)
        return Einsum("...Y,YD->...D", (self.width,), name="linear")(y_BxTx1)


class Standardised(nn.Module):
    """`encoder` of inputs that have this mean and standard deviation under the prior."""

    encoder: Make
    mean: float = 0.5  # of numbers from [0, 1]
    std: float = 12**-0.5

    @nn.compact
    def __call__(self, x_BxTxF: jax.Array) -> jax.Array:
        return self.encoder(name="encoder")((x_BxTxF - self.mean) / self.std)


class SetTransformer(nn.Module):
    """Outputs (B, T, n_out) of all rows; those of the queries are predictions.

    In one call rows 0 .. n - 1 are the context: give x, y and n (B,); y of the queries is not
    read. In two calls with decode=True the keys and values of the context are kept in the
    collection "cache": first its rows with y (those from n on are padding), then any queries with
    y=None and the same n. With `query_attends_self` a query sees the context and itself (the
    paper's code), without it the context alone (its successor).

    Raises:
        ValueError: n < 0 or n >= T in one call (seen where n is not traced).
    """

    stack: Make
    x_encoder: Make
    y_encoder: Make
    hidden: int  # of the head
    outputs: int
    query_attends_self: bool = True
    dtype: Any = jnp.float32  # of the residual stream; x and y are read in float32

    @nn.compact
    def __call__(
        self,
        x_BxTxF: jax.Array,
        y_BxT: jax.Array | None,
        n_B: jax.Array,
        *,
        train: bool = False,
        decode: bool = False,
    ) -> jax.Array:
        T = x_BxTxF.shape[1]
        e_BxTxD = self.x_encoder(name="x_encoder")(x_BxTxF)
        if y_BxT is not None:
            check_context(n_B, T if decode else T - 1)
            known = jnp.arange(T) < n_B[:, None]
            # Zero before the encoder as well: 0 * NaN would reach the gradients.
            y = self.y_encoder(name="y_encoder")(jnp.where(known, y_BxT, 0))
            e_BxTxD = e_BxTxD + jnp.where(known[..., None], y, 0)
        mask: Mask = Prefix(n_B)
        if self.query_attends_self:
            mask = mask | Diagonal()
        e_BxTxD = constrain(e_BxTxD.astype(self.dtype), ("batch", "length", "embed"))
        z_BxTxD = self.stack(name="stack")(e_BxTxD, mask=mask, train=train, decode=decode)
        h_BxTxH = Einsum("...D,DH->...H", (self.hidden,), name="up")(z_BxTxD)
        h_BxTxH = GELU(name="activation")(h_BxTxH)
        head = Einsum("...H,HO->...O", (self.outputs,), out_dtype=jnp.float32, name="head")
        return constrain(head(h_BxTxH), ("batch", "length", "vocab"))


def check_context(n_B: jax.Array, most: int) -> None:
    """Raise a ValueError unless 0 <= n <= most; n that is traced cannot be checked."""
    if isinstance(n_B, jax.core.Tracer):
        return
    wrong = np.asarray(n_B)[(np.asarray(n_B) < 0) | (np.asarray(n_B) > most)]
    if wrong.size:
        raise ValueError(f"n: {wrong[0]} rows of context; give from 0 to {most}")


def set_transformer(
    trunk: Transformer,
    *,
    outputs: int,
    classes: int | None = None,
    unit_inputs: bool = False,
    query_attends_self: bool = True,
) -> SetTransformer:
    """A `SetTransformer` on `trunk`, whose blocks are post-norm; the head is as wide as its MLPs.

    y are numbers, or labels of `classes`. `unit_inputs` standardises features from [0, 1].
    """
    x_encoder = Make(Einsum, equation="...F,FD->...D", features=(trunk.width,))
    numbers = Make(NumberEmbed, width=trunk.width)
    return SetTransformer(
        stack=trunk.stack(),
        x_encoder=Make(Standardised, encoder=x_encoder) if unit_inputs else x_encoder,
        y_encoder=Make(Embed, vocabulary=classes, width=trunk.width) if classes else numbers,
        hidden=trunk.hidden or 4 * trunk.width,
        outputs=outputs,
        query_attends_self=query_attends_self,
        dtype=trunk.compute_dtype,
    )


def zero_branches(params: Params) -> Params:
    """Parameters whose branches add nothing yet: the maps out of attention and MLP are 0."""

    def start(name: str, leaf: jax.Array) -> jax.Array:
        return jnp.zeros_like(leaf) if re.search(r"(mixer/out|mlp/down)/", name) else leaf

    return paths.map_named(start, params)


def input_features(params: Params) -> int:
    """F, read off the parameters."""
    encoder = params["x_encoder"]
    return encoder.get("encoder", encoder)["kernel"].shape[0]


# Prediction in two calls: a context once, then any number of queries.


def read_context(
    model: SetTransformer,
    params: Params,
    x_BxSxF: jax.Array,
    y_BxS: jax.Array,
    n_B: jax.Array,
    queries: int,
) -> Any:
    """The keys and values of the context, with room for `queries` rows at a time.

    Rows from n on are padding.
    """
    rows = x_BxSxF.shape[1] + queries

    def empty() -> Any:
        x = jnp.zeros((len(n_B), rows, x_BxSxF.shape[2]))
        y = jnp.zeros((len(n_B), rows), y_BxS.dtype)
        return model.init(jax.random.key(0), x, y, jnp.zeros_like(n_B), decode=True)["cache"]

    # All variables of the cache start as zeros.
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(empty))
    variables = {"params": params, "cache": cache}
    _, changed = model.apply(variables, x_BxSxF, y_BxS, n_B, decode=True, mutable=["cache"])
    return changed["cache"]


def answer(
    model: SetTransformer, params: Params, cache: Any, x_BxQxF: jax.Array, n_B: jax.Array
) -> jax.Array:
    """Outputs (B, Q, n_out) for queries given what `read_context` kept."""
    variables = {"params": params, "cache": cache}
    return model.apply(variables, x_BxQxF, None, n_B, decode=True, mutable=["cache"])[0]
