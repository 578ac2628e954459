"""ImageNet as a stream of batches, decoded and augmented on the host, that can be resumed.

The stream is a function of (seed, step). Every epoch has its own order (files shuffled, then a
shuffle buffer of encoded images) and every image of an epoch its own draws, keyed by seed, epoch
and position. A stream started at step s therefore equals an uninterrupted one from s on: the
earlier epochs aren't read at all, the earlier images of this epoch are read but not decoded.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from asgd_jax.data import jpeg
from asgd_jax.data.prepared import prepared_builder, reading, tensorflow_modules
from asgd_jax.delays.processes import as_integer

NAME = "imagenet2012"

PathLike = str | os.PathLike[str]
_DRAWN_AT_ONCE = 64  # images: a draw for each costs as much as a tenth of decoding it
_SHUFFLE_BUFFER = 8192  # encoded images held for shuffling (ImageNet: about 110 KB each)

TrainBatch = tuple[np.ndarray, np.ndarray]
ValidationBatch = tuple[np.ndarray, np.ndarray, np.ndarray]


class StreamSizes(NamedTuple):
    """Sizes of a streamed data set: training and validation images, and classes."""

    num_train: int
    num_validation: int
    num_classes: int


class _Share(NamedTuple):
    """What one process reads of every epoch."""

    process_index: int
    process_count: int
    size: int
    used: int  # without the incomplete last batch


def stream_sizes(data_dir: PathLike | None = None, *, name: str = NAME) -> StreamSizes:
    """Returns how many images and classes the prepared data set has, without reading an image.

    Raises:
      DatasetNotFoundError: when the folder doesn't hold the data set.
      OSError: when it lacks a split.
    """
    builder = prepared_builder(name, data_dir)
    with reading(builder):
        return StreamSizes(
            builder.info.splits["train"].num_examples,
            builder.info.splits["validation"].num_examples,
            builder.info.features["label"].num_classes,
        )


def _local_batch_size(batch_size: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index={process_index} of process_count={process_count}: it must be 0 to "
            f"{max(process_count - 1, 0)}"
        )
    if as_integer(batch_size, "batch_size") == 0 or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} can't be shared by {process_count} processes: use a multiple "
            f"of {process_count}"
        )
    return batch_size // process_count


def _read_encoded(builder: Any, split: str, start: int, stop: int, shuffle_seed: Any) -> Any:
    """Images start, ..., stop - 1 of a split, still encoded, as TFDS's dicts."""
    _, tfds = tensorflow_modules()
    # The number of files read at a time is part of the order, so it mustn't depend on the machine.
    config = tfds.ReadConfig(
        try_autocache=False,
        skip_prefetch=True,
        shuffle_seed=shuffle_seed,
        shuffle_reshuffle_each_iteration=False,
        interleave_cycle_length=16,
        interleave_block_length=16,
    )
    return builder.as_dataset(
        split=f"{split}[{start}:{stop}]",
        shuffle_files=shuffle_seed is not None,
        decoders={"image": tfds.decode.SkipDecoding()},
        read_config=config,
    )


