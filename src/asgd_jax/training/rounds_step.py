"""`parallelism="workers"`: the updates of a run in rounds, a worker's gradient on its own device.

A round takes the gradients of up to delay + 1 consecutive updates at once and then makes them
(`transforms.recorded_rounds`). It ends early where a gradient needs a version that is not there
yet, and *where a chunk of updates ends*: at a row of metrics.csv and at an epoch. So rows,
checkpoints and evaluations are at the updates where the serial run has them; rounds are whole where
`log_every_steps` is a multiple of delay + 1.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from asgd_jax.data import BatchPlan
from asgd_jax.delays import DelayProcess, rounds_of
from asgd_jax.models.layers import BATCH_NORM_DECAY
from asgd_jax.training.batch_stats import BatchStatsChains
from asgd_jax.training.chunk import NOT_DIVERGED, ChunkTotals, add_step, zero_totals
from asgd_jax.training.mesh import AXIS, replicated
from asgd_jax.training.state import PyTree, TrainState
from asgd_jax.training.step import Batch, Preprocess, StepMetrics, make_gradient
from asgd_jax.transforms.history import Ring, read_slot
from asgd_jax.transforms.recorded_rounds import Block, block_rounds
from asgd_jax.transforms.worker_axis import (
    make_layout,
    piece_specs,
    shardings,
    stacked,
    state_specs,
)


class RoundBatch(NamedTuple):
    """The samples of a round.

    Attributes:
      images, labels: as in `Batch`, the workers of all its updates in order.
      length: int32 scalar, how many of the updates are made; the rest is padding.
    """

    images: jax.Array
    labels: jax.Array
    length: jax.Array


class RoundMetrics(NamedTuple):
    """`StepMetrics` stacked over the updates of a round, of which `length` count."""

    each: StepMetrics
    length: jax.Array


class RoundStep(NamedTuple):
    """What `make_round_step` returns.

    Attributes:
      init: `init(params)`: the optimizer's state, a `RoundState` whose parameters are the run's.
      advance: `advance(state, RoundBatch) -> (state, RoundMetrics)`.
      stale: `stale(state)`: the parameters that the next gradient is taken at.
    """

    init: Callable[[PyTree], optax.OptState]
    advance: Callable[[TrainState, RoundBatch], tuple[TrainState, RoundMetrics]]
    stale: Callable[[TrainState], PyTree]


def updates_of_round(process: DelayProcess, plan: BatchPlan, num_devices: int) -> int:
    """Returns how many updates a round has, at most.

    All delay + 1 where every block has so many; else as few as give each device a worker: blocks of
    random delays are shorter, and what pads them is computed in vain.
    """
    if process.pmf is not None and process.pmf[-1] == 1:
        return plan.delay + 1
    return num_devices // math.gcd(num_devices, plan.workers_per_update)


def check_workers(plan: BatchPlan, num_devices: int) -> None:
    """Refuses workers that the devices do not divide.

    Raises:
      ValueError: naming both numbers.
    """
    if plan.num_workers % num_devices:
        fits = max(d for d in range(1, num_devices + 1) if plan.num_workers % d == 0)
        raise ValueError(
            f"num_workers={plan.num_workers} cannot be divided over {num_devices} devices, which "
            f"parallelism='workers' needs: use a multiple of {num_devices}, or num_devices={fits}"
        )


def make_round_step(
    model: nn.Module,
    server: optax.GradientTransformation,
    process: DelayProcess,
    plan: BatchPlan,
    preprocess: Preprocess,
    label_smoothing: float,
    *,
    chains: BatchStatsChains,
    mesh: Mesh,
    divergence_loss: float,
    number_of: Callable[[jax.Array], jax.Array] = lambda update: update,
) -> RoundStep:
    """Returns the rounds of a run; arguments as of `make_train_step`.

    Args:
      server: the optimizer inside `delayed`.
      process: the staleness, any: it decides how long the rounds are.
      plan: batch arithmetic.
      mesh: of one axis, over which the workers are divided.
      divergence_loss: a round ends with the update whose train loss exceeds it, or is not finite.
    """
    num_updates, copies = updates_of_round(process, plan, mesh.size), plan.workers_per_update
    layout = make_layout(mesh, AXIS, None)
    engine = block_rounds(
        optax.with_extra_args_support(server),
        layout,
        num_updates=num_updates,
        depth=process.max_delay + 1,
        max_delay=process.max_delay,
        workers_per_update=copies,
    )
    gradient = make_gradient(model, _of_one_worker(preprocess, copies), label_smoothing)
    whole = replicated(mesh)
    staleness_of = _make_staleness(process)

    def advance(state: TrainState, batch: RoundBatch) -> tuple[TrainState, RoundMetrics]:
        places = jnp.minimum(jnp.arange(num_updates, dtype=jnp.int32), batch.length - 1)
        updates = state.step + places
        staleness = jax.vmap(lambda update: staleness_of(state.key, update))(updates)
        numbers = jax.vmap(number_of)(updates)
        keys = jax.vmap(lambda number: jax.random.fold_in(state.key, number))(numbers)
        zeros = _zero_stats(chains, state)

        def of_worker(params: PyTree, given: Any) -> tuple[PyTree, Any]:
            images, labels, *drawn = given
            return gradient(params, zeros, Batch(images[None], labels[None]), drawn)

        given = (
            batch.images,
            batch.labels,
            jnp.repeat(keys, copies, axis=0),
            jnp.tile(jnp.arange(copies, dtype=jnp.int32), num_updates),
        )
        server_state = state.opt_state._replace(params=state.params)
        block = Block(state.step, batch.length, updates - staleness)

        def by_update(aux: PyTree) -> PyTree:
            return jax.tree.map(
                lambda leaf: leaf.reshape(num_updates, copies, *leaf.shape[1:]).mean(1),
                jax.lax.with_sharding_constraint(aux, whole),
            )

        def until_divergence(aux: PyTree) -> jax.Array:
            """As many updates as there are up to the first whose loss is too large."""
            fine = by_update(aux)[1] <= divergence_loss  # False for NaN too
            return jnp.where(fine.all(), num_updates, jnp.argmin(fine) + 1).astype(jnp.int32)

        server_state, aux, gradients = engine.round(
            of_worker, server_state, given, block, until_divergence
        )
        stats, losses, errors = by_update(aux)
        length = server_state.count - state.opt_state.count
        norms = jax.vmap(optax.tree.norm)(gradients)
        kept = _push_stats(chains, state, stats, staleness, length)
        params = server_state.params
        new = TrainState(
            state.step + length, params, kept, server_state._replace(params=()), state.key
        )
        return new, RoundMetrics(StepMetrics(losses, errors, norms, staleness), length)

    def stale(state: TrainState) -> PyTree:
        version = state.step - staleness_of(state.key, state.step)
        return read_slot(state.opt_state.pulled, version, state.params)

    def init(params: PyTree) -> optax.OptState:
        return engine.init(params)._replace(params=())

    return RoundStep(init, advance, stale)


def _make_staleness(process: DelayProcess) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Of the gradient of an update, as `delayed` draws it."""

    def staleness_of(key: jax.Array, update: jax.Array) -> jax.Array:
        drawn = jnp.asarray(process.sample(key, update)).astype(jnp.int32)
        return jnp.clip(drawn, 0, jnp.minimum(process.max_delay, update))

    return staleness_of


