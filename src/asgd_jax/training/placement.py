"""How a run lies on its devices: one jitted program over a mesh, or `pmap`.

The axis of replicas that `pmap` wants is known here and nowhere else: `put` makes it, `get` takes
it away.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from asgd_jax.training import mesh as devices
from asgd_jax.training.state import PyTree, TrainState
from asgd_jax.training.step import Batch

Placed = Any  # a train state as the compiled functions take it
StateFunction = Callable[..., tuple[TrainState, Any]]


class Placement(NamedTuple):
    """Functions for one way of using the devices.

    Attributes:
      put: `put(tree)`: a state, or whatever each device is to have whole, on the devices.
      get: `get(placed)`: what `put` was given, on all devices of the mesh.
      put_batch: host arrays of a process, samples in order, and the shape (workers, samples of a
        worker) to a `Batch` on the devices.
      share: within a compiled function, a whole `Batch` to what one device is to compute on.
      compile: `compile(function, num_placed, num_plain)` of a function from a state and so many
        arguments, first the placed ones, to (state, rest); the state is donated, the rest plain.
    """

    put: Callable[[PyTree], Placed]
    get: Callable[[Placed], PyTree]
    put_batch: Callable[[tuple[np.ndarray, np.ndarray], tuple[int, int]], Batch]
    share: Callable[[Batch], Batch]
    compile: Callable[[StateFunction, int, int], Callable[..., tuple[Placed, Any]]]


def jitted(mesh: Mesh, state_sharding: PyTree) -> Placement:
    """One program over all devices: batches are split, parameters whole, unless sharded."""
    whole, split = devices.replicated(mesh), devices.batch_sharding(mesh)

    def put_batch(batch: tuple[np.ndarray, np.ndarray], shape: tuple[int, int]) -> Batch:
        def place(array: np.ndarray) -> jax.Array:
            local = array.reshape(shape[0], -1, *array.shape[1:])
            whole_shape = (*shape, *array.shape[1:])
            return jax.make_array_from_process_local_data(split, local, whole_shape)

        return Batch(*map(place, batch))

    return Placement(
        put=lambda tree: tree if isinstance(tree, TrainState) else jax.device_put(tree, whole),
        get=lambda placed: placed,
        put_batch=put_batch,
        share=lambda batch: jax.tree.map(
            lambda leaf: jax.lax.with_sharding_constraint(leaf, split), batch
        ),
        compile=lambda function, num_placed, num_plain: jax.jit(
            function, donate_argnums=0, out_shardings=(state_sharding, whole)
        ),
    )


def by_worker(mesh: Mesh, state_sharding: PyTree) -> Placement:
    """One program over all devices, each with the batches of its own workers."""
    split = devices.leading_sharding(mesh)
    placement = jitted(mesh, state_sharding)

    def put_batch(batch: tuple[np.ndarray, np.ndarray], shape: tuple[int, int]) -> Batch:
        if jax.process_count() > 1:  # each has a share of every worker's samples: exchanged later
            return placement.put_batch(batch, shape)
        arrays = (array.reshape(*shape, *array.shape[1:]) for array in batch)
        return Batch(*(jax.device_put(array, split) for array in arrays))

    return placement._replace(
        put_batch=put_batch,
        share=lambda batch: jax.tree.map(
            lambda leaf: jax.lax.with_sharding_constraint(leaf, split), batch
        ),
    )


def pmapped(mesh: Mesh) -> Placement:
    """A program a device, each on its own share of every worker's samples."""
    leading, whole = devices.leading_sharding(mesh), devices.replicated(mesh)

    def put(tree: PyTree) -> Placed:
        copies = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (mesh.size, *leaf.shape)), tree)
        return jax.device_put(copies, leading)

    def put_batch(batch: tuple[np.ndarray, np.ndarray], shape: tuple[int, int]) -> Batch:
        def place(array: np.ndarray) -> jax.Array:
            array = array.reshape(*shape, *array.shape[1:])
            return jax.device_put(np.stack(np.split(array, mesh.size, axis=1)), leading)

        return Batch(*map(place, batch))

    def share(batch: Batch) -> Batch:
        size = batch.labels.shape[1] // mesh.size
        start = jax.lax.axis_index(devices.AXIS) * size
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size, axis=1), batch
        )

    def compile(function: StateFunction, num_placed: int, num_plain: int) -> Callable[..., Any]:
        mapped = jax.pmap(
            function,
            axis_name=devices.AXIS,
            in_axes=(0, *[0] * num_placed, *[None] * num_plain),
            donate_argnums=0,
            devices=list(mesh.devices.flat),
        )

        def run(*arguments: Any) -> tuple[Placed, Any]:
            state, rest = mapped(*arguments)
            return state, jax.tree.map(lambda leaf: leaf[0], rest)  # equal on all devices

        return run

    first = jax.jit(lambda placed: jax.tree.map(lambda leaf: leaf[0], placed), out_shardings=whole)
    return Placement(put, first, put_batch, share, compile)
