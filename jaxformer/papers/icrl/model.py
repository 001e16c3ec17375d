"""A transformer that acts: a bandit's history as tokens, and the expert's actions as labels.

Step t has two tokens, one that shows the arms and one with what came of it (the code's layout):

    [arms (A d), 0 (A), 0, 1, 2t - 1]    [0 (A d), one-hot a_t (A), r_t, 1, 2t]

The action at t is read at the first of them, which sees the steps before t only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxformer.decision.rollouts import Policy
from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import Causal
from jaxformer.models.encoder import Encoder
from jaxformer.models.transformer import Transformer, require
from jaxformer.nn.einsum import Einsum, fan_in_normal
from jaxformer.nn.make import Make
from jaxformer.nn.relu_attention import ReLUAttention
from jaxformer.parallel.sharding import constrain
from jaxformer.recipe import Batch, Extra, LossOutput, Mean, Params
from jaxformer.tasks import linen
from jaxformer.tasks.losses import cross_entropy, is_correct

Array = jax.Array
EMBED = "...F,FD->...D"


def tokens(arms: Array, actions: Array, rewards: Array) -> Array:
    """(B, 2T, A d + A + 3) of arms (B, A, d), actions (B, T) and rewards (B, T).

    Raises:
        ConfigError: a reward that is known and not finite.
    """
    if not isinstance(rewards, jax.core.Tracer) and not np.isfinite(np.asarray(rewards)).all():
        raise ConfigError("rewards: some are NaN or infinite; give finite ones")
    batch, arm_count, dimension = arms.shape
    steps = actions.shape[1]
    shown = jnp.broadcast_to(arms.reshape(batch, 1, -1), (batch, steps, arm_count * dimension))
    one_hot = jax.nn.one_hot(actions, arm_count)
    number = jnp.broadcast_to(
        jnp.arange(1.0, 2 * steps + 1).reshape(1, steps, 2), (batch, steps, 2)
    )
    one, zero = jnp.ones((batch, steps, 1)), jnp.zeros((batch, steps, 1))
    question = [shown, jnp.zeros_like(one_hot), zero, one, number[..., :1]]
    feedback = [jnp.zeros_like(shown), one_hot, rewards[..., None], one, number[..., 1:]]
    pair = jnp.stack([jnp.concatenate(question, -1), jnp.concatenate(feedback, -1)], 2)
    return pair.reshape(batch, 2 * steps, -1)


class BanditTransformer(nn.Module):
    """Histories to the logits (B, T, A) of the action at every step, from the steps before it."""

    decoder: Make

    @nn.compact
    def __call__(
        self, arms: Array, actions: Array, rewards: Array, *, train: bool = False
    ) -> Array:
        x_BxLxF = tokens(arms, actions, rewards)
        x_BxLxD = self.decoder(name="decoder")(x_BxLxF, mask=Causal(), train=train)
        head = Einsum("...D,DA->...A", (arms.shape[1],), out_dtype=jnp.float32, name="head")
        return constrain(head(x_BxLxD[:, ::2]), ("batch", "length", "vocab"))


def relu_trunk(width: int, depth: int, **options: object) -> tuple[Transformer, Make]:
    """Post-norm blocks of ReLU attention and an MLP no wider than the stream."""
    trunk = Transformer(width, depth, heads=1, hidden=width, mlp="relu", order="post", **options)
    return trunk, Make(ReLUAttention)


def softmax_trunk(
    width: int, depth: int, heads: int, **options: object
) -> tuple[Transformer, None]:
    """GPT-2's blocks."""
    return Transformer(width, depth, heads, mlp="gelu_tanh", **options), None


@dataclasses.dataclass(frozen=True)
class SmallPosition:
    """Initial weights of the embedding whose last input, the number of a token, counts as up to 1.

    As large as the numbers are, what was done and its reward would be a hundredth of the stream.
    """

    positions: int

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        kernel = fan_in_normal(EMBED)(key, shape, dtype)
        return kernel.at[-1].divide(self.positions)


def bandit_transformer(trunk: Transformer, mixer: Make | None, positions: int) -> BanditTransformer:
    """A decoder of histories of at most `positions` tokens, two to a step."""
    embed = Make(
        Einsum,
        equation=EMBED,
        features=(trunk.width,),
        dtype=trunk.compute_dtype,
        kernel_init=SmallPosition(positions),
    )
    decoder = Make(
        Encoder,
        embed=embed,
        stack=trunk.stack(mixer),
        position=trunk.stream_position(positions),
        norm=trunk.final_norm(),
        dropout=trunk.dropout,
    )
    return BanditTransformer(decoder)


# The expert's actions abar_t (section 2): who is imitated.


def logged(batch: Batch) -> Array:
    """Algorithm distillation: what the controller did, (B, T)."""
    return batch["actions"]


def optimal(batch: Batch) -> Array:
    """Decision pre-training: the best arm, at every step, (B, T)."""
    return jnp.broadcast_to(batch["best"][:, None], batch["actions"].shape)


def estimated(batch: Batch) -> Array:
    """Approximate DPT: the arm with the best mean of the whole trajectory, (B, T)."""
    tried = jax.nn.one_hot(batch["actions"], batch["arms"].shape[1])
    count = tried.sum(1)
    means = (tried * batch["rewards"][..., None]).sum(1) / jnp.maximum(count, 1)
    best = jnp.where(count > 0, means, -jnp.inf).argmax(-1)
    return jnp.broadcast_to(best[:, None], batch["actions"].shape)


LABELS: Mapping[str, Callable[[Batch], Array]] = {
    "ad": logged,
    "dpt": optimal,
    "approximate": estimated,
}


@dataclasses.dataclass(frozen=True)
class Imitation:
    """The task: -log Alg_theta(abar_t | D_{t-1}), the mean over steps.

    Batches are those of `jaxformer.decision.rollouts.Trajectories`; `labels` is a name of `LABELS`.

    Raises:
        ConfigError: there are no such labels.
    """

    model: BanditTransformer
    labels: str = "ad"

    def __post_init__(self) -> None:
        require("data.labels", self.labels, LABELS)

    def init(self, key: Array, batch: Batch) -> tuple[Params, Extra]:
        return linen.init(self.model, key, *(x[:1] for x in history(batch)))

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: Array, train: bool
    ) -> LossOutput:
        logits, extra = linen.apply(
            self.model, params, extra, *history(batch), key=key, train=train
        )
        labels = LABELS[self.labels](batch)
        weight = batch.get("weight")
        weight = None if weight is None else weight[:, None]
        loss = Mean.of(cross_entropy(logits, labels), weight)
        accuracy = Mean.of(is_correct(logits, labels), weight)
        return LossOutput(loss.value(), loss.weight, {"loss": loss, "accuracy": accuracy}, extra)

    def predict(self, params: Params, extra: Extra, batch: Batch, *, key: Array) -> Array:
        """Logits (B, T, A)."""
        return linen.apply(self.model, params, extra, *history(batch), key=key, train=False)[0]

    def policy(self, params: Params, extra: Extra) -> Policy:
        """The model as a controller's policy, on a history padded to any length."""

        def logits(arms: Array, actions: Array, rewards: Array, step: Array) -> Array:
            batch = {"arms": arms[None], "actions": actions[None], "rewards": rewards[None]}
            return self.predict(params, extra, batch, key=jax.random.key(0))[0, step]

        return logits


def history(batch: Batch) -> tuple[Array, Array, Array]:
    return batch["arms"], batch["actions"], batch["rewards"]
