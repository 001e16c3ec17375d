"""A small regression problem for the tests of the loop."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxformer.data.base import DeviceData
from jaxformer.recipe import LossOutput, Mean, Phase, Recipe
from jaxformer.train import optim
from jaxformer.train.updates import GradientUpdate


@dataclasses.dataclass(frozen=True)
class Regression:
    """Two layers; `poison` makes the loss NaN for rows whose x[0] exceeds it."""

    poison: float = 1e9

    def init(self, key, batch):
        kernel = 0.3 * jax.random.normal(key, (batch["x"].shape[1], 4))
        return {
            "first": {"kernel": kernel, "bias": jnp.zeros(4)},
            "second": {"kernel": jnp.ones((4, 1))},
        }, {"seen": jnp.zeros(())}

    def loss(self, params, extra, batch, *, key, train):
        hidden = jnp.tanh(batch["x"] @ params["first"]["kernel"] + params["first"]["bias"])
        y = (hidden @ params["second"]["kernel"])[:, 0]
        error = jnp.where(batch["x"][:, 0] > self.poison, jnp.nan, (y - batch["y"]) ** 2)
        mean = Mean.of(error, batch.get("weight"))
        seen = extra["seen"] + len(y) if train else extra["seen"]
        return LossOutput(mean.value(), mean.weight, {"error": mean}, {"seen": seen})


def draw(step_key, row_keys):
    x = jax.vmap(lambda key: jax.random.normal(key, (3,)))(row_keys)
    return {"x": x, "y": x.sum(1)}


def optimizer(steps, factory=None, **more):
    rate = optim.schedule(1e-2, steps, warmup=2)
    return optim.optimizer(factory or optim.adamw(), rate, **{"clip": 1.0, **more})


def phase(name, steps, *, task=None, seed=0, batch_size=16, factory=None, accumulate=1, ema=None):
    update = GradientUpdate(task or Regression(), optimizer(steps, factory), accumulate, ema)
    return Phase(name, steps, DeviceData(draw, batch_size, seed), update)


def recipe(*phases, **more):
    return Recipe(Regression(), phases or (phase("train", 20),), **more)
