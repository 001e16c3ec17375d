"""Whole training steps: time and model FLOPs utilisation (MFU).

FLOPs of a model are 6 per parameter of a matrix product and position, and 12 per score and feature
of attention, where causal attention has half of the scores (Chowdhery et al. 2022, arXiv
2204.02311, appendix B, with causal attention halved). Recomputation does not count.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from jaxformer import paths
from jaxformer.bench.clock import Run, race
from jaxformer.bench.peak import matmul_rate
from jaxformer.bench.stage import Stage
from jaxformer.kernels.attention import Causal, Full, explain
from jaxformer.models.dit import dit
from jaxformer.models.lm import decoder_lm
from jaxformer.models.transformer import Transformer
from jaxformer.models.vit import vit
from jaxformer.tasks.diffuse import ClassLabel, DiffusionTask, Latents
from jaxformer.tasks.gaussian_diffusion import GaussianDiffusion
from jaxformer.tasks.losses import cross_entropy

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # bfloat16 FLOP/s without sparsity


@dataclasses.dataclass(frozen=True)
class Training:
    """A model on random inputs: what to build, and how many positions of what it reads."""

    name: str
    trunk: Transformer
    batch: int
    length: int  # positions in attention
    vocabulary: int = 0  # of a language model
    image: int = 0  # side of the images of a classifier
    patch: int = 16

    @property
    def causal(self) -> bool:
        return bool(self.vocabulary)

    def model(self) -> nn.Module:
        if self.causal:
            return decoder_lm(self.trunk, vocabulary=self.vocabulary, length=self.length)
        return vit(self.trunk, image_size=self.image, patch=self.patch, classes=1000)

    def data(self) -> tuple[jax.Array, jax.Array]:
        """Inputs and labels."""
        one, two = jax.random.split(jax.random.key(0))
        if self.causal:
            tokens = jax.random.randint(one, (self.batch, self.length + 1), 0, self.vocabulary)
            return tokens[:, :-1], tokens[:, 1:]
        images = jax.random.normal(one, (self.batch, self.image, self.image, 3), jnp.bfloat16)
        return images, jax.random.randint(two, (self.batch,), 0, 1000)

    def init(self, key: jax.Array, inputs: jax.Array) -> Any:
        return self.model().init(key, inputs)["params"]

    def loss(self, params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        return cross_entropy(self.model().apply({"params": params}, inputs), labels).mean()

    def flops(self, params: Any) -> float:
        """Of one step, forward and backward."""
        positions = self.batch * self.length
        # Tables are looked up, and a classifier's head sees one position of many.
        tables = ("position", "embed/embedding") if self.causal else ("encoder/position", "head")
        products = sum(
            math.prod(leaf.shape)
            for name, leaf in paths.leaves(params).items()
            if leaf.ndim > 1 and not name.startswith(tables)
        )
        products += self.vocabulary * self.trunk.width  # the tied head
        scores = self.length * (self.length + 1) // 2 if self.causal else self.length**2
        attention = 12 * self.batch * scores * self.trunk.width * self.trunk.depth
        return 6.0 * products * positions + attention


@dataclasses.dataclass(frozen=True)
class Denoising:
    """A DiT on random latents, with learned variance and classes (Peebles & Xie 2022)."""

    name: str
    width: int
    depth: int
    heads: int
    batch: int
    side: int  # of the latents, of 4 channels
    patch: int = 2
    classes: int = 1000
    causal = False

    @property
    def length(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def task(self) -> DiffusionTask:
        process, label = GaussianDiffusion(), ClassLabel(self.classes)
        sizes = {name: getattr(self, name) for name in ("width", "depth", "heads", "patch")}
        options = {"channels": process.outputs(4), "labels": label.labels, "dtype": "bfloat16"}
        return DiffusionTask(dit(**sizes, **options), process, (label,), 0.1, Latents())

    def model(self) -> nn.Module:
        return self.task.model

    def data(self) -> tuple[jax.Array, jax.Array]:
        """Latents and classes."""
        one, two = jax.random.split(jax.random.key(0))
        shape = (self.batch, self.side, self.side, 4)
        return jax.random.normal(one, shape), jax.random.randint(
            two, (self.batch,), 0, self.classes
        )

    def init(self, key: jax.Array, inputs: jax.Array) -> Any:
        label = jnp.zeros(len(inputs), jnp.int32)
        return self.task.init(key, {"image": inputs, "label": label})[0]

    def loss(self, params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        batch = {"image": inputs, "label": labels}
        return self.task.loss(params, {}, batch, key=jax.random.key(2), train=True).loss

    def flops(self, params: Any) -> float:
        """Of one step, forward and backward; a condition belongs to an example, not a position."""
        named = paths.leaves(params)
        kernels = {n: math.prod(x.shape) for n, x in named.items() if n.endswith("kernel")}
        told = sum(n for name, n in kernels.items() if re.search(r"^time/|modulation/", name))
        products = told + (sum(kernels.values()) - told) * self.length
        attention = 12 * self.length**2 * self.width * self.depth
        return self.batch * (6.0 * products + attention)


def _trunk(width: int, depth: int, heads: int, **more: Any) -> Transformer:
    # MLPs with the tanh form of GELU, as GPT-2; ViT's exact one costs the same within noise.
    return Transformer(width, depth, heads, mlp="gelu_tanh", dtype="bfloat16", **more)


TRAININGS = (
    Training("GPT-2 124M", _trunk(768, 12, 12), 32, 1024, vocabulary=50304),
    Training("ViT-L/16 224", _trunk(1024, 24, 16), 256, 197, image=224),
    Training("GPT 1.3B", _trunk(2048, 24, 16), 8, 2048, vocabulary=50304),
    Denoising("DiT-XL/2", 1152, 28, 16, batch=256, side=32),
)
TINY = (
    Training("tiny GPT", _trunk(16, 2, 2), 2, 16, vocabulary=32),
    Training("tiny ViT", _trunk(16, 2, 2), 2, 5, image=8, patch=4),
    Denoising("tiny DiT", 16, 2, 2, batch=2, side=8, classes=5),
)


def measure(stage: Stage) -> None:
    """Milliseconds, MFU against the data sheet and against a matrix product in the same run."""
    for training in TINY if stage.tiny else TRAININGS:
        case = {"model": training.name, "batch": training.batch, "L": training.length}
        if stage.leaves_out(case):
            continue
        notes: dict[str, Any] = {"attention": _explain(training)}
        timing = race({"step": functools.partial(_run, training, notes)}, stage.deadline)["step"]
        flops = notes.pop("flops", 0.0)
        if timing.seconds:
            rate = flops / timing.seconds
            notes["GFLOP/step"] = flops / 1e9
            kind = jax.devices()[0].device_kind
            peak = next((x for name, x in PEAKS.items() if name in kind), None)
            notes["MFU"] = rate / peak if peak else None
            measured = matmul_rate(stage)
            notes["of measured matmul"] = rate / measured if measured else None
        stage.add(case, timing, flops, **notes)


def _explain(training: Training | Denoising) -> str:
    trunk = training.trunk if isinstance(training, Training) else training
    shape = (training.batch, training.length, trunk.heads, trunk.width // trunk.heads)
    x = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3
    return explain(*x, mask=Causal() if training.causal else Full())


def _run(training: Training | Denoising, notes: dict[str, Any]) -> Run:
    """A jitted AdamW step that keeps its state to itself; notes the FLOPs and parameters."""
    inputs, labels = training.data()
    params = jax.jit(training.init)(jax.random.key(1), inputs[:1])
    notes["parameters"] = sum(x.size for x in jax.tree.leaves(params))
    notes["flops"] = training.flops(params)
    optimiser = optax.adamw(1e-4)

    def step(state: Any, inputs: jax.Array, labels: jax.Array) -> Any:
        params, moments = state
        value, grads = jax.value_and_grad(training.loss)(params, inputs, labels)
        updates, moments = optimiser.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    state = (params, jax.jit(optimiser.init)(params))
    compiled = jax.jit(step, donate_argnums=0).lower(state, inputs, labels).compile()
    return Run(_stepper(compiled, state, inputs, labels), jax.block_until_ready)


def _stepper(compiled: Any, state: Any, *batch: jax.Array) -> Callable[[], Any]:
    held = [state]

    def start() -> Any:
        held[0], value = compiled(held[0], *batch)
        return value

    return start
