"""Priors over classification data sets: linear rules, tables with two classes, few-shot images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxformer.papers.pfn.priors import GP, DataSet, Gamma, draw_gammas
from jaxformer.recipe import ConfigError


@dataclasses.dataclass(frozen=True)
class BNN:
    """Two classes from two linear layers, all weights and biases N(0, 1).

    There is no nonlinearity between the layers in the authors' code.
    """

    features: int = 3
    hidden: int = 5

    def __call__(self, key: jax.Array, T: int) -> DataSet:
        x_key, y_key, *keys = jax.random.split(key, 6)
        x = jax.random.normal(x_key, (T, self.features))
        h = x @ jax.random.normal(keys[0], (self.features, self.hidden))
        h = h + jax.random.normal(keys[1], (self.hidden,))
        logits = h @ jax.random.normal(keys[2], (self.hidden, 2))
        logits = logits + jax.random.normal(keys[3], (2,))
        y = jax.random.categorical(y_key, logits).astype(jnp.float32)
        return {"x": standardise(x), "y": y, "target": y}


def standardise(x: jax.Array) -> jax.Array:
    """Mean 0 and standard deviation 1 along the first axis."""
    return (x - x.mean(0)) / (x.std(0, ddof=1) + 1e-6)


def whole(share: jax.Array, low: int, high: int) -> jax.Array:
    """A share of 1 as an integer from low to high: low + round(share * (high - low + 1) - 0.5)."""
    return jnp.clip(low + jnp.round(share * (high - low + 1) - 0.5), low, high)


@dataclasses.dataclass(frozen=True)
class RandomMLP:
    """A random tanh network with noise after each layer but the first; x (T, F) -> (T,).

    Its width, the scale of its weights and of its noise are drawn first. All sizes are those of
    the widest network, whose surplus units are cut off.
    """

    layers: int = 3
    widest: int = 150
    weight_std: Gamma = (3.619, 1 / 0.0677)
    noise_std: Gamma = (1.866, 1 / 0.0528)

    def __call__(self, key: jax.Array, x: jax.Array) -> jax.Array:
        sizes_key, key = jax.random.split(key)
        # a / (a + b) is Beta(2, 4).
        laws = [(2.0, 1.0), (4.0, 1.0), self.weight_std, self.noise_std]
        a, b, weight_std, noise_std = draw_gammas(sizes_key, laws)
        used = jnp.arange(self.widest) < whole(a / (a + b), 2, self.widest)
        h = x
        for layer in range(self.layers):
            weight_key, noise_key, key = jax.random.split(key, 3)
            size = 1 if layer == self.layers - 1 else self.widest
            weights = weight_std * jax.random.normal(weight_key, (h.shape[1] + 1, size))
            h = h @ weights[:-1] + weights[-1]
            if layer:
                h = h + noise_std * jax.random.normal(noise_key, h.shape)
            if size > 1:
                h = jnp.tanh(h) * used
        return h[:, 0]


@dataclasses.dataclass(frozen=True)
class Tabular:
    """Balanced binary tables: a latent function of some of the features, cut at its median.

    The number of used features is drawn, the others are 0. `inputs(key, shape)` draws the rows,
    `latent(key, x)` the function. With `rescale` features are divided by used / total.
    """

    latent: Callable[[jax.Array, jax.Array], jax.Array] = RandomMLP()
    features: int = 60
    inputs: Callable[..., jax.Array] = jax.random.normal
    rescale: bool = False

    def __call__(self, key: jax.Array, T: int) -> DataSet:
        if T % 2:
            raise ConfigError(f"data.T: {T}; classes can only alternate if it is even")
        used_key, x_key, latent_key, order_key = jax.random.split(key, 4)
        used = whole(jax.random.beta(used_key, 1.0, 1.6), 2, self.features)
        is_used = jnp.arange(self.features) < used
        x = self.inputs(x_key, (T, self.features)) * is_used
        z = self.latent(latent_key, x)
        # By rank: a comparison with the median fails where XLA computes z twice, unlike.
        y = jnp.argsort(jnp.argsort(z)) >= T // 2
        x = standardise(x) * is_used
        x = x / (used / self.features) if self.rescale else x
        # One half has one label, the other the other: rows are taken from them in turn, so that
        # every context is balanced.
        order = jnp.argsort(y ^ jax.random.bernoulli(order_key)).reshape(2, -1).T.ravel()
        y = y[order].astype(jnp.float32)
        return {"x": x[order], "y": y, "target": y}


def tabular_bnn(features: int = 60, widest: int = 150) -> Tabular:
    """The authors' network prior of tables; `widest` bounds the width of the networks."""
    return Tabular(RandomMLP(widest=widest), features)


