"""BCT: every parameter and every intermediate value of an encoder in blocks of small integers.

Symbols of the paper's setting: k bits, blocks of bm x bn, shift e, codes c with x^ = c 2^-e. What
is compressed where is a `Scheme`; `Simulated` and `Integer` are two ways to compute with it, both
interceptions of the plain model (with its attention open: `Unfused`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer import paths
from jaxformer.compress.block_arithmetic import (
    Fixed,
    add,
    add_bias,
    check_integer,
    compress_fixed,
    fixed,
    headroom,
    is_power_of_four,
    look_up,
    matmul,
    moments,
    softmax,
)
from jaxformer.compress.blocks import (
    OFF,
    BlockSpec,
    compress,
    decompress,
    largest_across,
    pack,
    quantise,
)
from jaxformer.compress.intercepted import Intercepted
from jaxformer.compress.matrix import PlainMap, as_matrix, from_matrix
from jaxformer.errors import ConfigError
from jaxformer.nn.activation import FUNCTIONS, Activation
from jaxformer.nn.attention import Fused, Mix, Scores, Softmax, Unfused
from jaxformer.nn.block import Residual, unstack_layers
from jaxformer.nn.einsum import Axes, Einsum
from jaxformer.nn.embed import Embed, TypedEmbed
from jaxformer.nn.heads import MeanPool
from jaxformer.nn.make import swap
from jaxformer.nn.norm import LayerNorm, Norm
from jaxformer.nn.position import LearnedPosition, SinusoidalPosition

# ------------------------------------------------------------------------ what is compressed how


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The blocks of matrices, of vectors (biases and gains), of values, and of probabilities."""

    weights: BlockSpec
    vectors: BlockSpec
    values: BlockSpec
    probs: BlockSpec

    @property
    def row(self) -> BlockSpec:
        """Values with one shift for a row: what norms and softmax bring them to."""
        return dataclasses.replace(self.values, columns=None)


BITS = {"float": (OFF, OFF), "int8": (8, 8), "int4/8": (4, 8), "fp8": (8, 8)}
GRANULARITIES = ("block", "row", "tensor")


def scheme(
    name: str,
    granularity: str = "block",
    *,
    weight_block: tuple[int, int] = (64, 64),
    value_block: int = 64,
    shift_bits: int = 8,
    probs_unsigned: bool = False,
) -> Scheme:
    """The paper's configurations, and the same bits with a shift for each row or tensor.

    `weight_block` is bm x bn of matrices (rows are outputs); values have blocks of 1 x bn.

    Raises:
        ConfigError: no such name or granularity, or a block that is not allowed.
    """
    if name not in BITS:
        raise ConfigError(f"compress.bits={name!r}: must be one of {', '.join(BITS)}")
    if granularity not in GRANULARITIES:
        raise ConfigError(
            f"compress.granularity={granularity!r}: must be one of {', '.join(GRANULARITIES)}"
        )
    weight_bits, value_bits = BITS[name]
    number = "e4m3" if name == "fp8" else "int"
    rows = {"block": weight_block[0], "row": 1, "tensor": None}[granularity]
    columns = weight_block[1] if granularity == "block" else None
    height = None if granularity == "tensor" else 1
    width = value_block if granularity == "block" else None
    values = BlockSpec(height, width, value_bits, shift_bits, number)
    unsigned = probs_unsigned and number == "int"
    return Scheme(
        weights=BlockSpec(rows, columns, weight_bits, shift_bits, number),
        vectors=values,
        values=values,
        probs=dataclasses.replace(values, number="unsigned") if unsigned else values,
    )


def spec_of(name: str, leaf: Any, scheme: Scheme) -> BlockSpec:
    """How a parameter is compressed: biases and gains as vectors, all else as a matrix."""
    vector = name.rpartition("/")[2] in ("bias", "scale", "layer_scale")
    return scheme.vectors if vector or leaf.ndim < 2 else scheme.weights


