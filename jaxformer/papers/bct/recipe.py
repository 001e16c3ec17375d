"""The recipe of a config: an encoder is trained, or taken from elsewhere, and compressed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxformer.compress.outliers import at_norms, at_values, draw_channels
from jaxformer.errors import ConfigError
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.models.transformer import require
from jaxformer.nn.attention import head_sizes
from jaxformer.papers.bct.model import (
    RANGES,
    Integer,
    Scheme,
    Simulated,
    Static,
    compress_parameters,
    compressed,
    scheme,
)
from jaxformer.recipe import (
    Batch,
    Extra,
    InitFrom,
    Mean,
    Metrics,
    Phase,
    Recipe,
    TrainState,
)
from jaxformer.setups.imported import adopt
from jaxformer.setups.texts import text_data, text_model, text_task
from jaxformer.tasks.answers import AnswerTask, inputs_of
from jaxformer.train.updates import ForwardUpdate, GradientUpdate

OUTLIERS = ("none", "norms", "values")


def build(config: ConfigDict) -> Recipe:
    """Training in float32, then a phase of no steps that compresses the parameters.

    The task of the whole is the compressed model; the update has the plain one.
    """
    adopt(config)
    plain = text_task(config, text_model(config))
    how = scheme_of(config)
    task = text_task(config, compressed(plain.model, arithmetic_of(config)(how)))
    train, test, whole = text_data(config)
    if config.init_from and config.steps:
        raise ConfigError(
            f"config.steps={config.steps}: the run init_from={config.init_from!r} has been "
            "trained, and compression trains nothing; give 0"
        )
    phases = [
        Phase("train", config.steps, train, GradientUpdate.of(plain, config)),
        Phase("compress", enter=compress(config, how)),
    ]
    if config.compress.static:
        look = ForwardUpdate(functools.partial(calibrate, task))
        phases.append(Phase("calibrate", config.compress.calibration, train, look))
    evaluators = [MeanEvaluator(task, test, "compressed", "end", whole=whole)]
    if config.steps:
        every = config.evaluate.every or "phase_end"
        evaluators.append(MeanEvaluator(plain, test, "float", every, whole=whole))
    source = InitFrom(config.init_from) if config.init_from else None
    return Recipe(task, phases, evaluators, init_from=source, unit="pairs")


def arithmetic_of(config: ConfigDict) -> type[Simulated]:
    """How compressed values are computed with.

    Raises:
        ConfigError: `compress.static` beside what it does not go with.
    """
    fields = config.compress
    if not fields.static:
        return Integer if fields.integer else Simulated
    if fields.integer:
        raise ConfigError("compress.static=True: is simulated; give compress.integer=False")
    if config.model.scan:
        raise ConfigError("compress.static=True: every layer has its own; give model.scan=False")
    if fields.calibration < 1:
        raise ConfigError(
            f"compress.calibration={fields.calibration}: give at least 1 batch for static shifts"
        )
    return Static


def calibrate(
    task: AnswerTask, state: TrainState, batch: Batch, key: jax.Array
) -> tuple[Extra, Metrics]:
    """The largest values of the batch in the collection of static shifts, beside those before."""
    del key
    inputs, masks = inputs_of(batch)
    variables = {"params": state.params, RANGES: state.extra[RANGES]}
    _, found = task.model.apply(variables, inputs, mutable=[RANGES], **masks)
    largest = jnp.stack([x.max() for x in jax.tree.leaves(found[RANGES])])
    return {**state.extra, **found}, {"largest": Mean.of(largest.max())}


def scheme_of(config: ConfigDict) -> Scheme:
    """As the section `compress` says."""
    fields = config.compress
    return scheme(
        fields.bits,
        fields.granularity,
        weight_block=(fields.weight_rows, fields.weight_columns),
        value_block=fields.value_columns,
        shift_bits=fields.shift_bits,
        probs_unsigned=fields.probs_unsigned,
    )


def compress(config: ConfigDict, how: Scheme) -> Callable[[TrainState], TrainState]:
    """Outliers put in, if any are asked for, and parameters as their codes say."""
    inject = injection(config)

    def enter(state: TrainState) -> TrainState:
        return state.replace(params=compress_parameters(inject(state.params), how))

    return enter


def injection(config: ConfigDict) -> Callable[[TrainState], TrainState]:
    """The change of parameters that the section `outliers` says.

    Raises:
        ConfigError: outliers at the norms of a model whose blocks have theirs after the sum.
    """
    fields, model = config.outliers, config.model
    require("outliers.at", fields.at, OUTLIERS)
    if fields.at == "none":
        return lambda params: params
    if config.huggingface:
        raise ConfigError(f"outliers.at={fields.at!r}: an imported model has its own; give 'none'")
    drawn = (config.seed, fields.draw)
    if fields.at == "values":
        _, head_size = head_sizes(model.width, model.heads)
        channels = draw_channels(head_size, fields.channels, drawn)
        return lambda params: at_values(params, channels, fields.factor)
    if model.order != "pre":
        raise ConfigError(
            f"outliers.at='norms': model.order={model.order!r} would change what the model "
            "computes; give model.order='pre' or outliers.at='values'"
        )
    channels = draw_channels(model.width, fields.channels, drawn)
    return lambda params: at_norms(params, channels, fields.factor)