def _read_epochs(builder: Any, share: _Share, seed: int, first_epoch: int, skipped: int) -> Any:
    """All epochs in turn: pairs of draws for the augmentation and what `_read_encoded` gives.

    The first one is read without its first `skipped` images.

    One graph serves every epoch, as the seeds are tensors: on a small set, building a graph for
    each would take as long as decoding its images.
    """
    tf, _ = tensorflow_modules()
    first = share.process_index * share.size

    def read_epoch(epoch: Any) -> Any:
        key = tf.stack([tf.constant(seed, tf.int64), epoch])
        seeds = tf.random.stateless_uniform([3], key, None, None, tf.int64, "philox")
        skip = tf.where(epoch == first_epoch, tf.constant(skipped, tf.int64), 0)
        encoded = _read_encoded(builder, "train", first, first + share.size, seeds[0])
        encoded = encoded.shuffle(_SHUFFLE_BUFFER, seeds[1], reshuffle_each_iteration=False)

        def draw(block: Any) -> Any:
            # A number of its own for every block of the epoch, over all processes.
            counter = block * share.process_count + share.process_index
            key = tf.stack([seeds[2], counter])
            return tf.random.stateless_uniform([_DRAWN_AT_ONCE, jpeg.NUM_DRAWS], key, alg="philox")

        blocks = tf.data.Dataset.range(-(-share.used // _DRAWN_AT_ONCE))
        draws = blocks.map(draw).unbatch()
        return tf.data.Dataset.zip((draws, encoded.take(share.used))).skip(skip)

    plain = tf.autograph.experimental.do_not_convert  # TFDS's reader isn't its to rewrite
    epochs = tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max)
    return epochs.flat_map(plain(read_epoch))


def _decode(examples: Any, decode: Callable[..., Any]) -> Any:
    """Pairs of a decoded image and its int32 label, on all cores and in order.

    Args:
      examples: TFDS's dicts, or pairs of draws and those.
      decode: of the encoded image, and the draws if there are any.
    """
    tf, _ = tensorflow_modules()

    def pair(*parts: Any) -> tuple[Any, Any]:
        *draws, example = parts
        return decode(example["image"], *draws), tf.cast(example["label"], tf.int32)

    return examples.map(
        pair,
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )


def train_batches(
    data_dir: PathLike | None = None,
    *,
    batch_size: int,
    image_size: int = 224,
    seed: int = 0,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    name: str = NAME,
) -> Iterator[TrainBatch]:
    """Yields augmented training batches without end: random-resized crop and flip, reproducible.

    Process p of P reads its own contiguous 1/P of the images, the same ones every epoch. An epoch
    is num_train // batch_size steps, as in `plan_batches`; the incomplete last batch is dropped.

    Args:
      data_dir: folder or `gs://` address of TFDS's prepared data; TFDS_DATA_DIR by default.
      batch_size: samples of a step over all processes; a multiple of `process_count`.
      image_size: pixels of a side.
      seed: of order and augmentation.
      start_step: first step to yield.
      process_index: p, of this process (`jax.process_index()`).
      process_count: P (`jax.process_count()`).
      name: TFDS's name of the data set, JPEG-coded with features "image" and "label".

    Returns:
      Iterator of (images, labels): uint8 (b, image_size, image_size, 3) and int32 (b,), with
      b = batch_size / process_count. It raises OSError at damaged records.

    Raises:
      DatasetNotFoundError: when the folder doesn't hold the data set.
      ValueError: when the batch can't be shared by the processes or exceeds the data set.
    """
    local = _local_batch_size(batch_size, process_index, process_count)
    builder = prepared_builder(name, data_dir)
    total = stream_sizes(data_dir, name=name).num_train
    size = total // process_count
    if size < local:
        raise ValueError(f"batch_size={batch_size} exceeds the {total} training images: lower it")
    epoch, position = divmod(as_integer(start_step, "start_step"), size // local)
    share = _Share(process_index, process_count, size, size - size % local)
    seed = as_integer(seed, "seed")

    def generate() -> Iterator[TrainBatch]:
        with reading(builder):
            encoded = _read_epochs(builder, share, seed, epoch, position * local)
            images = _decode(encoded, lambda x, draws: jpeg.decode_train(x, draws, image_size))
            batches = images.batch(local, drop_remainder=True).prefetch(4)
            yield from batches.as_numpy_iterator()

    return generate()


def validation_batches(
    data_dir: PathLike | None = None,
    *,
    batch_size: int,
    image_size: int = 224,
    process_index: int = 0,
    process_count: int = 1,
    name: str = NAME,
) -> Iterator[ValidationBatch]:
    """Yields the whole validation set once: short side to 256/224 of the size, centre crop.

    Nothing is dropped: the last batch is filled up with black images of mask 0, and every process
    yields equally many batches, so that collective operations stay in step.

    Args:
      data_dir, image_size, process_index, process_count, name: as for `train_batches`.
      batch_size: samples of a batch over all processes; a multiple of `process_count`.

    Returns:
      Iterator of (images, labels, mask): uint8 (b, image_size, image_size, 3), int32 (b,) and
      float32 (b,) with b = batch_size / process_count; mask is 1 for an image, 0 for filling. It
      raises OSError at damaged records.

    Raises:
      DatasetNotFoundError: when the folder doesn't hold the data set.
      ValueError: when the batch can't be shared by the processes.
    """
    local = _local_batch_size(batch_size, process_index, process_count)
    builder = prepared_builder(name, data_dir)
    total = stream_sizes(data_dir, name=name).num_validation
    start, stop = (total * index // process_count for index in (process_index, process_index + 1))
    largest_share = -(-total // process_count)
    num_batches = -(-largest_share // local)

    def read() -> Iterator[TrainBatch]:
        if start == stop:
            return
        tf, _ = tensorflow_modules()
        with reading(builder):
            encoded = _read_encoded(builder, "validation", start, stop, None)
            images = _decode(encoded, lambda x: jpeg.decode_validation(x, image_size))
            yield from images.batch(local).prefetch(tf.data.AUTOTUNE).as_numpy_iterator()

    def generate() -> Iterator[ValidationBatch]:
        batches = read()
        nothing = np.zeros((0, image_size, image_size, 3), np.uint8), np.zeros(0, np.int32)
        for _ in range(num_batches):
            images, labels = next(batches, nothing)
            missing = local - len(labels)
            mask = np.ones(len(labels), np.float32)
            if missing:
                images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
                labels, mask = np.pad(labels, (0, missing)), np.pad(mask, (0, missing))
            yield images, labels, mask

    return generate()
