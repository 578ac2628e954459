"""Data sets: in memory and streamed, both through TFDS. Importing this needs no TensorFlow."""

from asgd_jax.data.augment import augmenter, identity, random_crop_flip
from asgd_jax.data.batches import BatchPlan, epoch_batches, epoch_permutation, plan_batches
from asgd_jax.data.in_memory import DATASETS, Dataset, load, normalizer
from asgd_jax.data.normalize import imagenet_normalizer
from asgd_jax.data.prepared import DatasetNotFoundError
from asgd_jax.data.streaming import (
    StreamSizes,
    stream_sizes,
    train_batches,
    validation_batches,
)

__all__ = [
    "DATASETS",
    "BatchPlan",
    "Dataset",
    "DatasetNotFoundError",
    "StreamSizes",
    "augmenter",
    "epoch_batches",
    "epoch_permutation",
    "identity",
    "imagenet_normalizer",
    "load",
    "normalizer",
    "plan_batches",
    "random_crop_flip",
    "stream_sizes",
    "train_batches",
    "validation_batches",
]