def compress_parameters(params: Any, scheme: Scheme) -> Any:
    """Every parameter as what its codes say, in float32: once, from the weights alone."""

    def one(name: str, x: jax.Array) -> jax.Array:
        spec, matrix = spec_of(name, x, scheme), as_matrix(name, x)
        run = functools.partial(quantise, spec=spec)
        layers = matrix.ndim == 3 and name.endswith("/kernel")
        return from_matrix(name, (jax.vmap(run) if layers else run)(matrix), x.shape)

    return paths.map_named(one, params)


def packed(params: Any, scheme: Scheme) -> dict[str, Any]:
    """{"name:codes", "name:shifts"}: the bytes of a compressed model, to be saved.

    Raises:
        ConfigError: a parameter that its shifts cannot hold, or that is not finite.
    """
    found: dict[str, Any] = {}
    for name, x in paths.leaves(unstack_layers(params)).items():
        spec = spec_of(name, x, scheme)
        if spec.bits == OFF:
            found[f"{name}:float"] = x
            continue
        for part, array in pack(compress(as_matrix(name, x), spec), spec).items():
            found[f"{name}:{part}"] = array
    return found


# -------------------------------------------------------------------------------- interceptions


def compressed(model: Any, arithmetic: Simulated) -> Intercepted:
    """The model with everything between its parameters compressed too."""
    return Intercepted(swap(model, Fused, Unfused), (arithmetic,))


def _flat(x: jax.Array, axes: int) -> jax.Array:
    """The last so many axes as one: the features of a token."""
    return x.reshape(*x.shape[: x.ndim - axes], -1) if axes != 1 else x


