"""Data sets, in memory and streamed, both read through TFDS: they feed runs, and nothing else.

May import `delays` only; importing it needs no TensorFlow. Start reading at `in_memory.py` for
small sets, at `streaming.py` for ImageNet, at `batches.py` for how workers share an epoch.
"""

from asgd_jax.data.augment import augmenter, identity, random_crop_flip
from asgd_jax.data.batches import BatchPlan, epoch_batches, epoch_permutation, plan_batches
from asgd_jax.data.facts import DATASETS, FACTS, Facts
from asgd_jax.data.in_memory import Dataset, load, normalizer
from asgd_jax.data.normalize import imagenet_normalizer
from asgd_jax.data.numbered import BatchOf, make_batch_of
from asgd_jax.data.prepared import DatasetNotFoundError
from asgd_jax.data.streaming import (
    StreamSizes,
    stream_sizes,
    train_batches,
    validation_batches,
)

__all__ = [
    "DATASETS",
    "FACTS",
    "BatchOf",
    "BatchPlan",
    "Dataset",
    "DatasetNotFoundError",
    "Facts",
    "StreamSizes",
    "augmenter",
    "epoch_batches",
    "epoch_permutation",
    "identity",
    "imagenet_normalizer",
    "load",
    "make_batch_of",
    "normalizer",
    "plan_batches",
    "random_crop_flip",
    "stream_sizes",
    "train_batches",
    "validation_batches",
]
