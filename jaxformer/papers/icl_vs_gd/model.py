"""Few-shot tasks of the synthetic stream, and what reading and descent make of them.

A task is a new mapping: N demonstrations "x -> y", and queries "x ->" of all x, some of which are
among the demonstrations. Its prompts look like the documents: so a model that was
trained on these alone has what it needs to answer in context.
"""

from __future__ import annotations

import jax
import numpy as np

from jaxformer.data.sources.topics import Topics
from jaxformer.errors import ConfigError
from jaxformer.evaluation.few_shot import FewShot, Shot

VALUES = r"block_{}/.*value/kernel"  # W_V of a layer: what an implicit model may be made of


def few_shot_task(stream: Topics, demonstrations: int, key: jax.Array) -> FewShot:
    """A new mapping, shown by demonstrations of random x; every x is asked for once.

    Raises:
        ConfigError: N < 1, or a prompt longer than the documents.
    """
    if demonstrations < 1:
        raise ConfigError(f"demonstrations={demonstrations}: must be at least 1")
    for_mapping, for_x = jax.random.split(key)
    mapping = np.asarray(stream.mapping(for_mapping))
    shown = np.asarray(jax.random.randint(for_x, (demonstrations,), 0, stream.symbols))

    def shots(which: np.ndarray) -> list[Shot]:
        return [Shot([int(i), stream.arrow], int(mapping[i])) for i in which]

    return FewShot(shots(shown), shots(np.arange(stream.symbols)), [stream.end], stream.length)


def seen(few: FewShot) -> np.ndarray:
    """Which queries (Q,) are among the demonstrations; the others can only be guessed."""
    shown = {shot.prompt[0] for shot in few.demonstrations}
    return np.array([query.prompt[0] in shown for query in few.queries])
