"""Figures 1 and 13: LeNet on MNIST, 32 workers of 64 samples, no momentum, no weight decay.

Arms (`--config=configs/mnist_cnn.py:ARM`):
  ssgd      large-batch S-SGD, batch 2048, learning rate .32 (default)
  asgd      A-SGD, tau = 31, learning rate .32 / 31 (eq. 8)
  asgd_same A-SGD, tau = 31, learning rate .32 unchanged: diverges

Expected after 3 epochs on the whole of MNIST: ssgd about 3.6 % validation error, asgd 4.2 %.
Hardware: 2 CPU cores, about 8 s an epoch.

  python scripts/train.py --config=configs/mnist_cnn.py:asgd --workdir=runs/mnist_asgd
"""

from ml_collections import ConfigDict

from asgd_jax.training import default_config

ARMS = ("ssgd", "asgd", "asgd_same")


def get_config(arm: str = "ssgd") -> ConfigDict:
    """Returns the configuration of an arm."""
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r} of mnist_cnn: use one of {', '.join(ARMS)}")
    config = default_config()
    config.dataset = "mnist"
    config.normalize = "half"
    config.model = "mnist_cnn"
    config.learning_rate = 0.32
    if arm != "ssgd":
        config.delay = 31
    if arm == "asgd":
        config.learning_rate_rule = "inverse"
    return config
