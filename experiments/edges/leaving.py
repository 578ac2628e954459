"""When a run has left a minimum, how long it is given to, and the search for the edge.

A run has *left* when it diverged, when the training error of a row of measurements exceeds the
minimum's by `ERROR_LEVEL`, or when the loss on the whole training set exceeds twice the minimum's,
once. Above the edge a run may leap out (a training error of 30 to 50 %) and settle in a flatter
minimum before the next measurement: a *catapult*. It has left too, though both its loss and its
error are small again in the end; a rule that waits for two large losses in a row misses it.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from asgd_jax import stability

E_FOLDS = 12  # of growth just above the edge, for which every run has time
ERROR_LEVEL = 0.01  # of training error above the minimum's, in any row
LOSS_FACTOR = 2.0  # of the minimum's loss, in any row
_MOST_STRIDES = 20


def most_loss(loss: float) -> float:
    """Returns the loss above which a full-batch run has left a minimum of loss `loss`.

    >>> most_loss(0.5), most_loss(0.0)
    (5.0, 0.1)
    """
    return max(10.0 * loss, loss + 0.1)


def first_left(rows: Sequence[Mapping[str, Any]], loss: float, error: float = 0.0) -> int | None:
    """Returns the first row by which a run has left the minimum that it started from, or None.

    Args:
      rows: measurements in order, with train_error (of the row's own updates), full_train_loss and
        diverged_at (-1 where it did not).
      loss: the minimum's, on the whole training set in evaluation mode.
      error: the minimum's training error.

    >>> calm = {"train_error": 0.0, "full_train_loss": 0.1, "diverged_at": -1}
    >>> first_left([calm, calm | {"train_error": 0.3}, calm], 0.1), first_left([calm], 0.1)
    (1, None)
    """
    for number, row in enumerate(rows):
        # Written so that a NaN has left.
        stays = row["train_error"] <= error + ERROR_LEVEL
        stays = stays and row["full_train_loss"] <= LOSS_FACTOR * loss
        if not stays or row["diverged_at"] >= 0:
            return number
    return None


def has_left(rows: Sequence[Mapping[str, Any]], loss: float, error: float = 0.0) -> bool:
    """Whether a run has left, as in `first_left`."""
    return first_left(rows, loss, error) is not None


def left_for_good(rows: Sequence[Mapping[str, Any]], loss: float) -> bool:
    """The rule before: diverged, or a loss above max(10 L, L + 0.1) at two rows in a row.

    It counts a catapult as a run that stayed; kept so that both readings can be told.

    >>> left_for_good([{"full_train_loss": 9.0, "diverged_at": -1}] * 2, 0.1)
    True
    """
    above = [not row["full_train_loss"] <= most_loss(loss) for row in rows]
    return rows[-1]["diverged_at"] >= 0 or any(
        first and second for first, second in itertools.pairwise(above)
    )


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