@dataclasses.dataclass(frozen=True)
class Simulated:
    """Compression of all intermediates as rounding in float32, after every operation.

    Its gradient is that of the model without rounding.
    """

    scheme: Scheme

    def __call__(self, method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.module.is_initializing():
            return method(*args, **kwargs)
        return self.around(method, args, kwargs, context)

    def around(self, method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """The method with what goes in and what comes out of it compressed."""
        module, name = context.module, context.method_name
        if isinstance(module, Einsum):
            return self.linear(method, module, *args) if name == "contract" else method(*args)
        if isinstance(module, Residual):
            run = self.join if name == "join" else None
            return run(method, module, *args, **kwargs) if run else method(*args, **kwargs)
        if name != "__call__":
            return method(*args, **kwargs)
        if isinstance(module, Scores):
            return self.scores(method, module, *args)
        if isinstance(module, Softmax):
            return self.softmax(method, module, *args)
        if isinstance(module, Mix):
            return self.mix(method, module, *args)
        if isinstance(module, Activation):
            return self.activation(method, module, *args)
        if isinstance(module, Norm):
            return self.norm(method, module, *args)
        if isinstance(module, LearnedPosition | SinusoidalPosition):
            return self.position(method, module, *args, **kwargs)
        if isinstance(module, Embed | TypedEmbed | MeanPool):
            return self.values(module, "output", method(*args, **kwargs))
        return method(*args, **kwargs)

    def rounded(
        self, module: Any, place: str, x: jax.Array, spec: BlockSpec, heads: int | None = None
    ) -> jax.Array:
        """Values at a place of a module, in blocks; here each by its own largest value.

        `heads` is the axis of heads, where it is not among the features.
        """
        del module, place, heads
        return quantise(x, spec)

    def values(
        self, module: Any, place: str, x: jax.Array, axes: int = 1, heads: int | None = None
    ) -> jax.Array:
        """Values in blocks along their features, the last so many axes."""
        flat = _flat(x, axes)
        return self.rounded(module, place, flat, self.scheme.values, heads).reshape(x.shape)

    def linear(self, method: Any, module: Einsum, x: Any, kernel: Any, bias: Any) -> jax.Array:
        """Output heads, which ask for float32, stay as they are summed."""
        axes = Axes.of(module.equation)
        inputs = sum(axis not in axes.out for axis in axes.x)
        outputs = sum(axis not in axes.x for axis in axes.out)
        y = method(self.values(module, "input", x, inputs), kernel, bias)
        return y if module.out_dtype is not None else self.values(module, "output", y, outputs)

    def scores(self, method: Any, module: Scores, q: jax.Array, k: jax.Array) -> jax.Array:
        """Not compressed before the softmax, which knows what is visible."""
        q, k = (self.values(module, x, y, heads=2) for x, y in (("query", q), ("key", k)))
        return method(q, k)

    def softmax(self, method: Any, module: Softmax, s: jax.Array, visible: jax.Array) -> jax.Array:
        s = jnp.where(visible, s, 0.0)  # what is masked enters no block
        s = self.values(module, "scores", s, heads=1)
        p = method(self.rounded(module, "row", s, self.scheme.row, 1), visible)
        return self.rounded(module, "probabilities", p, self.scheme.probs, 1)

    def mix(self, method: Any, module: Mix, p: jax.Array, v: jax.Array) -> jax.Array:
        p = self.rounded(module, "probabilities", p, self.scheme.probs, 1)
        y = method(p, self.values(module, "value", v, heads=2))
        return self.values(module, "output", y, 2)

    def activation(self, method: Any, module: Activation, x: jax.Array) -> jax.Array:
        return self.values(module, "output", method(self.values(module, "input", x)))

    def norm(self, method: Any, module: Norm, x: jax.Array) -> jax.Array:
        row = self.rounded(module, "row", self.values(module, "input", x), self.scheme.row)
        return self.values(module, "output", method(row))

    def position(self, method: Any, module: Any, x: jax.Array, *args: Any, **kw: Any) -> jax.Array:
        return self.values(module, "output", method(x, *args, **kw))

    def join(self, method: Any, module: Residual, x: Any, y: Any, **kwargs: Any) -> jax.Array:
        """A residual sum, compressed before a norm reads it."""
        return self.values(module, "sum", method(x, y, **kwargs))


RANGES = "ranges"  # of a state's `extra`: the largest values of blocks, at every place of a module


@dataclasses.dataclass(frozen=True)
class Static(Simulated):
    """The same with shifts that were fixed beforehand, the least that calibration has seen.

    Blocks are of one token's features, so there is one shift for each block of features (and each
    head), over all tokens, padding too, and examples. The state has their largest values: the shift
    of the largest is the least. While the collection is mutable values are seen, and are rounded as
    they will be later; then what is larger is clipped.

    Raises:
        ConfigError: the state has no ranges.
    """

    def __call__(self, method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        return self.around(method, args, kwargs, context)  # also where variables are made

    def rounded(
        self, module: Any, place: str, x: jax.Array, spec: BlockSpec, heads: int | None = None
    ) -> jax.Array:
        if spec.bits == OFF:
            return x

        def look(x: jax.Array) -> jax.Array:
            return largest_across(x, spec)

        def run(x: jax.Array, seen: jax.Array) -> jax.Array:
            return quantise(x, spec, seen)

        if heads is not None and spec.rows is not None:
            look, run = jax.vmap(look, heads), jax.vmap(run, (heads, 0), heads)
        if module.is_initializing():
            module.put_variable(RANGES, place, jnp.zeros(jax.eval_shape(look, x).shape))
            return x
        if not module.has_variable(RANGES, place):
            name = "/".join((*module.path, place))
            raise ConfigError(f"{name}: is not calibrated; run the calibration phase first")
        seen = module.get_variable(RANGES, place)
        if module.is_mutable_collection(RANGES):
            seen = jnp.maximum(seen, look(x))
            module.put_variable(RANGES, place, seen)
        return run(x, seen)


@dataclasses.dataclass(frozen=True)
class Integer(Simulated):
    """The same with int8 codes: products and sums in int32, functions by table, shifts between.

    Between modules codes travel as the floats that they stand for, from which they are read off
    again without loss. The root of a norm's variance and its gains are computed in float32, and so
    is the factor 1 / sqrt(d) of scores where it is no power of two.

    Raises:
        ConfigError: codes that are no integers, or a layer whose sums may overflow.
    """

    def __post_init__(self) -> None:
        check_integer(self.scheme.weights, self.scheme.vectors, self.scheme.values)

    def read(self, x: jax.Array, spec: BlockSpec | None = None) -> Fixed:
        """The codes of values that lie on their grid; others are rounded to it."""
        spec = spec or self.scheme.values
        return fixed(compress(x, spec), spec)

    def write(self, x: Fixed, spec: BlockSpec | None = None) -> jax.Array:
        spec = spec or self.scheme.values
        return decompress(compress_fixed(x, spec), spec)

    def linear(self, method: Any, module: Einsum, x: Any, kernel: Any, bias: Any) -> jax.Array:
        plain = PlainMap(module.equation)
        w = plain.matrix(kernel)
        x, spec = plain.rows(x), self.scheme.weights
        room = headroom(x.shape[-1], self.scheme.values, spec)
        rows = x.reshape(-1, x.shape[-1])
        widths = [s.columns or x.shape[-1] for s in (self.scheme.values, spec)]
        y = matmul(self.read(rows), self.read(w, spec), min(widths), room)
        if bias is not None:
            b = self.read(bias.reshape(-1), self.scheme.vectors)
            b = Fixed(*(jnp.broadcast_to(part, y.n.shape) for part in b))
            y = add_bias(y, b)
        y = y.value if module.out_dtype is not None else self.write(y)
        return y.reshape(*x.shape[:-1], *module.features)

    def scores(self, method: Any, module: Scores, q: jax.Array, k: jax.Array) -> jax.Array:
        room = headroom(q.shape[-1], self.scheme.values, self.scheme.values)
        q, k = (Fixed(*(part.swapaxes(1, 2) for part in self.read(x))) for x in (q, k))
        size = q.n.shape[-1]
        s = matmul(q, k, self.scheme.values.columns, room)
        if module.scale is None and is_power_of_four(size):
            return Fixed(s.n, s.e + (size.bit_length() - 1) // 2).value
        return s.value * (module.scale or size**-0.5)

    def softmax(self, method: Any, module: Softmax, s: jax.Array, visible: jax.Array) -> jax.Array:
        s = self.read(jnp.where(visible, s, 0.0))
        return self.write(softmax(s, visible, self.scheme.values.bits), self.scheme.probs)

    def mix(self, method: Any, module: Mix, p: jax.Array, v: jax.Array) -> jax.Array:
        room = headroom(p.shape[-1], self.scheme.probs, self.scheme.values)
        p = self.read(p, self.scheme.probs)
        v = Fixed(*(jnp.moveaxis(part, 1, -1) for part in self.read(v)))  # (B, H, K, S)
        inner = min(room, 8)  # tokens of a block have shifts of their own
        y = matmul(p, v, self.scheme.values.columns, room - inner, inner)
        y = Fixed(*(jnp.moveaxis(part, 1, 2) for part in y))
        flat = Fixed(*(_flat(part, 2) for part in y))
        return self.write(flat).reshape(y.n.shape)

    def activation(self, method: Any, module: Activation, x: jax.Array) -> jax.Array:
        spec = self.scheme.values
        return quantise(look_up(FUNCTIONS[module.function], compress(x, spec), spec), spec)

    def norm(self, method: Any, module: Norm, x: jax.Array) -> jax.Array:
        if not isinstance(module, LayerNorm):
            return super().norm(method, module, x)
        codes, mean, variance = moments(self.read(x))
        unit = 4.0 ** codes.e[..., :1].astype(jnp.float32)
        y = (codes.n - mean) * jax.lax.rsqrt(variance + module.epsilon * unit)
        if module.use_scale:
            y = y * module.get_variable("params", "scale")
        if module.use_bias:
            y = y + module.get_variable("params", "bias")
        return self.values(module, "output", y)

    def position(self, method: Any, module: Any, x: jax.Array, *args: Any, **kw: Any) -> jax.Array:
        rows = method(jnp.zeros_like(x), *args, **kw)
        return self.write(add(self.read(x), self.read(rows)))

    def join(self, method: Any, module: Residual, x: Any, y: Any, **kwargs: Any) -> jax.Array:
        if module.layer_scale is not None or kwargs.get("train"):
            return super().join(method, module, x, y, **kwargs)
        return self.write(add(self.read(x), self.read(y)))
