"""The data of a run: in memory, or read from disk while it trains. Data and nothing else."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from asgd_jax import data
from asgd_jax.training.config import STREAMED
from asgd_jax.training.program import DataSpec

HostBatch = tuple[np.ndarray, np.ndarray]  # images, labels


class Stream(NamedTuple):
    """A data set on disk; every process reads its own share of each batch.

    Attributes:
      train: `train(step)`: batches of updates step, step + 1, ... for ever.
      validation: `validation(batch_size)`: the validation set once, labels of padding -1.
    """

    train: Callable[[int], Iterator[HostBatch]]
    validation: Callable[[int], Iterator[HostBatch]]


class Feed(NamedTuple):
    """A data set, as far as training needs it.

    Attributes:
      facts: what the program must know of it.
      samples: the data set in host memory, or None when it is streamed.
      stream: the data set on disk, or None when it is in memory.
    """

    facts: DataSpec
    samples: data.Dataset | None
    stream: Stream | None


def open_feed(config: ConfigDict) -> Feed:
    """Returns the data of a configuration.

    Raises:
      ValueError: for an unknown data set or batches that do not fit it or the processes.
      DatasetNotFoundError: when the data is neither prepared nor downloadable.
    """
    if config.dataset in STREAMED:
        return _open_stream(config)
    return feed_of(config, load_dataset(config))


def feed_of(config: ConfigDict, dataset: data.Dataset) -> Feed:
    """Returns the feed of a data set that is loaded already."""
    normalize = data.normalizer(dataset)
    augment = data.augmenter(config.dataset) if config.augment else data.identity
    facts = DataSpec(
        plan=plan_of(config, len(dataset.train_labels)),
        num_classes=dataset.num_classes,
        image_shape=dataset.train_images.shape[1:],
        preprocess=lambda key, images: normalize(augment(key, images)),
        normalize=normalize,
    )
    return Feed(facts, dataset, None)


def plan_of(config: ConfigDict, num_samples: int) -> data.BatchPlan:
    """Returns the batch arithmetic of a configuration on a data set of `num_samples`."""
    return data.plan_batches(
        num_samples,
        num_workers=config.num_workers,
        worker_batch_size=config.worker_batch_size,
        delay=config.delay,
    )


def load_dataset(config: ConfigDict) -> data.Dataset:
    """Returns the data set of a configuration, in host memory."""
    return data.load(
        config.dataset,
        data_dir=config.data_dir,
        num_train=config.num_train,
        num_validation=config.num_validation,
        normalize=config.normalize,
    )


def first_inputs(config: ConfigDict, feed: Feed, num_batches: int) -> Iterator[jax.Array]:
    """Yields the model inputs of a run's first updates, without augmentation by crops and flips."""
    normalize, plan = feed.facts.normalize, feed.facts.plan
    if feed.samples is None:
        assert feed.stream is not None, "a feed has samples or a stream"
        batches = feed.stream.train(0)
        for _ in range(num_batches):
            yield normalize(jnp.asarray(next(batches)[0]))
        return
    for samples in jax.device_get(data.epoch_batches(config.seed, 0, plan))[:num_batches]:
        yield normalize(jnp.asarray(feed.samples.train_images[samples.ravel()]))


def _open_stream(config: ConfigDict) -> Feed:
    """Crops and flips while decoding; images travel as uint8 and are normalised on the device."""
    sizes = data.stream_sizes(config.data_dir, name=config.dataset)
    plan = plan_of(config, sizes.num_train)
    normalize = data.imagenet_normalizer()
    common: dict[str, Any] = {
        "image_size": config.image_size,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "name": config.dataset,
    }

    def train(step: int) -> Iterator[HostBatch]:
        return data.train_batches(
            config.data_dir,
            batch_size=plan.update_batch_size,
            seed=config.seed,
            start_step=step,
            **common,
        )

    def validation(batch_size: int) -> Iterator[HostBatch]:
        batches = data.validation_batches(config.data_dir, batch_size=batch_size, **common)
        for images, labels, mask in batches:
            yield images, np.where(mask > 0, labels, -1).astype(np.int32)

    facts = DataSpec(
        plan=plan,
        num_classes=sizes.num_classes,
        image_shape=(config.image_size, config.image_size, 3),
        preprocess=lambda key, images: normalize(images),
        normalize=normalize,
    )
    return Feed(facts, None, Stream(train, validation))
