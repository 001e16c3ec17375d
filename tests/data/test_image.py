"""Labelled images from memory and from folders, in the real file formats."""

import numpy as np
import pytest
from PIL import Image

from jaxformer.data.base import Epoch, IndexedData
from jaxformer.data.sources.image import ImageFolder, digits, divided_digits
from jaxformer.data.transforms import Normalize, RandomCrop, RandomFlip
from jaxformer.recipe import ConfigError


def test_digits_are_split_once_and_evenly():
    train, test = digits("train"), digits("test")
    assert (len(train), len(test)) == (1437, 360)
    example = train[5]
    assert example["image"].shape == (8, 8, 1) and example["image"].dtype == np.float32
    assert train.arrays["image"].min() == 0 and train.arrays["image"].max() == 1
    counts = np.bincount(test.arrays["label"], minlength=10)
    assert counts.min() >= 34 and counts.max() <= 38
    np.testing.assert_array_equal(digits("test").arrays["label"], test.arrays["label"])
    with pytest.raises(ConfigError, match=r"data\.split: 'dev'; the digits have"):
        digits("dev")


def test_few_digits_leave_all_others_to_test_on():
    few, rest = divided_digits(500, seed=1)
    assert (len(few), len(rest)) == (500, 1297)

    def rows(*parts):
        return sorted(image.tobytes() for part in parts for image in part.arrays["image"])

    assert rows(few, rest) == rows(digits("train"), digits("test"))
    assert rows(few) != rows(divided_digits(500, seed=2)[0])
    for part in (few, rest):  # labels stay with their images
        named = dict(zip(map(bytes, part.arrays["image"]), part.arrays["label"], strict=True))
        for source in (digits("train"), digits("test")):
            for image, label in zip(source.arrays["image"], source.arrays["label"], strict=True):
                assert named.get(bytes(image), label) == label
    assert [len(part) for part in divided_digits(0, seed=1)] == [1437, 360]
    with pytest.raises(ConfigError, match=r"data\.images=1438: there are 1437"):
        divided_digits(1438, seed=1)


@pytest.fixture
def folder(tmp_path):
    """Two classes: flat red PNGs of several sizes, and JPEGs that are black over white."""
    for name in ("red", "half"):
        (tmp_path / name).mkdir()
    for i, size in enumerate([(20, 30), (31, 17), (8, 8)]):
        Image.new("RGB", size, (255, 0, 0)).save(tmp_path / "red" / f"{i}.png")
    half = np.zeros((64, 64, 3), np.uint8)
    half[32:] = 255
    Image.fromarray(half).save(tmp_path / "half" / "0.JPG", quality=95)
    Image.fromarray(half[:, :, 0]).save(tmp_path / "half" / "grey.jpg", quality=95)
    (tmp_path / "half" / "notes.md").write_text("no image")
    return tmp_path


def test_image_folder_decodes_scales_and_labels(folder):
    source = ImageFolder(folder, size=16)
    assert source.classes == ("half", "red") and len(source) == 5
    batch = Epoch(source, 5).batch(0)
    assert batch["image"].shape == (5, 16, 16, 3) and batch["image"].dtype == np.float32
    np.testing.assert_array_equal(batch["label"], [0, 0, 1, 1, 1])
    np.testing.assert_allclose(batch["image"][2:], np.broadcast_to([1.0, 0, 0], (3, 16, 16, 3)))
    # Rows away from the edge between the halves; 0.02 is the loss of JPEG at quality 95.
    np.testing.assert_allclose(batch["image"][:2, :6], 0, atol=0.02)
    np.testing.assert_allclose(batch["image"][:2, 10:], 1, atol=0.02)
    assert ImageFolder(folder, size=16, mode="L")[0]["image"].shape == (16, 16, 1)


def test_images_pass_through_transforms(folder):
    transforms = [RandomCrop(12), RandomFlip(), Normalize(0.5, 0.5)]
    batch = IndexedData(ImageFolder(folder, size=16), 4, 0, transforms).batch(3)
    assert batch["image"].shape == (4, 12, 12, 3)
    assert batch["image"].min() >= -1 and batch["image"].max() <= 1.0


def test_an_image_stored_on_its_side_is_turned(tmp_path):
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation tag: turn 90 degrees clockwise to view
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:, :4] = 255  # white on the left is white on top once turned
    Image.fromarray(pixels).save(tmp_path / "a" / "x.png", exif=exif)
    image = ImageFolder(tmp_path, size=8, mode="L")[0]["image"][..., 0]
    np.testing.assert_array_equal(image[:4], 1)
    np.testing.assert_array_equal(image[4:], 0)


@pytest.mark.parametrize("content", [b"", b"no image", "cut"])
def test_a_broken_image_is_named_when_it_is_read(content, folder):
    whole = (folder / "half" / "0.JPG").read_bytes()
    (folder / "red" / "9.jpg").write_bytes(whole[:400] if content == "cut" else content)
    source = ImageFolder(folder, size=16)
    with pytest.raises(ConfigError, match=r"data\.root: .*9\.jpg' cannot be read as an image"):
        source[5]


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.root: .*none' is not a folder"):
        ImageFolder(tmp_path / "none", 8)
    with pytest.raises(ConfigError, match=r"data\.root: no images in the sub-folders"):
        ImageFolder(tmp_path, 8)
