r"""Figures 5 and 9: ResNet-50 on ImageNet, 32 workers of 256 samples, 90 epochs.

Arms (`--config=configs/imagenet_resnet50.py:ARM`); A-SGD has tau = 31 and one push of 256 samples
an update. Expected: final validation error, from the captions.
  ssgd            S-SGD, batch 8192, learning rate 3.2, momentum .9 (default)         23.8 %
  standard        A-SGD, learning rate 3.2 / 31 (eq. 8), heavy-ball momentum .9        28.13 %
  standard_damped the same, gradients scaled by 1 - .9 (not in the paper)              unknown
  standard_sqrt   as standard, learning rate 3.2 / sqrt(31)                 does not converge
  no_momentum     A-SGD, eq. 8, momentum 0                                             25.49 %
  shifted         A-SGD, eq. 8, shifted momentum .9 (eq. 11)                           25.4 %
  shifted_normal  the same, delays of workers that wait N +- .23 N pushes (fig. 9)     25.3 %
  no_momentum_pod no_momentum in rounds of 32 updates, a worker a chip on 32 chips     25.49 %
  shifted_pod     shifted in such rounds                                               25.4 %

In standard the effective learning rate is 1 / (1 - .9) = 10 times that of no_momentum;
standard_damped tells that effect from the one of momentum itself.

The learning rate ramps up from .1 over 5 epochs (Goyal et al., arXiv 1706.02677), hardly a ramp
where eq. 8 gives .103, and falls tenfold at epochs 30, 60 and 80; weight decay 1e-4 on kernels.
The captions don't give the number of workers: 32 make the batch of Goyal et al.

Data: TFDS's `imagenet2012`, prepared as docs/running_on_cloud_tpu.md says.
Hardware. Memory as `make_plan` gives it: 38 GiB for `shifted` on one device, 32 of them
activations, 3.0 for 31 past parameters and 3.1 for the momentum of 32 workers; shifted_normal
keeps 64 and 65. `--config.shard_history=true` splits the past parameters over the devices. An
update of ssgd has 8,192 images at once, 1.4 TB of activations over all devices: 64 chips of
32 GB. `--config.dtype=bfloat16` about halves activations. The pod arms hold 32 GiB a chip, nearly
all of it activations of 256 images in float32: add that option on chips of 32 GB.
Wall time, ESTIMATES from 25 GFLOP an image and update, not measured: 15 hours an arm of A-SGD on
one H100 at 2,000 images/s, or on a TPU v5e-8, if some 24 host cores decode as many JPEGs.

  python scripts/train.py --config=configs/imagenet_resnet50.py:shifted --workdir=runs/shifted \
    --config.data_dir=gs://BUCKET/tfds

Reduced by overrides alone (to see it run; 50 updates on a sample of 800 images under the same name
in TFDS_DATA_DIR; 66 s on 2 CPU cores, measured, most of it for compiling):

  python scripts/train.py --config=configs/imagenet_resnet50.py:shifted \
    --workdir=runs/shifted_quick --config.width=0.125 --config.image_size=32 \
    --config.num_workers=8 --config.worker_batch_size=16 --config.delay=7 \
    --config.eval_batch_size=100 --config.epochs=1
"""

from typing import Any

from ml_collections import ConfigDict

from asgd_jax.training import default_config
from asgd_jax.training.config import pick_arm
from asgd_jax.training.optimizer import effective_learning_rate

_RAMP_FROM = 0.1
_EQ_8: dict[str, Any] = {"delay": 31, "learning_rate_rule": "inverse"}
_SHIFTED: dict[str, Any] = _EQ_8 | {"momentum_kind": "shifted", "dampening": True}
# A row every three rounds: one that is due within a round would cut it.
_POD: dict[str, Any] = {"parallelism": "workers", "log_every_steps": 96}

ARMS: dict[str, dict[str, Any]] = {
    "ssgd": {},
    "standard": _EQ_8,
    "standard_damped": _EQ_8 | {"dampening": True},
    "standard_sqrt": _EQ_8 | {"learning_rate_rule": "sqrt"},
    "no_momentum": _EQ_8 | {"momentum": 0.0},
    "shifted": _SHIFTED,
    "no_momentum_pod": _EQ_8 | {"momentum": 0.0} | _POD,
    "shifted_pod": _SHIFTED | _POD,
    "shifted_normal": _SHIFTED | {"delay_distribution": "workers", "worker_schedule": "normal"},
}


def get_config(arm: str = "ssgd") -> ConfigDict:
    """Returns the configuration of an arm."""
    config = default_config()
    config.dataset = "imagenet2012"
    config.image_size = 224
    config.model = "resnet50"
    config.num_workers = 32
    config.worker_batch_size = 256
    config.learning_rate = 3.2  # .1 for each 256 samples
    config.momentum = 0.9
    config.weight_decay = 1e-4
    config.weight_decay_on = "kernels"
    config.warmup_epochs = 5.0
    config.decay_epochs = (30, 60, 80)
    config.epochs = 90
    config.log_every_steps = 100  # a run that is to stop does so within so many updates
    config.eval_batch_size = 1024
    config.update(pick_arm(ARMS, arm, "imagenet_resnet50"))
    # The ramp of every arm starts at the same learning rate, whatever it leads to.
    config.warmup_from = _RAMP_FROM / effective_learning_rate(config)
    return config
