"""Few-shot tasks of the synthetic stream, and what reading and descent make of them.

A task is a mapping that no document of training had: N demonstrations "x -> y", and queries "x ->"
of words that are among them, or are not. Its prompts look like the documents: so a model that was
trained on these alone has what it needs to answer in context.
"""

from __future__ import annotations

import jax
import numpy as np

from jaxformer.data.sources.topics import Topics
from jaxformer.errors import ConfigError
from jaxformer.evaluation.few_shot import FewShot, Shot

VALUES = r"block_{}/.*value/kernel"  # W_V of a layer: what an implicit model may be made of


def few_shot_task(
    stream: Topics, demonstrations: int, key: jax.Array, *, seen: bool = True
) -> FewShot:
    """A new mapping, shown by demonstrations of random x, and as many queries.

    Queries are the demonstrations' own x, or with seen=False others.

    Raises:
        ConfigError: N < 1, a prompt longer than the documents, or but one x and seen=False.
    """
    if demonstrations < 1:
        raise ConfigError(f"demonstrations={demonstrations}: must be at least 1")
    if not seen and stream.symbols < 2:
        raise ConfigError(f"data.symbols={stream.symbols}: one of them is not seen; give 2")
    for_mapping, for_x = jax.random.split(key)
    mapping = np.asarray(stream.mapping(for_mapping))
    draw = np.random.default_rng(np.asarray(jax.random.key_data(for_x)).tolist())
    words = draw.permutation(stream.symbols)
    # Without the last one there is something to ask that was not seen.
    shown = draw.choice(words if seen else words[:-1], demonstrations)
    others = np.setdiff1d(words, shown)
    asked = shown if seen else draw.choice(others, demonstrations)

    def shots(which: np.ndarray) -> list[Shot]:
        return [Shot([int(i), stream.arrow], int(mapping[i])) for i in which]

    return FewShot(shots(shown), shots(asked), [stream.end], stream.length)
