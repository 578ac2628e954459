"""The demo's runs on scikit-learn's digits: a small CNN, 33 workers of 8 samples, no momentum.

Arms (`--config=configs/digits.py:ARM`):
  ssgd      large-batch S-SGD, learning rate .5 (default)
  asgd      A-SGD, tau = 32, learning rate .5 / 32 (eq. 8)
  asgd_same A-SGD, tau = 32, learning rate .5 unchanged: diverges within the first epoch

Expected after 40 epochs: ssgd 2.8 % validation error, asgd 1.7 %.
Hardware: any; 4 s on 2 CPU cores. Needs no download.

  python scripts/train.py --config=configs/digits.py:asgd --workdir=runs/digits_asgd
"""

from typing import Any

from ml_collections import ConfigDict

from asgd_jax.experiments.demo import demo_config

ARMS: dict[str, dict[str, Any]] = {
    "ssgd": {"delay": 0},
    "asgd": {"delay": 32, "learning_rate_rule": "inverse"},
    "asgd_same": {"delay": 32},
}


def get_config(arm: str = "ssgd") -> ConfigDict:
    """Returns the configuration of an arm."""
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r} of digits: use one of {', '.join(ARMS)}")
    return demo_config(**ARMS[arm])
