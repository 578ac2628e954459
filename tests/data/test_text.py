"""Windows of text: every label is the character that follows."""

import numpy as np
import pytest

from asgd_jax import data
from asgd_jax.data.text import cut_windows
from asgd_jax.training.evaluate import pad_to_batches


def test_a_label_is_the_next_character_of_the_text():
    text = "".join(chr(32 + k % 90) for k in range(1000)) + "é"
    characters, following = cut_windows(text, length=10)
    assert (characters.dtype, following.dtype) == (np.uint8, np.int32)
    assert characters.shape == following.shape == (100, 10)
    whole = text.replace("é", "?").encode()
    assert characters.ravel().tolist() == list(whole[:1000])
    assert following.ravel().tolist() == list(whole[1:1001])
    with pytest.raises(ValueError, match="a text of 3 characters holds no window of 3 and one"):
        cut_windows("abc", length=3)


def test_topics_are_python_s_own_help():
    topics = data.load("python_topics")
    assert topics.train_images.shape == topics.train_labels.shape == (5760, 64)
    assert topics.validation_images.shape == (640, 64)
    assert (topics.num_classes, topics.mean) == (128, None)
    text = bytes(topics.train_images.ravel().tolist()).decode()
    assert "assert_stmt" in text
    assert text[1:] == bytes(topics.train_labels.ravel()[:-1].tolist()).decode()
    assert data.normalizer(topics)(topics.train_images[:2]).dtype == np.int32
    part = data.load("python_topics", num_train=10, num_validation=3)
    assert np.array_equal(part.train_images, topics.train_images[:10])
    assert len(part.validation_labels) == 3
    # Nothing of the one half is read in the other.
    assert not set(map(bytes, topics.train_images)) & set(map(bytes, topics.validation_images))


def test_what_text_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match="normalize='half' has no meaning for python_topics"):
        data.load("python_topics", normalize="half")
    with pytest.raises(data.DatasetNotFoundError, match="tiny_shakespeare is not in"):
        data.load("tiny_shakespeare", data_dir=tmp_path / "$none")


def test_padding_of_text_counts_nowhere():
    characters, labels = np.ones((5, 4), np.uint8), np.ones((5, 4), np.int32)
    images, padded = pad_to_batches(characters, labels, 3)
    assert images.shape == padded.shape == (2, 3, 4)
    assert (padded == -1).sum() == 4
