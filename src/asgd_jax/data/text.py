"""Text in windows of characters: each is to be told from those before it."""

import os
from pydoc_data.topics import topics

import numpy as np

from asgd_jax.data.facts import WINDOW
from asgd_jax.data.prepared import prepared_builder, reading

Windows = tuple[np.ndarray, np.ndarray]  # characters, and the ones that follow them

_TOPICS_WINDOWS = 6400  # of Python's help; what newer versions have beyond is left out
_VALIDATION_SHARE = 10  # one window in so many, the last ones


def cut_windows(text: str, length: int = WINDOW) -> Windows:
    """Cuts a text into consecutive windows; what is left over at its end is dropped.

    Characters beyond ASCII count as "?".

    Args:
      text: at least length + 1 characters.
      length: of a window.

    Returns:
      uint8 array of shape (n, length), and int32 array of that shape with the next character of
      each.

    Raises:
      ValueError: for a text that is shorter.

    >>> characters, following = cut_windows("abcdefgh", length=3)
    >>> [bytes(row).decode() for row in characters], bytes(following[1].tolist()).decode()
    (['abc', 'def'], 'efg')
    """
    codes = np.frombuffer(text.encode("ascii", errors="replace"), np.uint8)
    count = (len(codes) - 1) // length
    if count < 1:
        raise ValueError(f"a text of {len(codes)} characters holds no window of {length} and one")
    size = count * length
    following = codes[1 : size + 1].astype(np.int32)
    return codes[:size].reshape(count, length).copy(), following.reshape(count, length)


def load_topics() -> tuple[Windows, Windows]:
    """Returns Python's own help, training and validation windows: prose and code, 410 kB.

    It comes with every CPython, and its words differ a little between versions.
    """
    characters, following = cut_windows("\n\n".join(topics[name] for name in sorted(topics)))
    num_train = _TOPICS_WINDOWS - _TOPICS_WINDOWS // _VALIDATION_SHARE
    train, validation = slice(num_train), slice(num_train, _TOPICS_WINDOWS)
    return (characters[train], following[train]), (characters[validation], following[validation])


def load_tfds_text(name: str, data_dir: str | os.PathLike[str] | None) -> tuple[Windows, Windows]:
    """Returns windows of the splits "train" and "validation" of a text that TFDS prepares.

    Raises:
      DatasetNotFoundError: when it is neither in the folder nor downloadable.
      OSError: when it is there and damaged.
    """
    builder = prepared_builder(name, data_dir)

    def read(split: str) -> Windows:
        texts = [example["text"].numpy() for example in builder.as_dataset(split=split)]
        return cut_windows(b"".join(texts).decode("utf-8", errors="replace"))

    with reading(builder):
        return read("train"), read("validation")