def tabular_gp(features: int = 60) -> Tabular:
    """The authors' Gaussian-process prior of tables, with their fitted hyperparameters.

    At that lengthscale rows are all but independent, so that labels hardly follow from x.
    """
    latent = GP(features, outputscale=2.316, lengthscale=1.480e-4, noise=1e-3)
    return Tabular(latent.function, features, jax.random.uniform, rescale=True)


@dataclasses.dataclass(frozen=True)
class Strokes:
    """Few-shot images: a class is 1 to 3 line strokes, an example of it moves and redraws them.

    T must be classes * shots + 1: every class has the same number of shots, in random order, and
    the last row is of any class.
    """

    classes: int = 5
    shots: int = 5
    size: int = 28

    @property
    def features(self) -> int:
        return self.size**2

    def __call__(self, key: jax.Array, T: int) -> DataSet:
        if self.classes * self.shots + 1 != T:
            raise ConfigError(
                f"data.T: {T}; {self.shots} shots of {self.classes} classes and a query are "
                f"{self.classes * self.shots + 1} rows"
            )
        class_key, order_key, last_key, image_key = jax.random.split(key, 4)
        strokes = jax.vmap(self._class)(jax.random.split(class_key, self.classes))
        shots = jnp.argsort(jax.random.uniform(order_key, (T - 1,))) % self.classes
        y = jnp.append(shots, jax.random.randint(last_key, (), 0, self.classes)).astype(jnp.int32)
        of_rows = jax.tree.map(lambda s: s[y], strokes)
        images = jax.vmap(self._image)(jax.random.split(image_key, T), of_rows)
        return {"x": images.reshape(T, -1), "y": y, "target": y}

    def _class(self, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Starts and ends (3, 2) of strokes on a canvas of 28 x 28, and which are drawn (3,)."""
        count_key, key = jax.random.split(key)
        # The first of 16 strokes that ends inside; all fail less often than once in 10^4.
        u = jax.random.uniform(key, (3, 16, 4))
        start, length, angle = 2 + 23 * u[..., :2], 5 + 15 * u[..., 2], 2 * jnp.pi * u[..., 3]
        end = start + length[..., None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
        inside = ((end >= 0) & (end <= 27)).all(-1)
        first = jnp.argmax(inside, -1)
        start, end = (p[jnp.arange(3), first] for p in (start, end))
        return start, end, jnp.arange(3) < jax.random.randint(count_key, (), 1, 4)

    def _image(self, key: jax.Array, strokes: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        """(size, size) in [0, 1]: the class's strokes with a width, an offset and new ends."""
        start, end, drawn = strokes
        moved_key, grey_key = jax.random.split(key)
        u = jax.random.uniform(moved_key, (9,))
        width, offset, moved = 1 + jnp.floor(4 * u[0]), 8 * u[1:3] - 4, 4 * u[3:].reshape(3, 2) - 2
        a, b = start + offset, end + offset + moved
        axis = jnp.arange(self.size) * (28 / self.size)
        pixels = jnp.stack(jnp.meshgrid(axis, axis, indexing="ij"), -1)
        along = b - a
        share = ((pixels[:, :, None] - a) * along).sum(-1) / (jnp.square(along).sum(-1) + 1e-6)
        nearest = a + jnp.clip(share, 0, 1)[..., None] * along
        distance = jnp.sqrt(jnp.square(pixels[:, :, None] - nearest).sum(-1))
        # The soft edge, one pixel wide, stands for the authors' blur.
        ink = jnp.where(drawn, jnp.clip(width / 2 + 0.5 - distance, 0, 1), 0).max(-1)
        grey = jax.random.uniform(grey_key, ink.shape, minval=200 / 255, maxval=1.0)
        return ink * grey
