"""What the server decides without looking at a number: who works on which batch, and what is too
stale.

Plain functions of integers, so that they can be tried without a cluster.
"""

import heapq
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict


class StalenessPolicy(NamedTuple):
    """What happens to gradients that are older than a limit.

    Attributes:
      limit: the largest staleness of an update, None for no limit.
      wait: whether a worker's gradient is held until applying it makes nobody's too old; otherwise
        what is too old when it arrives is dropped.
    """

    limit: int | None
    wait: bool

    def is_dropped(self, staleness: int) -> bool:
        """Whether a gradient of this staleness becomes no update."""
        return self.limit is not None and staleness > self.limit

    def must_wait(self, worker: int, version: int, pulled: Mapping[int, int]) -> bool:
        """Whether this worker's gradient must wait for others.

        After it the version is one higher, and the others' gradients must still be in time, at best
        in the order in which they were pulled. The worker that pulled first never waits, so that
        somebody can always go on.

        Args:
          worker: whose gradient has arrived.
          version: of the server.
          pulled: the version that every worker under way has pulled, its own too.

        >>> policy = StalenessPolicy(limit=2, wait=True)
        >>> policy.must_wait(0, version=2, pulled={0: 2, 1: 0, 2: 1})  # 1's would be 3 old
        True
        >>> policy.must_wait(1, version=2, pulled={0: 2, 1: 0, 2: 1})
        False
        """
        if self.limit is None or not self.wait:
            return False
        others = sorted(each for other, each in pulled.items() if other != worker)
        return any(version + 1 + place - each > self.limit for place, each in enumerate(others))


def policy_of(config: ConfigDict) -> StalenessPolicy:
    """Returns the policy of a configuration.

    Raises:
      ValueError: for a limit that is no whole number, or that waiting cannot keep.

    >>> policy_of(ConfigDict(dict(max_staleness=2, staleness_policy="wait", num_workers=4)))
    Traceback (most recent call last):
    ...
    ValueError: max_staleness=2 with staleness_policy='wait' and 4 workers: 4 gradients of one
    version are applied one after another, the last one 3 updates old; use max_staleness=3 or more
    """
    limit, wait, count = config.max_staleness, config.staleness_policy == "wait", config.num_workers
    if limit is not None:
        if limit < 0:
            raise ValueError(f"max_staleness must be >= 0, got {limit}: 0 takes fresh ones only")
        if wait and limit < count - 1:
            raise ValueError(
                f"max_staleness={limit} with staleness_policy='wait' and {count} workers: "
                f"{count} gradients of one version are applied one after another, the last one "
                f"{count - 1} updates old; use max_staleness={count - 1} or more"
            )
    return StalenessPolicy(limit, wait)


class BatchNumbers:
    """Hands out the numbers of batches, each once; what became no update is handed out again.

    Of S shards the numbers are s, s + S, s + 2 S, ... for shard s. Not a NamedTuple, because it
    counts.
    """

    def __init__(self, num_shards: int, saved: Mapping[str, Any] | None = None):
        saved = saved or {"next": [0] * num_shards, "returned": []}
        self._num_shards = num_shards
        self._next = [int(position) for position in saved["next"]]
        self._returned: list[list[int]] = [[] for _ in range(num_shards)]
        for number in saved["returned"]:
            self.give_back(number)

    def take(self, worker: int) -> int:
        """Returns the smallest number that the worker may have and nobody has.

        >>> numbers = BatchNumbers(1)
        >>> numbers.take(0), numbers.take(1), numbers.give_back(0), numbers.take(1)
        (0, 1, None, 0)
        """
        shard = worker % self._num_shards
        if self._returned[shard]:
            return heapq.heappop(self._returned[shard])
        position = self._next[shard]
        self._next[shard] += 1
        return position * self._num_shards + shard

    def give_back(self, number: int) -> None:
        """Takes a number back whose gradient became no update."""
        heapq.heappush(self._returned[number % self._num_shards], number)

    def save(self, under_way: Iterable[int]) -> dict[str, Any]:
        """Returns what JSON holds of it; those under way count as given back."""
        returned = [number for heap in self._returned for number in heap]
        return {"next": list(self._next), "returned": sorted([*returned, *under_way])}
