"""Devices: how the state and the batches of a run lie on them.

Under `jit` (the default) one program spans all devices: the batch is split over the mesh's only
axis, parameters are replicated, and XLA adds the gradient's all-reduce. The history may be split
too. Under `pmap` every device runs the step on its own share and averages gradients by `pmean`;
BatchNorm then sees one device's share at a time.
"""

import socket
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from asgd_jax.transforms.history import Ring

AXIS = "batch"

PyTree = Any


def make_mesh(num_devices: int | None = None) -> Mesh:
    """Returns a mesh of one axis, "batch", over the first `num_devices` devices (all by default).

    Raises:
      ValueError: when jit is disabled, when there are fewer devices, or when they belong to several
        processes and not all of them are to be used: every process needs its share of the mesh.

    >>> dict(make_mesh(1).shape)
    {'batch': 1}
    """
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        raise ValueError(
            "JAX_DISABLE_JIT is set and a run is compiled as a whole: unset it, or debug "
            "`make_train_step`, which is a plain function"
        )
    devices = jax.devices()
    count = len(devices) if num_devices is None else num_devices
    if not 1 <= count <= len(devices):
        raise ValueError(
            f"num_devices={count}: {len(devices)} devices are visible, ask for 1 to {len(devices)}"
        )
    if count < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"num_devices={count}: the {jax.process_count()} processes of this run use all their "
            f"{len(devices)} devices: set num_devices={len(devices)} or leave it out"
        )
    return Mesh(np.array(devices[:count]), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a `Batch`: each worker's samples are split over the devices."""
    return NamedSharding(mesh, PartitionSpec(None, AXIS))


def leading_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays split along their first axis: samples, or pmap's devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def state_sharding(state: PyTree, mesh: Mesh, *, shard_history: bool = False) -> PyTree:
    """Returns the sharding of every leaf of a train state (or of any pytree that holds one).

    Args:
      state: a pytree of arrays or of `jax.ShapeDtypeStruct`s.
      mesh: see `make_mesh`.
      shard_history: split rings (past parameters, shifted momentum) over the mesh: each device
        holds 1/D of every slot of a leaf, along the leaf's longest axis that D divides; leaves
        without such an axis stay whole. A read gathers one parameter set; a write moves nothing.
    """

    def place(node: Any) -> Any:
        if isinstance(node, Ring) and shard_history:
            return jax.tree.map(lambda slots: _ring_sharding(slots, mesh), node)
        return jax.tree.map(lambda _: replicated(mesh), node)

    return jax.tree.map(place, state, is_leaf=lambda node: isinstance(node, Ring))


def _ring_sharding(ring: Any, mesh: Mesh) -> NamedSharding:
    divisible = [
        (size, axis) for axis, size in enumerate(ring.shape) if axis and size % mesh.size == 0
    ]
    if not divisible:
        return replicated(mesh)
    spec: list[str | None] = [None] * ring.ndim
    spec[max(divisible)[1]] = AXIS
    return NamedSharding(mesh, PartitionSpec(*spec))


def check_divisible(worker_batch_size: int, num_devices: int) -> None:
    """Refuses a worker batch that the devices cannot share equally.

    Raises:
      ValueError: naming both numbers.

    >>> check_divisible(64, 8)
    """
    if worker_batch_size % num_devices:
        fits = max(d for d in range(1, num_devices + 1) if worker_batch_size % d == 0)
        raise ValueError(
            f"worker_batch_size={worker_batch_size} cannot be split over {num_devices} devices: "
            f"use a multiple of {num_devices}, or num_devices={fits}"
        )


def initialize_processes(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int = 300
) -> None:
    """Joins the processes of a run that spans several hosts; call it before anything else of JAX.

    On TPU pods and under Slurm JAX finds out the first three, which may be None. `timeout`: seconds
    that the processes wait for one another.

    Raises:
      ValueError: when the processes cannot be joined.
    """
    if coordinator is not None and process_id:
        _await_coordinator(coordinator, timeout)
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=timeout
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"multihost: {reason} (coordinator={coordinator!r}): on a cluster that JAX does not "
            "know, set coordinator=HOST:PORT, num_processes and process_id"
        ) from error


def _await_coordinator(coordinator: str, timeout: int) -> None:
    """Waits until process 0 listens: JAX itself would abort this process, with a stack trace."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"coordinator={coordinator!r} must be HOST:PORT")
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=timeout).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > deadline or isinstance(error, OverflowError):
                raise ValueError(
                    f"coordinator={coordinator!r} did not answer within "
                    f"coordinator_timeout={timeout} s ({error}): start process 0 there, correct "
                    "the address, or wait longer"
                ) from error
        time.sleep(0.1)