def _of_one_worker(preprocess: Preprocess, copies: int) -> Preprocess:
    """Preprocessing of one of the workers of an update, whose draws are made for all of them.

    It takes the update's key and the worker's place among them where `preprocess` takes a key.
    """

    def preprocess_own(drawn: Any, images: jax.Array) -> jax.Array:
        key, place = drawn
        if copies == 1:
            return preprocess(key, images)
        whole = jnp.zeros((copies, *images.shape[1:]), images.dtype).at[place].set(images[0])
        return preprocess(key, whole)[place][None]

    return preprocess_own


def _zero_stats(chains: BatchStatsChains, state: TrainState) -> PyTree:
    """From zeros, a step of the running average is what the batch adds to it: it is linear."""
    return jax.tree.map(jnp.zeros_like, chains.live(state.batch_stats, state.step))


def _push_stats(
    chains: BatchStatsChains,
    state: TrainState,
    added: PyTree,
    staleness: jax.Array,
    length: jax.Array,
) -> PyTree:
    """Makes the steps of the running averages, one an update, whoever keeps them."""

    def push(at: jax.Array, kept: PyTree) -> PyTree:
        step = state.step + at
        before = chains.read(kept, step, staleness[at])
        after = jax.tree.map(lambda old, stack: BATCH_NORM_DECAY * old + stack[at], before, added)
        return chains.write(kept, step, after)

    if not jax.tree.leaves(added):
        return state.batch_stats
    return jax.lax.fori_loop(0, length, push, state.batch_stats)


