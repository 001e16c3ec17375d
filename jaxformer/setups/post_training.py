"""Post-training quantisation of an image classifier: train or import, then calibrate."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxformer.compress.calibration import CalibrationUpdate, ChangesParameters, quantized_task
from jaxformer.compress.outliers import at_norms, draw_channels
from jaxformer.compress.procedures import MinMax, RepQ, repq_rules, uniform_rules
from jaxformer.compress.quantized import Quantized
from jaxformer.compress.reconstruction import Reconstruction, ReconstructionUpdate
from jaxformer.errors import ConfigError
from jaxformer.evaluation.claims import Lab
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import EvalContext, InitFrom, Params, Phase, Recipe, TrainState
from jaxformer.setups import vision
from jaxformer.setups.imported import adopt
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.tasks.staged import StagedTask
from jaxformer.train.states import enter
from jaxformer.train.updates import GradientUpdate


def recipe(
    config: ConfigDict,
    rules: Quantized,
    procedure: Callable[[Params], ChangesParameters],
    reconstruction: Reconstruction | None = None,
) -> Recipe:
    """Phases "train", "outliers", "calibrate" and, if it is to take steps, "reconstruct".

    With `init_from` the first is another run's.

    Raises:
        ConfigError: no images to calibrate on, a model whose layers are a loop, or a trained run
            that is to be trained again.
    """
    adopt(config)
    count = config.calibration.images
    if count < 1:
        raise ConfigError(f"calibration.images={count}: give at least one image")
    if config.model.scan:
        raise ConfigError("model.scan=True: layers are calibrated one by one; set it to False")
    if config.init_from and config.steps:
        raise ConfigError(
            f"config.steps={config.steps}: the run init_from={config.init_from!r} has been "
            "trained; give 0"
        )
    task = ClassifyTask(vision.classifier(config))
    train, test = vision.images(config)
    few, _ = vision.images(config, count)
    update = CalibrationUpdate(task, rules, few, procedure)
    phases = [
        Phase("train", config.steps, train, GradientUpdate.of(task, config)),
        Phase("outliers", enter=outliers(config)),
        Phase("calibrate", 1, few, update),
    ]
    if reconstruction and reconstruction.steps:
        many = config.reconstruct.images
        if many < 1:
            raise ConfigError(f"reconstruct.images={many}: give at least one image")
        again = ReconstructionUpdate(task, rules, reconstruction)
        phases.append(Phase("reconstruct", 1, vision.images(config, many)[0], again))
    staged = StagedTask((task, quantized_task(task, rules)))
    evaluator = MeanEvaluator(staged, test, "test", config.evaluate.every or "phase_end")
    source = InitFrom(config.init_from, fresh=config.fresh) if config.init_from else None
    return Recipe(staged, phases, [evaluator], init_from=source, unit="images")


def outliers(config: ConfigDict) -> Callable[[TrainState], TrainState]:
    """The surgery of `config.outliers`: some channels of every norm become large."""
    count, factor = config.outliers.channels, config.outliers.factor
    channels = draw_channels(config.model.width, count, config.seed)

    def enter(state: TrainState) -> TrainState:
        return state.replace(params=at_norms(state.params, channels, factor))

    return enter if count else lambda state: state


def reconstruction_of(config: ConfigDict, **losses: Any) -> Reconstruction:
    """As `config.reconstruct` says, with a paper's `loss` and `head_loss`."""
    given = {name: value for name, value in config.reconstruct.items() if name != "images"}
    return Reconstruction.of(**given, **losses)


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to quantise: its name, its rules by (weights, activations) bits, and its procedure.

    With a `reconstruction` blocks are reconstructed after it.
    """

    name: str
    rules: Callable[[int, int], Quantized]
    procedure: Callable[[Params], ChangesParameters]
    reconstruction: Reconstruction | None = None


MIN_MAX = Method("min-max", uniform_rules, MinMax)
REPQ = Method("RepQ-ViT", repq_rules, RepQ)
TRAINED_ON = 1257  # of the digits; methods are compared on the other 540


def _calibration(made: Recipe) -> int:
    """Which of the phases it is."""
    return [phase.name for phase in made.phases].index("calibrate")


class Quality(NamedTuple):
    """Of a model on all unseen images.

    `error` is the squared distance of its logits from those of the float model, over the variance
    of the latter: it tells apart what the few images do not that change their class.
    """

    accuracy: float  # %
    error: float


class Bench:
    """A trained model with outliers, which methods are then tried on: `qualities(method, 4, 4)`."""

    def __init__(self, lab: Lab) -> None:
        self.config = ConfigDict(lab.recipe(data__images=TRAINED_ON).config)
        whole = self.recipe(MIN_MAX, 8, 8)
        phases = whole.phases[: _calibration(whole)]
        self.state = lab.fit(dataclasses.replace(whole, phases=phases, evaluators=()))
        self.float_accuracy, self.float_logits = self._answers(whole, self.state)

    def recipe(self, method: Method, weights: int, activations: int) -> Recipe:
        rules = method.rules(weights, activations)
        return recipe(self.config, rules, method.procedure, method.reconstruction)

    def calibrated(
        self, method: Method, weights: int, activations: int, draw: int = 0
    ) -> tuple[Recipe, Any]:
        """The recipe and the state that it leaves, on that draw of the images."""
        made, states = self.stages(method, weights, activations, draw)
        return made, list(states.values())[-1]

    def stages(
        self, method: Method, weights: int, activations: int, draw: int
    ) -> tuple[Recipe, dict[str, TrainState]]:
        """The recipe, and the states after "calibrate" and what follows it, by phase."""
        made, state, states = self.recipe(method, weights, activations), self.state, {}
        for phase in made.phases[_calibration(made) :]:
            assert phase.update is not None and phase.data is not None
            state, _ = phase.update(enter(phase, state), phase.data.batch(draw))
            states[phase.name] = state
        return made, states

    def qualities(
        self, method: Method, weights: int, activations: int, draws: int = 1
    ) -> dict[str, Quality]:
        """After each phase, by its name; the mean over draws of the images."""
        found: dict[str, list[Quality]] = {}
        for draw in range(draws):
            made, states = self.stages(method, weights, activations, draw)
            for name, state in states.items():
                found.setdefault(name, []).append(self.quality_of(made, state))
        return {
            name: Quality(*map(statistics.mean, zip(*each, strict=True)))
            for name, each in found.items()
        }

    def quality(self, method: Method, weights: int, activations: int, draws: int = 1) -> Quality:
        """That after the last phase."""
        return list(self.qualities(method, weights, activations, draws).values())[-1]

    def quality_of(self, made: Recipe, state: TrainState) -> Quality:
        """That of a state."""
        accuracy, logits = self._answers(made, state)
        error = np.square(logits - self.float_logits).mean() / self.float_logits.var()
        return Quality(accuracy, float(error))

    def _answers(self, made: Recipe, state: TrainState) -> tuple[float, np.ndarray]:
        """The accuracy in percent, and the logits (N, classes)."""
        kept, mesh = Answers(), make_mesh()
        evaluator = dataclasses.replace(made.evaluators[0], whole=kept)
        with jax.set_mesh(mesh):
            accuracy = evaluator(state, EvalContext(mesh, "test"))["accuracy"]
        return 100 * accuracy, kept.rows["answer"]


class Answers:
    """`MeanEvaluator.whole` that keeps the answers."""

    columns: tuple[str, ...] = ()
    rows: Mapping[str, np.ndarray]

    def __call__(self, rows: Mapping[str, np.ndarray]) -> dict[str, float]:
        self.rows = rows
        return {}
