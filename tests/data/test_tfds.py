"""A dataset prepared by tfds's own writer, read back; TensorFlow is never imported."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxformer.data.base import Epoch, IndexedData
from jaxformer.data.sources.tfds import PreparedDataset
from jaxformer.recipe import ConfigError


class Toy(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Tensor(shape=(4, 4, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
            "name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(10), "test": self._generate_examples(3)}

    def _generate_examples(self, n):
        for i in range(n):
            yield i, {"image": np.full((4, 4, 1), i, np.uint8), "label": i % 3, "name": f"n{i}"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    builder = Toy(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_path


def test_prepared_dataset_gives_every_example_once(prepared):
    source = PreparedDataset(prepared, "train", keys=("image", "label"))
    batch = Epoch(source, 10).batch(0)
    assert batch["image"].shape == (10, 4, 4, 1) and batch["image"].dtype == np.uint8
    order = batch["image"][:, 0, 0, 0]  # the writer shuffles by a hash of the keys
    np.testing.assert_array_equal(np.sort(order), np.arange(10))
    np.testing.assert_array_equal(batch["label"], order % 3)
    assert "name" not in batch and "name" in PreparedDataset(prepared)[0]


def test_prepared_dataset_is_a_source_of_shuffled_batches(prepared):
    data = IndexedData(PreparedDataset(prepared, "train[:50%]", keys=("label",)), 5, seed=1)
    again = IndexedData(PreparedDataset(prepared, "train[:50%]", keys=("label",)), 5, seed=1)
    for step in (4, 0):
        np.testing.assert_array_equal(data.batch(step)["label"], again.batch(step)["label"])


def test_a_classifier_is_measured_on_it(prepared, one_device):
    """`ImageAccuracy` on a split, scaled to the size of the model, against single predictions."""
    import jax
    from PIL import Image, ImageOps

    import jaxformer
    from jaxformer.evaluation.exams import ImageAccuracy, Subject
    from jaxformer.models.transformer import Transformer
    from jaxformer.models.vit import vit
    from jaxformer.tasks.classify import ClassifyTask

    trunk = Transformer(width=8, depth=1, heads=2)
    task = ClassifyTask(vit(trunk, image_size=8, patch=4, classes=3))
    row = {"image": np.zeros((1, 8, 8, 1), np.float32), "label": np.zeros(1, np.int32)}
    params, extra = task.init(jax.random.key(0), row)
    zero = jax.numpy.zeros((), jax.numpy.int32)
    state = jaxformer.TrainState(zero, params, extra, {}, jax.random.key(0))
    subject = Subject("vit", 0, task, state, one_device, row)
    found = subject.take(ImageAccuracy(f"{prepared}:train"))
    right = []
    for example in map(PreparedDataset(prepared, "train").__getitem__, range(10)):
        picture = Image.fromarray(example["image"][..., 0])
        picture = ImageOps.fit(picture, (8, 8), Image.Resampling.BILINEAR)
        image = np.asarray(picture, np.float32)[None, ..., None] / 255
        logits = task.predict(params, extra, {"image": image}, key=jax.random.key(0))
        right.append(int(logits.argmax()) == example["label"])
    assert found["images/accuracy"] == pytest.approx(np.mean(right))


def test_reading_does_not_import_tensorflow(prepared):
    """In a process of its own: other tests may import it where it is installed."""
    code = f"""
        import sys
        from jaxformer.data.sources.tfds import PreparedDataset
        assert len(PreparedDataset({str(prepared)!r})) == 10
        assert PreparedDataset({str(prepared)!r})[0]["image"].shape == (4, 4, 1)
        assert "tensorflow" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_what_cannot_be_read_is_named(prepared, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.directory: .*none' is no prepared dataset"):
        PreparedDataset(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"data\.split: 'dev' .* it has \['test', 'train'\]"):
        PreparedDataset(prepared, "dev")
    with pytest.raises(ConfigError, match=r"data\.keys: \['pixels'\] not in .*'image'"):
        PreparedDataset(prepared, keys=("pixels",))
    info = json.loads((prepared / "dataset_info.json").read_text())
    wrong = tmp_path / "toy" / "1.0.0"
    wrong.mkdir(parents=True)
    (wrong / "features.json").write_text((prepared / "features.json").read_text())
    (wrong / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(ConfigError, match=r"in tfrecord format, which needs TensorFlow; prepare"):
        PreparedDataset(wrong)
