"""Transforms against what they must do to one image."""

import numpy as np
import pytest

from jaxformer.data.transforms import Normalize, RandomCrop, RandomFlip
from jaxformer.recipe import ConfigError

IMAGE = np.arange(5 * 6 * 2, dtype=np.float32).reshape(5, 6, 2)


def test_crop_is_a_window_and_reaches_every_corner():
    windows = np.lib.stride_tricks.sliding_window_view(IMAGE, (4, 4), (0, 1)).transpose(
        0, 1, 3, 4, 2
    )
    crop, rng, seen = RandomCrop(4), np.random.default_rng(0), set()
    for _ in range(100):
        image = crop({"image": IMAGE, "label": 1}, rng)["image"]
        seen.add(next(ij for ij in np.ndindex(2, 3) if (windows[ij] == image).all()))
    assert seen == set(np.ndindex(2, 3))


def test_padding_is_zero_and_around_the_image():
    crop = RandomCrop(9, padding=2)  # (9, 10) after padding: two places, both full height
    image = crop({"image": IMAGE + 1}, np.random.default_rng(0))["image"]
    assert image.shape == (9, 9, 2)
    left = 2 if image[2, 1, 0] == 0 else 1
    np.testing.assert_array_equal(image[2:7, left : left + 6], IMAGE + 1)
    image[2:7, left : left + 6] = 0
    assert not image.any()


def test_flip_mirrors_half_of_the_time():
    rng = np.random.default_rng(0)
    flipped = [RandomFlip()({"image": IMAGE}, rng)["image"] for _ in range(400)]
    mirrored = np.array([(f == IMAGE[:, ::-1]).all() for f in flipped])
    assert all(m or (f == IMAGE).all() for m, f in zip(mirrored, flipped, strict=True))
    assert abs(mirrored.mean() - 0.5) < 0.1  # four standard deviations


def test_normalize_per_channel():
    rng = np.random.default_rng(0)
    out = Normalize((1.0, 2.0), (2.0, 4.0))({"image": IMAGE, "label": 3}, rng)
    np.testing.assert_allclose(out["image"], (IMAGE - [1, 2]) / [2, 4])
    assert out["label"] == 3 and out["image"].dtype == np.float32
    white = Normalize(0.0, 255.0)({"image": np.full((1, 1, 1), 255, np.uint8)}, rng)["image"]
    assert white == 1.0


def test_crop_larger_than_the_image_is_named():
    with pytest.raises(ConfigError, match=r"data\.crop: 8 exceeds the 7x8"):
        RandomCrop(8, padding=1)({"image": IMAGE}, np.random.default_rng(0))
