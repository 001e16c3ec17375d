"""Speed of the loaders: `jaxformer bench data`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxformer.data.base import IndexedData, Transform, prefetch
from jaxformer.data.sources.image import ImageFolder, digits
from jaxformer.data.sources.text import PYTHON_STDLIB, Windows, load_corpus
from jaxformer.data.transforms import RandomCrop, RandomFlip
from jaxformer.recipe import Batch, Data

__all__ = ["bench_data"]


def bench_data(
    *,
    batch_size: int = 64,
    length: int = 256,
    image_size: int = 224,
    seconds: float = 2.0,
    depth: int = 4,
) -> list[dict[str, Any]]:
    """Examples and tokens per second of each loader, read plainly and through `prefetch`.

    The consumer holds every batch for as long as reading one takes, as a training step just as
    fast would; "speedup" is then about 2 where reading hides behind the step entirely. Compare
    figures of one run only.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, data, tokens in _loaders(Path(folder), batch_size, length, image_size):
            data.batch(0)  # opens files and memory maps
            alone = _batches_per_second(_in_order(data), 0.0, seconds)
            plain = _batches_per_second(_in_order(data), 1 / alone, seconds)
            ahead = _batches_per_second(prefetch(data, depth=depth), 1 / alone, seconds)
            rows.append(
                {
                    "loader": name,
                    "examples/s": alone * data.batch_size,
                    "tokens/s": alone * data.batch_size * tokens,
                    "examples/s beside a step": plain * data.batch_size,
                    "examples/s beside a step, prefetched": ahead * data.batch_size,
                    "speedup": ahead / plain,
                }
            )
    return rows


def _loaders(
    folder: Path, batch_size: int, length: int, image_size: int
) -> Iterator[tuple[str, Data, int]]:
    """(name, data, tokens of one example)."""
    memory = load_corpus(PYTHON_STDLIB).train
    mapped = load_corpus(PYTHON_STDLIB, cache=folder / "tokens").train
    yield "text, in memory", IndexedData(Windows(memory, length), batch_size), length
    yield "text, memory-mapped", IndexedData(Windows(mapped, length), batch_size), length
    crop: list[Transform] = [RandomCrop(8, padding=1), RandomFlip()]
    yield "digits, cropped and flipped", IndexedData(digits("train"), batch_size, 0, crop), 0
    _write_photos(folder / "images" / "class", batch_size, size=2 * image_size)
    images = ImageFolder(folder / "images", image_size)
    yield f"JPEG folder at {image_size}", IndexedData(images, batch_size), 0


def _write_photos(folder: Path, count: int, size: int) -> None:
    """Smooth noise: about as many bytes per pixel as a photograph."""
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.integers(0, 256, (size // 8, size // 8, 3), np.uint8)
        Image.fromarray(coarse).resize((size, size)).save(folder / f"{i}.jpg", quality=90)


def _in_order(data: Data) -> Iterator[tuple[int, Batch]]:
    step = 0
    while True:
        yield step, data.batch(step)
        step += 1


def _batches_per_second(batches: Iterator[Any], step_time: float, seconds: float) -> float:
    count, start = 0, time.perf_counter()
    for _ in batches:
        time.sleep(step_time)
        count += 1
        if (elapsed := time.perf_counter() - start) >= seconds:
            break
    return count / elapsed
