r"""Figures 2, 3 and 12: VGG-11 without BatchNorm on CIFAR-10, constant learning rate, no momentum.

Arms (`--config=configs/cifar10_vgg11.py:ARM`), all with 32 workers of 128 samples:
  ssgd          large-batch S-SGD, batch 4096, learning rate .8 (default): fig. 3's dashed line
  asgd_tauT     T = 1, 3, 7, 15, 31: learning rate .8 / T (eq. 8), 32 / (T + 1) workers an update
  asgd_exact    tau = 31, learning rate .0200: exactly the minima that are stable under ssgd
  asgd_sqrt     tau = 31, learning rate .8 / sqrt(31) = .144: too large
  asgd_same     tau = 31, learning rate .8 unchanged: too large

Figs. 2 and 12 continue from a minimum of ssgd at another tau and learning rate. Any arm's points
of fig. 3 follow from `--config.learning_rate=X`, which is that of the S-SGD run: .88 in
`asgd_tau7` trains 10 % above eq. 8. `--config.learning_rate_rule=exact` draws the exact rule for
each tau, `--config.seed=1` another sample for the mean and the standard deviation.

Expected, from the captions: the largest learning rate at which a minimum is not left is about
.8 / tau (1 / eta linear in tau, within the 8 % of the grid), and the best validation error lies
there for every tau. They give no error rate. Neither do they give batch size, epochs or weight
decay: 128 a worker and 200 epochs are those of the authors' example command, weight decay is 0
and augmentation on, as in their program's regime of constant learning rate.
They describe the stability of a minimum. From scratch the way there can be sharper: at the reduced
size below, the loss leaps off its first plateau at learning rate .8 / 31 and goes down at .1 / 31.
Hardware: one GPU or TPU chip. Wall time, ESTIMATES from .9 GFLOP an image and update, not measured:
15 minutes an arm on an H100, two days on 2 CPU cores.

  python scripts/train.py --config=configs/cifar10_vgg11.py:asgd_tau31 --workdir=runs/vgg11_tau31

Reduced by overrides alone (to see it run; 84 % error after 1248 updates; measured 39 s on 2 cores):

  python scripts/train.py --config=configs/cifar10_vgg11.py:asgd_tau31 --workdir=runs/vgg11_quick \
    --config.width=0.25 --config.num_train=5000 --config.num_validation=1000 \
    --config.worker_batch_size=32 --config.learning_rate=0.1 --config.epochs=8
"""

from typing import Any

from ml_collections import ConfigDict

from asgd_jax.training import default_config
from asgd_jax.training.config import pick_arm

_DELAYS = (1, 3, 7, 15, 31)  # tau + 1 divides the 32 workers

ARMS: dict[str, dict[str, Any]] = {
    "ssgd": {"delay": 0},
    **{f"asgd_tau{tau}": {"delay": tau, "learning_rate_rule": "inverse"} for tau in _DELAYS},
    "asgd_exact": {"delay": _DELAYS[-1], "learning_rate_rule": "exact"},
    "asgd_sqrt": {"delay": _DELAYS[-1], "learning_rate_rule": "sqrt"},
    "asgd_same": {"delay": _DELAYS[-1]},
}


def get_config(arm: str = "ssgd") -> ConfigDict:
    """Returns the configuration of an arm."""
    config = default_config()
    config.dataset = "cifar10"
    config.augment = True
    config.model = "vgg11"
    config.num_workers = 32
    config.worker_batch_size = 128
    config.learning_rate = 0.8
    config.epochs = 200
    config.update(pick_arm(ARMS, arm, "cifar10_vgg11"))
    return config
