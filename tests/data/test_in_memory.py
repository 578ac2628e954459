"""In-memory data sets: splits, subsets, normalisation, and the real files."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from asgd_jax import data
from asgd_jax.data.in_memory import stratified_order


def test_digits_are_split_once_and_completely():
    digits = data.load("digits")
    assert digits.train_images.shape == (1437, 8, 8, 1)
    assert digits.validation_images.shape == (360, 8, 8, 1)
    assert digits.num_classes == 10
    whole = np.concatenate([digits.train_images, digits.validation_images])
    labels = np.concatenate([digits.train_labels, digits.validation_labels])
    bunch = load_digits()
    # The bytes give the 17 grey levels back, and every image is there once, with its label.
    levels = np.rint(whole[..., 0].astype(np.float64) * 16 / 255)
    ours = {(image.tobytes(), int(label)) for image, label in zip(levels, labels, strict=True)}
    theirs = {(i.tobytes(), int(k)) for i, k in zip(bunch.images, bunch.target, strict=True)}
    assert ours == theirs


@pytest.mark.parametrize("name", ["digits", pytest.param("mnist", marks=pytest.mark.realdata)])
def test_the_facts_are_those_of_the_data(name, request):
    folder = None if name == "digits" else request.getfixturevalue("tfds_data_dir")
    loaded, facts = data.load(name, data_dir=folder), data.FACTS[name]
    assert loaded.train_images.shape == (facts.num_train, *facts.image_shape)
    assert set(loaded.train_labels.tolist()) == set(range(facts.num_classes))


def test_digits_split_is_stratified_and_deterministic():
    digits, again = data.load("digits"), data.load("digits")
    np.testing.assert_array_equal(digits.train_images, again.train_images)
    share = np.bincount(digits.validation_labels) / np.bincount(load_digits().target)
    assert np.abs(share - 360 / 1797).max() < 0.01


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    seed=st.integers(0, 5),
    fraction=st.floats(0, 1),
)
def test_every_prefix_holds_the_classes_in_proportion(labels, seed, fraction):
    labels = np.array(labels)
    order = stratified_order(labels, seed)
    assert sorted(order) == list(range(len(labels)))
    size = round(fraction * len(labels))
    counts = np.bincount(labels, minlength=5)
    taken = np.bincount(labels[order[:size]], minlength=5)
    # Each class is within half a member of a common quantile; the quantile is off by at most
    # half a member a class, in the class's share.
    present = np.count_nonzero(counts)
    assert np.all(np.abs(taken - size * counts / len(labels)) <= 1 + present / 2)


def test_subsets_are_nested_and_stratified():
    small, large = data.load("digits", num_train=100), data.load("digits", num_train=500)
    assert np.bincount(small.train_labels).min() >= 9
    rows = {image.tobytes() for image in large.train_images}
    assert all(image.tobytes() in rows for image in small.train_images)
    np.testing.assert_array_equal(small.validation_labels, large.validation_labels)
    assert data.load("digits", num_validation=50).validation_labels.size == 50
    everything = data.load("digits", num_train=1437)
    np.testing.assert_array_equal(everything.train_images, data.load("digits").train_images)


def test_own_normalisation_is_that_of_the_samples_kept():
    digits = data.load("digits", num_train=300)
    scaled = digits.train_images.astype(np.float64) / 255
    np.testing.assert_allclose(digits.mean, scaled.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(digits.std, scaled.std((0, 1, 2)), rtol=1e-6)
    normalized = np.asarray(data.normalizer(digits)(digits.train_images), np.float64)
    assert abs(normalized.mean()) < 1e-5
    assert abs(normalized.std() - 1) < 1e-5


def test_half_normalisation():
    digits = data.load("digits", normalize="half")
    normalized = data.normalizer(digits)(digits.train_images)
    assert normalized.dtype == np.float32
    assert (normalized.min(), normalized.max()) == (-1, 1)
    want = (digits.train_images.astype(np.float64) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(normalized, want, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "svhn"}, "unknown data set 'svhn': use one of digits, mnist, cifar10, cifar100"),
        ({"name": "digits", "normalize": "zca"}, "unknown normalize='zca'"),
        ({"name": "digits", "num_train": 1438}, "num_train=1438: there are 1437 samples"),
        ({"name": "digits", "num_validation": 0}, "num_validation=0"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        data.load(**options)


@pytest.mark.realdata
def test_mnist(tfds_data_dir):
    mnist = data.load("mnist", data_dir=tfds_data_dir)
    assert mnist.train_images.shape == (60_000, 28, 28, 1)
    assert mnist.validation_images.shape == (10_000, 28, 28, 1)
    assert (mnist.train_images.dtype, mnist.train_labels.dtype) == (np.uint8, np.int32)
    # Published facts of the set: the counts of ones and fives, and the mean and deviation.
    assert np.bincount(mnist.train_labels)[[1, 5]].tolist() == [6742, 5421]
    np.testing.assert_allclose([mnist.mean[0], mnist.std[0]], [0.1307, 0.3081], atol=5e-5)


@pytest.mark.realdata
def test_cifar10_equals_plain_tfds(tfds_data_dir):
    from asgd_jax.data.prepared import tensorflow_modules

    cifar = data.load("cifar10", data_dir=tfds_data_dir)
    assert cifar.train_images.shape == (50_000, 32, 32, 3)
    assert np.bincount(cifar.train_labels).tolist() == [5000] * 10
    assert np.bincount(cifar.validation_labels).tolist() == [1000] * 10
    # Published values of the lossless set. In a JPEG-coded copy TensorFlow's decoder takes 0.005
    # off red and blue; TFDS's own files are PNG.
    np.testing.assert_allclose(cifar.mean, [0.4914, 0.4822, 0.4465], atol=0.006)
    np.testing.assert_allclose(cifar.std, [0.2470, 0.2435, 0.2616], atol=0.003)
    _, tfds = tensorflow_modules()
    plain = tfds.load("cifar10", split="test", data_dir=tfds_data_dir, shuffle_files=False)
    for index, example in enumerate(tfds.as_numpy(plain.take(200))):
        assert example["label"] == cifar.validation_labels[index]
        np.testing.assert_array_equal(example["image"], cifar.validation_images[index])
