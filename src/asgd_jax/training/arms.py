"""The arms of a config file: its variants by name, as `--config=configs/X.py:ARM` picks them."""

from collections.abc import Mapping
from typing import Any

Changes = dict[str, Any]


def pick_arm(arms: Mapping[str, Changes], name: str, config_name: str) -> Changes:
    """Returns what an arm changes in the configuration that all arms of a file share.

    Args:
      arms: field -> value, by arm.
      name: of the arm.
      config_name: of the config file, for the message.

    Returns:
      A dict of its own, for `ConfigDict.update`.

    Raises:
      ValueError: for an unknown arm, listing the known ones.

    >>> pick_arm({"ssgd": {"delay": 0}, "asgd": {"delay": 31}}, "asgd", "mnist_cnn")
    {'delay': 31}
    >>> pick_arm({"ssgd": {"delay": 0}}, "sgd", "mnist_cnn")
    Traceback (most recent call last):
    ...
    ValueError: unknown arm 'sgd' of mnist_cnn: use one of ssgd
    """
    if name not in arms:
        raise ValueError(f"unknown arm {name!r} of {config_name}: use one of {', '.join(arms)}")
    return dict(arms[name])