def round_sharding(state: TrainState, mesh: Mesh) -> PyTree:
    """Returns the sharding of a run's state: parameters, versions and optimizer in pieces.

    Args:
      state: arrays or their shapes.
      mesh: of the workers.
    """
    layout = make_layout(mesh, AXIS, None)
    pieces = piece_specs(layout, state.params)
    rounds = state.opt_state._replace(
        count=PartitionSpec(),
        pulled=Ring(stacked(pieces)),
        inner_state=state_specs(layout, state.opt_state.inner_state, state.params),
    )
    rest = jax.tree.map(lambda _: PartitionSpec(), state._replace(params=(), opt_state=()))
    return shardings(layout, rest._replace(params=pieces, opt_state=rounds))


def add_round(
    totals: ChunkTotals, metrics: RoundMetrics, step: jax.Array, divergence_loss: float
) -> ChunkTotals:
    """Returns the totals with the updates of a round, which ends with one that diverges."""

    def add(at: jax.Array, totals: ChunkTotals) -> ChunkTotals:
        one = jax.tree.map(lambda leaf: leaf[at], metrics.each)
        return add_step(totals, one, step + at, divergence_loss)

    added: ChunkTotals = jax.lax.fori_loop(0, metrics.length, add, totals)
    return added


def make_run_rounds(
    advance: Callable[[TrainState, RoundBatch], tuple[TrainState, RoundMetrics]],
    num_updates: int,
    max_delay: int,
    divergence_loss: float,
    place: Callable[[Batch], Batch],
) -> Callable[..., tuple[TrainState, ChunkTotals]]:
    """Returns `run_rounds(state, images, labels, order, edges, num_rounds) -> (state, totals)`.

    As `chunk.make_run_chunk`; `edges` are the first updates of its rounds, and what follows them,
    int32 (any fixed number above `num_rounds`,).
    """

    def run_rounds(
        state: TrainState,
        images: jax.Array,
        labels: jax.Array,
        order: jax.Array,
        edges: jax.Array,
        num_rounds: jax.Array | int,
    ) -> tuple[TrainState, ChunkTotals]:
        Carry = tuple[jax.Array, TrainState, ChunkTotals]

        def unfinished(carry: Carry) -> jax.Array:
            index, _, totals = carry
            return (index < num_rounds) & (totals.diverged_at == NOT_DIVERGED)

        def make(carry: Carry) -> Carry:
            index, state, totals = carry
            length = edges[index + 1] - edges[index]
            updates = edges[index] + jnp.minimum(jnp.arange(num_updates), length - 1)
            samples = order[updates].reshape(-1, order.shape[-1])
            batch = place(Batch(images[samples], labels[samples]))
            new_state, metrics = advance(state, RoundBatch(*batch, length))
            return index + 1, new_state, add_round(totals, metrics, state.step, divergence_loss)

        first = (jnp.zeros((), jnp.int32), state, zero_totals(max_delay))
        _, state, totals = jax.lax.while_loop(unfinished, make, first)
        return state, totals

    return run_rounds


def make_cut(
    process: DelayProcess, seed: int, num_updates: int
) -> Callable[[int, int], np.ndarray]:
    """Returns `cut(first, count)`: the lengths of the rounds of these updates."""
    staleness_of = _make_staleness(process)
    trace_of = jax.jit(jax.vmap(lambda update: staleness_of(jax.random.PRNGKey(seed), update)))

    def cut(first: int, count: int) -> np.ndarray:
        updates = np.arange(first, first + count, dtype=np.int32)
        return rounds_of(np.asarray(trace_of(updates)), longest=num_updates).lengths

    return cut
