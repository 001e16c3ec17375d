"""Films of one happening from several sides, as folders of frames: the layout of FTPV.

`<root>/<trajectory>/tpv/view_0000/000000.jpg` are third-person views that run in step; first-person
frames `<trajectory>/fpv/*.jpg` are one view more, before the others, where asked for.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np

from jaxformer.data.base import Example
from jaxformer.data.sources.image import read_image
from jaxformer.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """The films of a folder: `films[trajectory][view]` are frames in order, as many in each view.

    `views` keeps the first so many third-person views, all if None.

    Raises:
        ConfigError: no folder, no trajectories in it, views that are missing or of unequal length.
    """

    root: str | Path
    views: int | None = None
    first_person: bool = False

    @functools.cached_property
    def films(self) -> list[list[list[Path]]]:
        root = Path(self.root)
        if not root.is_dir():
            raise ConfigError(f"data.root: {str(root)!r} is not a folder of trajectories")
        found = [self._film(path) for path in sorted(root.iterdir()) if (path / "tpv").is_dir()]
        if not found:
            raise ConfigError(f"data.root: no <trajectory>/tpv/view_0000/ in {str(root)!r}")
        return found

    def _film(self, path: Path) -> list[list[Path]]:
        sides = sorted(p for p in (path / "tpv").iterdir() if p.is_dir())[: self.views]
        sides = [path / "fpv", *sides] if self.first_person else sides
        film = [sorted(side.glob("*.jpg")) + sorted(side.glob("*.png")) for side in sides]
        lengths = {len(frames) for frames in film}
        if len(film) < 2 or len(lengths) != 1 or lengths == {0}:
            counts = {side.name: len(frames) for side, frames in zip(sides, film, strict=True)}
            raise ConfigError(
                f"data.root: {str(path)!r} needs two views or more, with as many frames in each; "
                f"it has {counts}"
            )
        return film


@dataclasses.dataclass(frozen=True)
class Triplets:
    """A source of {"views": (2, 3, size, size, 3)}: anchor, positive and negative in two views.

    One example per trajectory, drawn by `Triplets.draw` as a transform: positives lie within
    `near` frames, negatives beyond.
    """

    trajectories: Trajectories
    size: int
    near: int = 3

    def __len__(self) -> int:
        return len(self.trajectories.films)

    def __getitem__(self, index: int) -> Example:
        return {"trajectory": np.int32(index)}

    def draw(self, example: Example, rng: np.random.Generator) -> Example:
        film = self.trajectories.films[int(example["trajectory"])]
        length = len(film[0])
        if length <= 2 * self.near + 1:
            raise ConfigError(
                f"data.near={self.near}: a film of {length} frames has none beyond it; give less"
            )
        sides = np.sort(rng.choice(len(film), 2, replace=False))
        anchor = rng.integers(length)
        apart = np.abs(np.arange(length) - anchor)
        positive = rng.choice(np.flatnonzero((apart > 0) & (apart <= self.near)))
        negative = rng.choice(np.flatnonzero(apart > self.near))
        return {
            "views": np.stack(
                [
                    [read_image(film[side][t], self.size) for t in (anchor, positive, negative)]
                    for side in sides
                ]
            )
        }


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Whole films {"frames": (2, length, size, size, 3)} of the first two views kept."""

    trajectories: Trajectories
    size: int

    def __len__(self) -> int:
        return len(self.trajectories.films)

    def __getitem__(self, index: int) -> Example:
        film = self.trajectories.films[index][:2]
        return {"frames": np.stack([[read_image(t, self.size) for t in view] for view in film])}
