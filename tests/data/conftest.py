"""A small streamed data set of known content, so that the stream is tested without real data."""

from pathlib import Path

import numpy as np
import pytest

NUM_TRAIN, NUM_VALIDATION = 50, 23


@pytest.fixture(scope="session")
def labelled_stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with "imagenet2012": JPEG images in several files, each labelled with its number."""
    from asgd_jax.data.prepared import tensorflow_modules

    _, tfds = tensorflow_modules()
    rng = np.random.default_rng(0)

    def examples(count: int):
        for label in range(count):
            shape = (int(rng.integers(20, 60)), int(rng.integers(20, 60)), 3)
            yield label, {"image": rng.integers(0, 256, shape, np.uint8), "label": label}

    folder = tmp_path_factory.mktemp("tfds")
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=NUM_TRAIN),
        }
    )
    tfds.dataset_builders.store_as_tfds_dataset(
        name="imagenet2012",
        version="5.1.0",
        features=features,
        split_datasets={
            "train": list(examples(NUM_TRAIN)),
            "validation": list(examples(NUM_VALIDATION)),
        },
        data_dir=folder,
        download_config=tfds.download.DownloadConfig(num_shards=5),
    )
    return folder
