r"""A transformer of 420,000 parameters over characters: what does a pipeline's staleness cost?

Eight blocks, one a stage; batch of 16 windows of 64 characters of Python's own help text, which
every CPython brings. Arms (`--config=configs/char_transformer.py:ARM`) are a delay and a method,
DELAY_METHOD, for instance pipeline_sgd; sync_adamw is the default:

  sync      no delay
  uniform   every parameter as old as the first stage's: 7 updates
  pipeline  1F1B without flushes: stage l of 8 is 7 - l updates old

  sgd         heavy ball, momentum .9
  adamw       weight decay .01
  prediction  adamw, whose workers pull AdamW's own prediction
  dc_ema      adamw behind delay compensation by a running mean of squared gradients
  nesterov    NAdamW with beta1 = .99, proposed for asynchronous pipelines

`--config.dataset=tiny_shakespeare` reads that text instead, where TFDS has it.

Expected of pipeline_adamw after 2 epochs (720 updates): validation loss 2.62, 72.6 % of characters
told wrongly. What every arm ends at, at half the width, is the figure `pipeline`.
Hardware: 2 CPU cores, about 30 s an epoch (measured, beside other work).

  python scripts/train.py --config=configs/char_transformer.py:pipeline_adamw --workdir=runs/chars

Reduced by overrides alone (82.0 % wrong after 100 updates; 20 s on 2 CPU cores, measured):

  python scripts/train.py --config=configs/char_transformer.py:pipeline_sgd \
    --workdir=runs/chars_quick --config.width=0.5 --config.num_train=1600 --config.epochs=1
"""

from typing import Any

from ml_collections import ConfigDict

from asgd_jax.training import default_config
from asgd_jax.training.config import pick_arm

_STAGES = 8

DELAYS: dict[str, dict[str, Any]] = {
    "sync": {"num_workers": 1},
    "uniform": {"delay": _STAGES - 1},
    "pipeline": {"delay": _STAGES - 1, "delay_distribution": "pipeline"},
}
_ADAMW: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.01}
METHODS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "learning_rate": 0.03},
    "adamw": _ADAMW,
    "prediction": {**_ADAMW, "predict": "optimizer"},
    "dc_ema": {**_ADAMW, "compensate": "dc_ema"},
    "nesterov": {**_ADAMW, "optimizer": "nadamw", "adam_b1": 0.99},
}
ARMS: dict[str, dict[str, Any]] = {
    f"{delay}_{method}": {**DELAYS[delay], **METHODS[method]}
    for delay in DELAYS
    for method in METHODS
}


def get_config(arm: str = "sync_adamw") -> ConfigDict:
    """Returns the configuration of an arm."""
    config = default_config()
    config.dataset = "python_topics"
    config.model = "char_transformer"
    config.num_workers = _STAGES
    config.worker_batch_size = 16
    config.epochs = 2
    config.update(pick_arm(ARMS, arm, "char_transformer"))
    return config
