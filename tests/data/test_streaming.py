"""The stream: what it yields, in which order, and that it resumes."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from asgd_jax.data import jpeg, streaming

NUM_TRAIN, NUM_VALIDATION = 50, 23
SMALL = {"batch_size": 8, "image_size": 16, "seed": 3}


def _labels(folder: Path, num_batches: int, **options) -> np.ndarray:
    batches = streaming.train_batches(folder, **{**SMALL, **options})
    return np.concatenate([labels for _, labels in islice(batches, num_batches)])


def test_sizes(labelled_stream):
    assert streaming.stream_sizes(labelled_stream) == (NUM_TRAIN, NUM_VALIDATION, NUM_TRAIN)


def test_several_files(labelled_stream):
    assert len(list(labelled_stream.rglob("*train*"))) == 5


def test_shapes_and_types(labelled_stream):
    images, labels = next(streaming.train_batches(labelled_stream, **SMALL))
    assert images.shape == (8, 16, 16, 3)
    assert images.dtype == np.uint8
    assert labels.shape == (8,)
    assert labels.dtype == np.int32


def test_an_epoch_shows_every_image_at_most_once_and_drops_the_partial_batch(labelled_stream):
    first, second = np.split(_labels(labelled_stream, 12), 2)
    assert first.size == 48
    assert np.unique(first).size == np.unique(second).size == 48


def test_order_and_pixels_are_a_function_of_the_seed(labelled_stream):
    def first(seed: int):
        return next(streaming.train_batches(labelled_stream, **{**SMALL, "seed": seed}))

    (images, labels), (again, labels_again), (other, other_labels) = first(3), first(3), first(4)
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, labels_again)
    assert (labels != other_labels).any()
    assert (images != other).any()


def test_epochs_differ_in_order_and_in_augmentation(labelled_stream):
    batches = islice(streaming.train_batches(labelled_stream, **SMALL), 12)
    pictures: dict[int, list[np.ndarray]] = {}
    orders: list[int] = []
    for images, labels in batches:
        orders.extend(labels)
        for image, label in zip(images, labels, strict=True):
            pictures.setdefault(int(label), []).append(image)
    assert len(orders) == 96
    assert orders[:48] != orders[48:]
    pairs = [pair for pair in pictures.values() if len(pair) == 2]
    assert all((first != second).any() for first, second in pairs)


@pytest.mark.parametrize("start_step", [1, 5, 6, 8, 13])
def test_resumed_stream_equals_the_uninterrupted_one(labelled_stream, start_step):
    whole = streaming.train_batches(labelled_stream, **SMALL)
    resumed = streaming.train_batches(labelled_stream, **SMALL, start_step=start_step)
    for (images, labels), (want_images, want_labels) in zip(
        islice(resumed, 3), islice(whole, start_step, start_step + 3), strict=True
    ):
        np.testing.assert_array_equal(images, want_images)
        np.testing.assert_array_equal(labels, want_labels)


def test_skipped_images_are_not_decoded(labelled_stream, monkeypatch):
    from asgd_jax.data.prepared import tensorflow_modules

    tf, _ = tensorflow_modules()
    decoded = set()

    def note(draws):
        decoded.add(draws.numpy().tobytes())
        return draws

    # No two images of a stream have equal draws.
    monkeypatch.setattr(jpeg, "decode_train", lambda encoded, draws, image_size: draws)
    whole = islice(streaming.train_batches(labelled_stream, **SMALL), 6)
    draws = [{row.tobytes() for row in batch} for batch, _ in whole]

    def noting(encoded, draws, image_size):
        return tf.ensure_shape(tf.py_function(note, [draws], tf.float32), [jpeg.NUM_DRAWS])

    monkeypatch.setattr(jpeg, "decode_train", noting)
    # Steps 4 and 5 are the last two of the epoch.
    rest = islice(streaming.train_batches(labelled_stream, **SMALL, start_step=4), 2)
    assert [labels.size for _, labels in rest] == [8, 8]
    assert decoded >= draws[4] | draws[5]
    assert decoded.isdisjoint(set.union(*draws[:4]))


def test_processes_share_the_images_without_overlap(labelled_stream):
    shares = [
        _labels(labelled_stream, 5, batch_size=9, process_index=p, process_count=3)
        for p in range(3)
    ]
    assert [share.size for share in shares] == [15, 15, 15]
    assert np.unique(np.concatenate(shares)).size == 45
    # The share is the same one every epoch.
    two = _labels(labelled_stream, 10, batch_size=9, process_index=1, process_count=3)
    assert len(np.unique(two)) <= NUM_TRAIN // 3


def test_processes_augment_independently(labelled_stream, monkeypatch):
    """Equal images at equal positions of two processes must not get equal crops."""
    monkeypatch.setattr(jpeg, "decode_train", lambda encoded, draws, *rest: draws)
    draws = [
        next(streaming.train_batches(labelled_stream, **SMALL, process_index=p, process_count=2))[0]
        for p in range(2)
    ]
    everything = np.concatenate(draws)
    assert everything.shape == (8, jpeg.NUM_DRAWS)
    assert np.unique(everything).size > 0.99 * everything.size


@pytest.mark.parametrize(("batch_size", "process_count"), [(8, 1), (23, 1), (6, 3), (64, 4)])
def test_validation_yields_everything_once(labelled_stream, batch_size, process_count):
    seen, counts = [], []
    for process in range(process_count):
        batches = list(
            streaming.validation_batches(
                labelled_stream,
                batch_size=batch_size,
                image_size=8,
                process_index=process,
                process_count=process_count,
            )
        )
        counts.append(len(batches))
        for images, labels, mask in batches:
            assert images.shape == (batch_size // process_count, 8, 8, 3)
            assert (images.dtype, labels.dtype, mask.dtype) == (np.uint8, np.int32, np.float32)
            assert not images[mask == 0].any()
            seen.extend(labels[mask == 1])
    assert sorted(seen) == list(range(NUM_VALIDATION))
    assert len(set(counts)) == 1


def test_a_process_without_images_yields_filling_in_step_with_the_others(labelled_stream):
    options = {"batch_size": 46, "image_size": 8, "process_count": 46}
    masks = [
        [mask.tolist() for *_, mask in streaming.validation_batches(labelled_stream, **options)]
        for options in ({**options, "process_index": 0}, {**options, "process_index": 1})
    ]
    assert masks == [[[0.0]], [[1.0]]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 9, "process_count": 2}, "batch_size=9 can't be shared by 2 processes"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 64}, "batch_size=64 exceeds the 50 training images"),
        ({"batch_size": 8, "process_index": 2, "process_count": 2}, "process_index=2"),
        ({"batch_size": 8, "start_step": -1}, "start_step must be an integer >= 0, got -1"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(labelled_stream, options, message):
    with pytest.raises(ValueError, match=message):
        streaming.train_batches(labelled_stream, **options)


@pytest.mark.realdata
def test_imagenet_sample(tfds_data_dir):
    assert streaming.stream_sizes(tfds_data_dir) == (800, 200, 1000)
    batches = streaming.train_batches(tfds_data_dir, batch_size=256, image_size=64)
    images, labels = zip(*islice(batches, 3), strict=True)
    # One image a class, so every label can occur only once.
    assert np.unique(np.concatenate(labels)).size == 768
    assert 60 < np.concatenate(images).mean() < 180
    validation = list(streaming.validation_batches(tfds_data_dir, batch_size=128, image_size=64))
    assert [mask.sum() for *_, mask in validation] == [128, 72]


@pytest.mark.realdata
def test_imagenet_sample_resumes_across_epochs(tfds_data_dir):
    options = {"batch_size": 200, "image_size": 32, "seed": 1}
    whole = islice(streaming.train_batches(tfds_data_dir, **options), 6, 7)
    resumed = streaming.train_batches(tfds_data_dir, **options, start_step=6)
    for got, want in zip(next(resumed), next(whole), strict=True):
        np.testing.assert_array_equal(got, want)
