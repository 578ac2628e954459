"""Gradients to the server and parameters back, through mutable objects of Ray's object store.

An ordinary object is created, sealed, announced and freed at every update, which takes Ray more
time than the update itself. A channel is one object in shared memory that its writer overwrites: on
a node an array is copied into it and out of it; between nodes Ray sends what was written.
A worker and the server take turns, so no one waits for a channel: a small call says that there is
something to read, and its answer that there is something to read on the other side.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from asgd_jax.cluster.programs import Pushed
from asgd_jax.cluster.server import Saved, Server, Task
from asgd_jax.data import Dataset

# For the pickled structure around the arrays; Ray enlarges a channel that is too small.
_SLACK = 2**18
# Of a write whose last one was not read: the reader is gone. Seconds.
_PATIENCE = 10.0


class Connection(NamedTuple):
    """The two channels between a worker and its server.

    Attributes:
      life: of the worker.
      take: from the channel that the worker writes to, see `make_take`.
      down: written by the server.
    """

    life: int
    take: Callable[[], Any]
    down: Any


def open_channel(reader: Any, node: str, num_bytes: int) -> Any:
    """Returns a channel from this actor to another.

    Args:
      reader: the other actor.
      node: id of the node that it is on.
      num_bytes: of the arrays of a message.
    """
    import ray
    from ray.experimental.channel.shared_memory_channel import Channel

    writer = ray.get_runtime_context().current_actor
    return Channel(writer, [(reader, node)], num_bytes + _SLACK)


def make_take(channel: Any) -> Callable[[], Any]:
    """Returns `take()`: a copy of what was written; the channel is free for the next message.

    A copy, because JAX holds arrays that it was given for longer than it computes on them: until it
    is called again, which is when the next message has come. It is made in the same memory every
    time, so that what was taken is to be used before the next call.
    """
    kept: Any = None

    def take() -> Any:
        nonlocal kept
        value = channel.read()
        if _layout(kept) != _layout(value):
            kept = jax.tree.map(_empty_like, value)
        for into, leaf in zip(jax.tree.leaves(kept), jax.tree.leaves(value), strict=True):
            np.copyto(into, leaf)
        return kept

    return take


def _layout(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(np.shape(leaf), np.asarray(leaf).dtype) for leaf in leaves]


def _empty_like(leaf: Any) -> np.ndarray:
    """An array that begins at a multiple of 64 bytes, which JAX uses in place."""
    leaf = np.asarray(leaf)
    room = np.empty(leaf.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + leaf.nbytes].view(leaf.dtype).reshape(leaf.shape)


def node_id() -> str:
    """Returns the id of the node that this process is on."""
    import ray

    found: str = ray.get_runtime_context().get_node_id()
    return found


def num_bytes_of(tree: Any) -> int:
    """Returns how large the arrays of a tree are."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))


class ServerActor(Server):
    """The server with its channels: what Ray makes an actor of."""

    def __init__(self, config: ConfigDict, dataset: Dataset, saved: Saved | None = None):
        super().__init__(config, dataset, saved)
        self._lines: dict[int, Connection] = {}

    async def node(self) -> str:
        """Returns where this process is."""
        return node_id()

    async def connect(self, worker: int, life: int, up: Any, reader: Any, node: str) -> Any:
        """Returns the channel back to a worker, given the one from it."""
        down = open_channel(reader, node, num_bytes_of(self._state.params))
        self._lines[worker] = Connection(life, make_take(up), down)
        return down

    async def begin(self, worker: int, life: int) -> int | None:
        """`pull`, with the parameters in the channel: returns the number of the batch."""
        return self._send(worker, life, await self.pull(worker, life))

    async def exchange(
        self, worker: int, life: int, number: int, compute_seconds: float
    ) -> int | None:
        """`push` of what is in the channel from the worker, with the answer in the other."""
        line = self._lines[worker]
        if line.life != life:  # another process has taken its place
            return None
        pushed: Pushed = line.take()
        return self._send(
            worker, life, await self.push(worker, life, number, pushed, compute_seconds)
        )

    def _send(self, worker: int, life: int, task: Task | None) -> int | None:
        line = self._lines[worker]
        if task is None or line.life != life:
            return None
        line.down.write(task.params, timeout=_PATIENCE)
        return task.number
