"""Research transformers in JAX: one contract, one loop, many papers.

The public names are below; each is imported when first used, so that `import jaxformer` is quick.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "ConfigError": "errors",
    "load_config": "config",
    "load": "catalogue",
    "reproduce": "catalogue",
    "Batch": "recipe",
    "Claim": "recipe",
    "Evaluator": "recipe",
    "Findings": "recipe",
    "InitFrom": "recipe",
    "LossOutput": "recipe",
    "Mean": "recipe",
    "Phase": "recipe",
    "Recipe": "recipe",
    "Task": "recipe",
    "TrainState": "recipe",
    "Update": "recipe",
    "FitOptions": "train.fit",
    "fit": "train.fit",
    "restore": "train.states",
    "Sweep": "train.sweep",
    "GradientUpdate": "train.updates",
    "ForwardUpdate": "train.updates",
    "FlowUpdate": "analyze.gradient_flow",
    "evaluate": "tools.evaluate",
    "watch": "tools.evaluate",
    "Perplexity": "evaluation.exams",
    "ImageAccuracy": "evaluation.exams",
    "MultipleChoice": "evaluation.exams",
    "InContext": "evaluation.shots",
    "MeanEvaluator": "evaluation.evaluators",
    "generate": "sampling.autoregressive",
    "make_mesh": "parallel.mesh",
    "attention": "kernels.attention",
    "Make": "nn.make",
}

__all__ = sorted(_WHERE)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"jaxformer has no name {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"jaxformer.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
