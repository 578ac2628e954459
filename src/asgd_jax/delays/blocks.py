"""Blocks of a recorded schedule whose gradients can be computed at once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from asgd_jax.delays.processes import check_trace


class Blocks(NamedTuple):
    """A staleness trace, cut; from `rounds_of`.

    Attributes:
      trace: int32 array of shape (num_updates,), the staleness of each update.
      starts: int32 array of shape (num_blocks,), the first update of each block.
      lengths: int32 array of shape (num_blocks,), its number of updates.
    """

    trace: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @property
    def longest(self) -> int:
        """Updates of the longest block: what every block is padded to."""
        return int(self.lengths.max())

    @property
    def mean_length(self) -> float:
        """Gradients computed at once, on average: the parallelism that the schedule allows."""
        return float(self.lengths.mean())

    def updates(self, multiple: int = 1) -> np.ndarray:
        """Returns the updates of every block, padded by its last one.

        Args:
          multiple: the padded length is a multiple of this, the number of devices.

        Returns:
          int32 array of shape (num_blocks, padded length).

        >>> rounds_of([0, 1, 0, 1, 2]).updates(2)
        array([[0, 1, 1, 1],
               [2, 3, 4, 4]], dtype=int32)
        """
        padded = -(-self.longest // multiple) * multiple
        places = np.minimum(np.arange(padded), self.lengths[:, None] - 1)
        return (self.starts[:, None] + places).astype(np.int32)


def rounds_of(trace: Sequence[int] | np.ndarray) -> Blocks:
    r"""Cuts a recorded staleness trace into the longest blocks that can be computed at once.

    The gradient of update $t$ is taken at version $t - \tau_t$. Those of updates $s, ..., e - 1$
    are all known when update $s$ begins iff $t - \tau_t \le s$ for each; a block is cut where this
    fails first, which makes the fewest blocks. A gradient without staleness begins one.

    For round robin every block has N updates. With N workers picked at random a block ends before a
    worker's second push: about $\sqrt{\pi N / 2}$ updates (the birthday problem). Mean lengths for
    8, 32 and 128 workers, from 20,000 updates of `simulate_workers` and of the processes:

    | schedule | 8 | 32 | 128 |
    |---|---|---|---|
    | round robin | 8.0 | 32.0 | 128.0 |
    | "normal", tau = N - 1 +- 0.23 N | MEASURE |
    | "random", geometric | MEASURE |
    | `discretized_normal(N - 1)`, of deviation 1 | MEASURE |
    | `uniform(1, 2 N - 3)`, of mean N - 1 | MEASURE |

    Args:
      trace: integers >= 0 of shape (num_updates,), as `from_trace` takes; like there it may repeat
        when the run is longer, and so do the blocks.

    Returns:
      `Blocks`, which `asgd_jax.rounds` takes in the place of a number of workers.

    Raises:
      ValueError: as `from_trace` does.

    >>> blocks = rounds_of([0, 1, 2, 2, 2, 2, 0, 1])
    >>> blocks.starts, blocks.lengths, blocks.mean_length
    (array([0, 3, 6], dtype=int32), array([3, 3, 2], dtype=int32), 2.6666666666666665)
    """
    staleness = check_trace(trace)
    # Of an update before its trace's second pass: the versions that the ramp cuts off are old too.
    versions = np.arange(staleness.size) - staleness
    starts = [0]
    for update, version in enumerate(versions.tolist()):
        if version > starts[-1]:
            starts.append(update)
    edges = np.array([*starts, staleness.size], np.int32)
    return Blocks(staleness, edges[:-1], np.diff(edges))
