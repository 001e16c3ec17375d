"""What a paper puts in the place of softmax attention, or of its positions, in a plain model."""

from __future__ import annotations

import dataclasses

from jaxformer.nn.make import Make


@dataclasses.dataclass(frozen=True)
class Variant:
    """Parts for a `Transformer`; the default is softmax attention with sinusoidal positions.

    A paper offers its own as `variant(trunk, length)`, `length` being the longest sequence that
    the model will see, and `jaxformer compare` puts them all into the same model.
    """

    mixer: Make | None = None  # None: softmax attention
    scheme: Make | None = None  # positions that layers share
    position: str = "sinusoidal"  # that of the trunk: a table would not reach beyond its length
