"""Data made of other data: repeated, or left for an update to draw."""

from __future__ import annotations

import dataclasses

from jaxformer.recipe import Batch, Data, DrawsOnDevice

__all__ = ["Repeated", "Undrawn"]


@dataclasses.dataclass(frozen=True)
class Repeated:
    """The first batch of `data` at every step: full-batch training on what a generator draws."""

    data: Data

    @property
    def batch_size(self) -> int:
        return self.data.batch_size

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        del step
        return self.data.batch(0, rows)

    def spec(self) -> Batch:
        return self.data.spec()

    def draw(self, batch: Batch) -> Batch:
        return self.data.draw(batch) if isinstance(self.data, DrawsOnDevice) else batch


@dataclasses.dataclass(frozen=True)
class Undrawn:
    """`data` as it leaves the host: an update draws what `data` would draw on the device."""

    data: Data

    @property
    def batch_size(self) -> int:
        return self.data.batch_size

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        return self.data.batch(step, rows)

    def spec(self) -> Batch:
        return self.data.spec()
