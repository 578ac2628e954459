"""When a run has left a minimum, how long it is given to, and the search for the edge."""

import math
from collections.abc import Mapping
from typing import Any

from asgd_jax import stability

E_FOLDS = 12  # of growth just above the edge, for which every run has time
_MOST_STRIDES = 20


def most_loss(loss: float) -> float:
    """Returns the loss above which a run has left a minimum of loss `loss`.

    >>> most_loss(0.5), most_loss(0.0)
    (5.0, 0.1)
    """
    return max(10.0 * loss, loss + 0.1)


def e_fold(delay: int, resolution: float, **method: Any) -> float:
    """Returns the updates in which the distance grows e-fold `resolution` above the threshold.

    A run needs `E_FOLDS` of them: fewer would call unstable runs stable.

    Args:
      delay: int >= 0.
      resolution: relative distance of neighbouring learning rates, > 0.
      **method: momentum, kind and dampening, as in `stability.max_learning_rate`.

    Raises:
      ValueError: for a bad argument.
    """
    if not (math.isfinite(resolution) and resolution > 0):
        raise ValueError(f"resolution must be a finite number > 0, got {resolution!r}: try 0.02")
    just_above = (1.0 + resolution) * stability.max_learning_rate(delay, **method)
    return stability.growth_time(delay, step=just_above, **method)


def bracket(left: Mapping[int, bool]) -> tuple[int | None, int | None]:
    """Returns the largest index that stayed below all that left, and the smallest that left.

    Args:
      left: whether the run at an index of the grid of learning rates left, as far as it is known.

    >>> bracket({0: True, -8: False, -4: False}), bracket({})
    ((-4, 0), (None, None))
    """
    upper = min((index for index in left if left[index]), default=None)
    stayed = (i for i in left if not left[i] and (upper is None or i < upper))
    return max(stayed, default=None), upper


def next_index(left: Mapping[int, bool], stride: int) -> int | None:
    """Returns the index to run next, or None when one that stays has a neighbour that leaves.

    From 0 it goes by `stride` until it is past the edge, then bisects: no prediction is used.

    Raises:
      ValueError: when twenty strides in one direction tell nothing.

    >>> next_index({}, 8), next_index({0: True}, 8), next_index({0: True, -8: False}, 8)
    (0, -8, -4)
    """
    lower, upper = bracket(left)
    if lower is not None and upper is not None:
        return None if upper - lower == 1 else (lower + upper + 1) // 2
    if len(left) > _MOST_STRIDES:
        verdict = "stays" if upper is None else "leaves"
        raise ValueError(
            f"every one of {len(left)} learning rates {verdict}: "
            "is this a minimum, and are perturbation and growth_limit right?"
        )
    if upper is None:
        return 0 if lower is None else lower + stride
    return upper - stride
