r"""Figures 1 and 13: LeNet on MNIST, 32 workers of 64 samples, no momentum, no weight decay.

Arms (`--config=configs/mnist_cnn.py:ARM`); tau = 31, as 32 workers make it (the captions say 32):
  ssgd       large-batch S-SGD, batch 2048, learning rate .32 (default): the dashed line of fig. 1
  asgd       A-SGD, learning rate .32 / 31 = .0103 (eq. 8): the best of figs. 1 and 13, .01
  asgd_exact A-SGD, learning rate .0080: exactly the minima that are stable under ssgd
  asgd_sqrt  A-SGD, learning rate .32 / sqrt(31) = .057: too large (fig. 1: beyond .05)
  asgd_same  A-SGD, learning rate .32 unchanged: diverges; the base of fig. 1's scan, by
             `--config.learning_rate=0.02` and the like

Expected after 3 epochs on the whole of MNIST: ssgd about 3.6 % validation error, asgd 4.2 %.
The figures show the steady state: add `--config.epochs=50`, and seeds by `--config.seed=1`.
Hardware: 2 CPU cores, about 8 s an epoch (measured).

  python scripts/train.py --config=configs/mnist_cnn.py:asgd --workdir=runs/mnist_asgd

Reduced by overrides alone (42.9 % error after 780 updates; 16 s on 2 CPU cores, measured):

  python scripts/train.py --config=configs/mnist_cnn.py:asgd --workdir=runs/mnist_quick \
    --config.width=0.25 --config.num_train=5000 --config.num_validation=1000 --config.epochs=10
"""

from typing import Any

from ml_collections import ConfigDict

from asgd_jax.training import default_config
from asgd_jax.training.config import pick_arm

_DELAY = 31

ARMS: dict[str, dict[str, Any]] = {
    "ssgd": {"delay": 0},
    "asgd": {"delay": _DELAY, "learning_rate_rule": "inverse"},
    "asgd_exact": {"delay": _DELAY, "learning_rate_rule": "exact"},
    "asgd_sqrt": {"delay": _DELAY, "learning_rate_rule": "sqrt"},
    "asgd_same": {"delay": _DELAY},
}


def get_config(arm: str = "ssgd") -> ConfigDict:
    """Returns the configuration of an arm."""
    config = default_config()
    config.dataset = "mnist"
    config.normalize = "half"
    config.model = "mnist_cnn"
    config.learning_rate = 0.32
    config.update(pick_arm(ARMS, arm, "mnist_cnn"))
    return config
