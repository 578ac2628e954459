"""Data sets small enough to live on the device whole: digits, MNIST, CIFAR, and text."""

import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from asgd_jax.data.facts import in_memory_facts
from asgd_jax.data.normalize import Normalizer, channel_statistics, normalize_with
from asgd_jax.data.prepared import DatasetNotFoundError, prepared_builder, reading
from asgd_jax.data.text import load_tfds_text, load_topics
from asgd_jax.delays.processes import as_integer

NORMALIZATIONS = ("own", "half")

_DIGITS_VALIDATION = 360

Arrays = tuple[np.ndarray, np.ndarray]


class Dataset(NamedTuple):
    """A classification data set in host memory.

    Attributes:
      name: what `load` was asked for.
      train_images: uint8 array of shape (num_train, height, width, channels); of text, of shape
        (num_train, characters).
      train_labels: int32 array of shape (num_train,); of text the next characters, of the shape of
        `train_images`.
      validation_images: uint8, like `train_images`.
      validation_labels: int32, like `train_labels`.
      num_classes: labels are 0, ..., num_classes - 1.
      mean: float32 array of shape (channels,), of intensities in [0, 1]; `normalizer` subtracts it.
        None of text.
      std: float32 array of shape (channels,), of intensities in [0, 1]; `normalizer` divides by it.
        None of text.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray
    num_classes: int
    mean: np.ndarray | None
    std: np.ndarray | None


def stratified_order(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Returns a shuffled order of which every prefix holds the classes in their proportions.

    The r-th of the n_c members of class c stands at (r + 1/2) / n_c of the whole; ties keep the
    shuffled order. Prefixes are nested, so a small run's data is part of a large one's.

    Args:
      labels: integers of shape (n,).
      seed: of the shuffle.

    Returns:
      Integers of shape (n,), a permutation of 0, ..., n - 1.

    >>> labels = np.array([0, 0, 0, 0, 1, 1])
    >>> sorted(labels[stratified_order(labels)[:3]].tolist())
    [0, 0, 1]
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    _, member_of, counts = np.unique(labels[shuffled], return_inverse=True, return_counts=True)
    by_class = np.argsort(member_of, kind="stable")
    rank = np.empty(len(labels))
    rank[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return shuffled[np.argsort((rank + 0.5) / counts[member_of], kind="stable")]


def _subset(arrays: Arrays, size: int | None, what: str) -> Arrays:
    """The first `size` in stratified order, put back in the order of the files; of text, simply the
    first ones, which no class tells apart.
    """
    images, labels = arrays
    if size is None:
        return arrays
    if not 1 <= as_integer(size, what) <= len(labels):
        raise ValueError(
            f"{what}={size}: there are {len(labels)} samples, ask for 1 to {len(labels)}"
        )
    keep = np.arange(size) if labels.ndim > 1 else np.sort(stratified_order(labels)[:size])
    return images[keep], labels[keep]


def _load_digits() -> tuple[Arrays, Arrays]:
    # A line an image: 64 intensities, and the digit. Only the file is scikit-learn's: importing
    # that takes over a second, more than all else that a small run does before its first update.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DatasetNotFoundError("digits comes with scikit-learn: pip install scikit-learn")
    file = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(file, delimiter=",", dtype=np.int32)
    # Intensities are 0, ..., 16: seventeen distinct bytes, so nothing is lost by the rounding.
    images = np.rint(table[:, :-1].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = np.ascontiguousarray(table[:, -1])
    order = stratified_order(labels)
    train, validation = np.sort(order[:-_DIGITS_VALIDATION]), np.sort(order[-_DIGITS_VALIDATION:])
    return (images[train], labels[train]), (images[validation], labels[validation])


def _load_tfds(name: str, data_dir: str | os.PathLike[str] | None) -> tuple[Arrays, Arrays]:
    builder = prepared_builder(name, data_dir)

    def read(split: str) -> Arrays:
        # One batch of everything: TFDS decodes in parallel and keeps the order of the files.
        batch = builder.as_dataset(split=split, batch_size=-1, shuffle_files=False)
        return batch["image"].numpy(), batch["label"].numpy().astype(np.int32)

    with reading(builder):
        return read("train"), read("test")


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    num_train: int | None = None,
    num_validation: int | None = None,
    normalize: str = "own",
) -> Dataset:
    """Loads a data set into host memory, as uint8; `normalizer` turns it to float32 on the device.

    The validation set is the official test split; for digits, which has none, 360 of the 1,797
    images, stratified, leaving 1,437 to train on; for text the official validation split, for
    python_topics, which has none, its last tenth. digits comes with scikit-learn, python_topics
    with Python, the others come through TFDS.

    Args:
      name: one of `DATASETS`.
      data_dir: folder or `gs://` address of TFDS's prepared data; TFDS_DATA_DIR by default.
      num_train: keep only so many training samples, in class proportions; smaller subsets lie
        within larger ones.
      num_validation: the same for the validation set.
      normalize: "own" for the mean and standard deviation of each channel over the training
        samples kept, "half" for (x - 0.5) / 0.5 with x in [0, 1]; without meaning for text.

    Returns:
      A `Dataset`.

    Raises:
      ValueError: for an unknown name or normalisation, or a subset larger than the set.
      DatasetNotFoundError: when the data is neither in the folder nor downloadable.
      OSError: when it is there and damaged.

    >>> digits = load("digits")
    >>> digits.train_images.shape, digits.validation_images.shape, digits.train_images.dtype
    ((1437, 8, 8, 1), (360, 8, 8, 1), dtype('uint8'))
    """
    facts = in_memory_facts(name)
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"unknown normalize={normalize!r}: use one of {', '.join(NORMALIZATIONS)}")
    if facts.is_text and normalize != NORMALIZATIONS[0]:
        raise ValueError(f"normalize={normalize!r} has no meaning for {name}, which is text")
    own = {"digits": _load_digits, "python_topics": load_topics}
    tfds = load_tfds_text if facts.is_text else _load_tfds
    read = own[name]() if name in own else tfds(name, data_dir)
    train = _subset(read[0], num_train, "num_train")
    validation = _subset(read[1], num_validation, "num_validation")
    if facts.is_text:
        mean = std = None
    elif normalize == "own":
        mean, std = channel_statistics(train[0])
    else:
        mean = std = np.full(train[0].shape[-1], 0.5, np.float32)
    return Dataset(name, *train, *validation, facts.num_classes, mean, std)


def normalizer(dataset: Dataset) -> Normalizer:
    """Returns the data set's normalisation: uint8 (or floats in 0, ..., 255) to float32, jittable.

    Of text: characters as int32.

    >>> digits = load("digits")
    >>> float(abs(normalizer(digits)(digits.train_images).mean())) < 1e-4
    True
    """
    if dataset.mean is None or dataset.std is None:
        return lambda characters: jnp.asarray(characters).astype(jnp.int32)
    return normalize_with(dataset.mean, dataset.std)
