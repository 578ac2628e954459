r"""Figure 11: ResNet-44 on CIFAR-10, constant learning rate, with and without (shifted) momentum.

Arms (`--config=configs/cifar10_resnet44.py:ARM`), all with 32 workers of 128 samples; those of
A-SGD have tau = 31 and learning rate 3.1 / 31 = .1 (eq. 8):
  ssgd             large-batch S-SGD, batch 4096, learning rate 3.1, momentum .9 (default)
  ssgd_no_momentum the same without momentum
  no_momentum      A-SGD, fig. 11's orange line
  standard         A-SGD with heavy-ball momentum .9, fig. 11's red line
  standard_damped  the same with gradients scaled by 1 - .9, so that the step is that of no_momentum
  shifted          A-SGD with shifted momentum .9 (eq. 11), fig. 11's blue line

Expected, from the caption: after many epochs the training error of no_momentum and standard shows
spikes, that of shifted none; momentum also removes those of large-batch training. It gives no
error rate. The caption doesn't say whether its momentum is damped: standard and standard_damped
are the two readings. Learning rate .1 and 200 epochs are those of the authors' example command;
weight decay is 0, residual branches start at zero, as in their program.
Hardware: one GPU or TPU chip. Wall time, ESTIMATES from .6 GFLOP an image and update, not measured:
30 minutes an arm on an H100, two days on 2 CPU cores.

  python scripts/train.py --config=configs/cifar10_resnet44.py:shifted --workdir=runs/resnet44

Reduced by overrides alone (to see it run; 84 % error after 156 updates; measured 62 s on 2 cores,
half of it for compiling):

  python scripts/train.py --config=configs/cifar10_resnet44.py:shifted --workdir=runs/resnet44_q \
    --config.model=resnet20 --config.width=0.5 --config.num_train=5000 \
    --config.num_validation=1000 --config.worker_batch_size=32 --config.epochs=1
"""

from typing import Any

from ml_collections import ConfigDict

from asgd_jax.training import default_config
from asgd_jax.training.config import pick_arm

_MOMENTUM = 0.9
_ASGD: dict[str, Any] = {"delay": 31, "learning_rate_rule": "inverse"}

ARMS: dict[str, dict[str, Any]] = {
    "ssgd": {"momentum": _MOMENTUM},
    "ssgd_no_momentum": {},
    "no_momentum": _ASGD,
    "standard": _ASGD | {"momentum": _MOMENTUM},
    "standard_damped": _ASGD | {"momentum": _MOMENTUM, "dampening": True},
    "shifted": _ASGD | {"momentum": _MOMENTUM, "momentum_kind": "shifted", "dampening": True},
}


def get_config(arm: str = "ssgd") -> ConfigDict:
    """Returns the configuration of an arm."""
    config = default_config()
    config.dataset = "cifar10"
    config.augment = True
    config.model = "resnet44"
    config.model_options.zero_init_residual = True
    config.num_workers = 32
    config.worker_batch_size = 128
    config.learning_rate = 3.1
    config.epochs = 200
    config.update(pick_arm(ARMS, arm, "cifar10_resnet44"))
    return config
