r"""What others do against staleness, as optax transforms inside `asgd_jax.delayed`.

With $x$ the live parameters, $y$ the stale ones, gap $= x - y$, $s$ the staleness and $g$ the
gradient at $y$, all elementwise. Each takes `staleness=` and `stale_params=`, which `delayed` and
`rounds` hand to the optimizer inside them, and stands before the optimizer in its chain:

>>> import asgd_jax, optax
>>> tx = asgd_jax.delayed(optax.chain(dc_asgd(), optax.sgd(0.1)), delay=4)

To drop gradients that are too old is an option of `delayed` itself (`drop_stale=`), because a
dropped gradient makes no version of the parameters.

What theory says of each is to be asked of `stability.optimizer_max_learning_rate`, which linearises
the code. Start reading at `scaling.py`.
"""

from asgd_jax.compensate.dc_asgd import dc_asgd
from asgd_jax.compensate.dc_ema import dc_ema
from asgd_jax.compensate.gap_aware import gap_aware
from asgd_jax.compensate.pipemare import pipemare_schedule
from asgd_jax.compensate.scaling import delay_adaptive, power_scaling, staleness_scaling

__all__ = [
    "dc_asgd",
    "dc_ema",
    "delay_adaptive",
    "gap_aware",
    "pipemare_schedule",
    "power_scaling",
    "staleness_scaling",
]
