"""What is known of the official data sets before anything is read."""

from typing import NamedTuple

WINDOW = 64  # characters of a sample of text
ALPHABET = 128  # ASCII


class Facts(NamedTuple):
    """Of a data set.

    Attributes:
      image_shape: (height, width, channels) in pixels; (characters,) of a window of text; None
        where images are streamed, and cut to whatever size is asked for.
      num_classes: labels are 0, ..., num_classes - 1.
      num_train: training samples.
      crop_flip: whether random crops and mirror images are what one trains on.
      url: of an archive that TFDS downloads by itself; None where it downloads nothing.
      is_text: whether samples are windows of characters, each with the next one for its label.
    """

    image_shape: tuple[int, ...] | None
    num_classes: int
    num_train: int
    crop_flip: bool = False
    url: str | None = None
    is_text: bool = False


_CIFAR = "https://www.cs.toronto.edu/~kriz/"

FACTS = {
    "digits": Facts((8, 8, 1), 10, 1437),
    "mnist": Facts(
        (28, 28, 1),
        10,
        60_000,
        url="https://storage.googleapis.com/cvdf-datasets/mnist/t10k-labels-idx1-ubyte.gz",
    ),
    "cifar10": Facts((32, 32, 3), 10, 50_000, True, f"{_CIFAR}cifar-10-binary.tar.gz"),
    "cifar100": Facts((32, 32, 3), 100, 50_000, True, f"{_CIFAR}cifar-100-binary.tar.gz"),
    "python_topics": Facts((WINDOW,), ALPHABET, 5760, is_text=True),
    "tiny_shakespeare": Facts(
        (WINDOW,),
        ALPHABET,
        15_685,
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        is_text=True,
    ),
    "imagenet2012": Facts(None, 1000, 1_281_167, True),
}
# Those that are loaded into memory whole.
DATASETS = tuple(name for name, facts in FACTS.items() if facts.image_shape)


def in_memory_facts(name: str) -> Facts:
    """Returns the facts of a data set that `load` knows.

    Raises:
      ValueError: for any other, listing those.

    >>> in_memory_facts("cifar100").num_classes
    100
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: use one of {', '.join(DATASETS)}")
    return FACTS[name]
