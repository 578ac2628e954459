"""Blocks of a recorded schedule whose gradients can be computed at once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from asgd_jax.delays.processes import as_integer, check_trace


class Blocks(NamedTuple):
    """A staleness trace, cut into blocks; see `rounds_of`.

    Attributes:
      trace: int32 array of shape (num_updates,), the staleness of each update.
      starts: int32 array of shape (num_blocks,), the first update of each block.
      lengths: int32 array of shape (num_blocks,), the number of its updates.
    """

    trace: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @property
    def longest(self) -> int:
        """Updates of the longest block, to which all are padded."""
        return int(self.lengths.max())

    @property
    def mean_length(self) -> float:
        """Gradients computed at once, on average: the parallelism that the schedule allows."""
        return float(self.lengths.mean())

    def updates(self, multiple: int = 1) -> np.ndarray:
        """Returns the updates of every block, its last one repeated where it is short.

        Args:
          multiple: the padded length is a multiple of it: the number of devices.

        Returns:
          int32 array of shape (num_blocks, padded length). It picks the batches of a round, where
          update t takes batch t.

        >>> rounds_of([0, 1, 0, 1, 2]).updates(2)
        array([[0, 1, 1, 1],
               [2, 3, 4, 4]], dtype=int32)
        """
        padded = -(-self.longest // multiple) * multiple
        places = np.minimum(np.arange(padded), self.lengths[:, None] - 1)
        return (self.starts[:, None] + places).astype(np.int32)


def rounds_of(trace: Sequence[int] | np.ndarray, longest: int | None = None) -> Blocks:
    r"""Cuts a recorded staleness trace into the longest blocks that can be computed at once.

    The gradient of update $t$ is taken at version $t - \tau_t$. Those of a block of updates are all
    known when its first one, $s$, is due iff $t - \tau_t \le s$ for each of them. A block ends
    where that fails first, which makes the fewest blocks; an update without staleness begins one.

    Round robin has N updates a block. When each push comes from a random one of N workers, a block
    ends before a worker's second push, after about $\sqrt{\pi N / 2}$ updates (the birthday
    problem). `mean_length` over 20,000 updates, for three N:

    | schedule | 8 | 32 | 128 |
    |---|---|---|---|
    | round robin | 8 | 32 | 128 |
    | `simulate_workers(N, ..., "normal")`, N - 1 +- 0.23 N | 6.9 | 23.4 | 78.4 |
    | `discretized_normal(N - 1)`, of deviation 1 | 7.8 | 31.8 | 127.4 |
    | `uniform(1, 2 N - 3)`, of mean N - 1 | 5.2 | 10.3 | 20.3 |
    | `simulate_workers(N, ..., "random")`, geometric | 3.3 | 6.9 | 14.2 |

    Args:
      trace: integers >= 0 of shape (num_updates,), as `from_trace` takes. As there it repeats when
        the run is longer, and so do its blocks.
      longest: no block is longer than this. All blocks are padded to the longest, so with far fewer
        devices than that, the number of devices wastes less.

    Returns:
      `Blocks`, which `asgd_jax.rounds` takes in the place of a number of workers.

    Raises:
      ValueError: for a trace that `from_trace` refuses, or a `longest` below 1.

    >>> blocks = rounds_of([0, 1, 2, 2, 2, 2, 0, 1])
    >>> blocks.starts, blocks.lengths, round(blocks.mean_length, 2)
    (array([0, 3, 6], dtype=int32), array([3, 3, 2], dtype=int32), 2.67)
    """
    staleness = check_trace(trace)
    limit = staleness.size if longest is None else as_integer(longest, "longest")
    if limit < 1:
        raise ValueError("longest must be >= 1, got 0: a block has an update")
    # Versions before the trace began are those of its last pass, or x_0: known in any case.
    versions = np.arange(staleness.size) - staleness.astype(np.int64)
    starts = [0]
    for update, version in enumerate(versions.tolist()):
        if version > starts[-1] or update - starts[-1] == limit:
            starts.append(update)
    edges = np.array([*starts, staleness.size], np.int32)
    return Blocks(staleness, edges[:-1], np.diff(edges))
