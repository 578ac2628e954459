"""How long a gradient takes at least: heterogeneous workers, made of equal ones."""

import math
from typing import Any

import numpy as np

from asgd_jax.delays.workers import ComputeTimeSampler

_FORMS = {
    "constant": "constant SECONDS",
    "lognormal": "lognormal MEAN SIGMA",
    "straggler": "straggler SECONDS FACTOR",
}


def parse_worker_times(text: str | None) -> ComputeTimeSampler | None:
    r"""Returns the sampler `(rng, worker) -> seconds` that a configuration's `worker_times` names.

    * `"constant .05"`: every gradient takes .05 s;
    * `"lognormal .05 .5"`: independent log-normal times of mean .05 s, whose logarithm has standard
      deviation .5;
    * `"straggler .05 10"`: constant, but worker 0 takes 10 times as long.

    Raises:
      ValueError: for anything else.

    >>> sampler = parse_worker_times("straggler .1 5")
    >>> sampler(None, 0), sampler(None, 1)
    (0.5, 0.1)
    >>> parse_worker_times("uniform 1 2")
    Traceback (most recent call last):
    ...
    ValueError: worker_times='uniform 1 2': use 'constant SECONDS', 'lognormal MEAN SIGMA' or
    'straggler SECONDS FACTOR', all numbers > 0
    """
    if text is None:
        return None
    name, *words = text.split() or [""]
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = []
    wanted = len(_FORMS.get(name, "").split()) - 1
    if len(values) != wanted or not all(0 < value < math.inf for value in values):
        first, second, last = (f"'{form}'" for form in _FORMS.values())
        raise ValueError(f"worker_times={text!r}: use {first}, {second} or {last}, all numbers > 0")
    if name == "constant":
        return lambda rng, worker: values[0]
    if name == "straggler":
        return lambda rng, worker: values[0] * (values[1] if worker == 0 else 1.0)
    mean, sigma = values
    return lambda rng, worker: float(rng.lognormal(math.log(mean) - sigma**2 / 2, sigma))


def measured_times(worker: np.ndarray, seconds: np.ndarray) -> ComputeTimeSampler:
    """Returns a sampler of recorded times: of each worker's own, drawn anew.

    Args:
      worker: integers (n,), whose time it was.
      seconds: (n,).

    >>> sampler = measured_times(np.array([0, 1]), np.array([0.5, 0.1]))
    >>> sampler(np.random.default_rng(0), 1)
    0.1
    """
    by_worker: dict[int, Any] = {
        int(each): np.maximum(seconds[worker == each], 1e-9) for each in np.unique(worker)
    }
    everybody = np.maximum(seconds, 1e-9)  # for one that never pushed
    return lambda rng, worker: float(rng.choice(by_worker.get(worker, everybody)))
