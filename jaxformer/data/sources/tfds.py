"""Datasets prepared by TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxformer.data.base import Example
from jaxformer.recipe import ConfigError

__all__ = ["PreparedDataset"]


@dataclasses.dataclass(frozen=True)
class PreparedDataset:
    """A split of a prepared builder folder (`<data_dir>/<name>/<version>`), in ArrayRecord format.

    `split` takes the slicing syntax of the library ("train[:90%]"). Examples hold the features
    named in `keys`, decoded to numpy; None is all of them.
    """

    directory: str | Path
    split: str = "train"
    keys: Sequence[str] | None = None

    def __post_init__(self) -> None:
        _ = self._source  # a wrong path, format or split is an error of the config, not of step 0

    @functools.cached_property
    def _source(self) -> Any:
        import tensorflow_datasets as tfds

        where = str(self.directory)
        try:
            builder = tfds.builder_from_directory(where)
        except Exception as error:  # FileNotFoundError, or a parser's error for a broken json
            raise ConfigError(
                f"data.directory: {where!r} is no prepared dataset; give the version folder, the "
                "one with dataset_info.json, that download_and_prepare() made"
            ) from error
        if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
            raise ConfigError(
                f"data.directory: {where!r} is in {builder.info.file_format.value} format, which "
                "needs TensorFlow; prepare it with "
                "tfds.builder(name, file_format='array_record').download_and_prepare()"
            )
        try:
            source = builder.as_data_source(split=self.split)
        except ValueError as error:
            raise ConfigError(
                f"data.split: {self.split!r} of {where!r}; it has {sorted(builder.info.splits)}"
            ) from error
        missing = sorted(set(self.keys or ()) - set(builder.info.features))
        if missing:
            raise ConfigError(
                f"data.keys: {missing} not in {where!r}; it has {sorted(builder.info.features)}"
            )
        return source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        return example if self.keys is None else {key: example[key] for key in self.keys}
