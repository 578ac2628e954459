"""What all rounds have in common: their state, one update of the server, what they refuse."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from asgd_jax.transforms.hand_down import hand_down
from asgd_jax.transforms.history import PyTree, is_none
from asgd_jax.transforms.stale import has_history
from asgd_jax.transforms.worker_axis import (
    WorkerLayout,
    each_worker,
    piece_specs,
    place,
    refuse_explicit_context,
    shardings,
    state_specs,
)

WorkerGradient = Callable[[PyTree, PyTree], tuple[PyTree, Any]]


class RoundState(NamedTuple):
    """State of `rounds`.

    Attributes:
      count: int32 scalar: rounds made; with a recorded schedule updates made.
      params: the live parameters, in pieces: of each leaf every device has 1/D.
      pulled: what the workers have pulled. Round robin: a stack of the parameter sets that the next
        round's gradients are taken at, in their order, each on its worker's device. A recorded
        schedule: a `Ring` of the last versions, in pieces.
      inner_state: state of the wrapped optimizer, in pieces.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    params: PyTree
    pulled: PyTree
    inner_state: optax.OptState


class Rounds(NamedTuple):
    """What `rounds` returns.

    Attributes:
      init: `init(params) -> RoundState`, in fresh buffers.
      round: `round(gradient, state, batches) -> (state, aux)`.
      num_batches: batches that a round takes, its first axis.
    """

    init: Callable[[PyTree], RoundState]
    round: Callable[[WorkerGradient, RoundState, PyTree], tuple[RoundState, Any]]
    num_batches: int


def apply_gradient(
    inner: optax.GradientTransformation,
    gradients: PyTree,
    inner_state: optax.OptState,
    params: PyTree,
    staleness: jax.Array,
    stale: PyTree,
    max_delay: int,
) -> tuple[PyTree, optax.OptState]:
    """One update of the server, as `delayed` makes it: new parameters and optimizer state.

    >>> tx = optax.sgd(0.5)
    >>> apply_gradient(tx, 1.0, tx.init(2.0), jnp.array(2.0), jnp.array(0), 2.0, 0)[0]
    Array(1.5, dtype=float32)
    """
    handed = {"staleness": staleness, "stale_params": stale}
    arguments = (gradients, inner_state, params)
    updates, inner_state = hand_down(inner.update, arguments, {}, handed, max_delay)
    return optax.apply_updates(params, updates), inner_state


def init_rounds(
    inner: optax.GradientTransformation,
    layout: WorkerLayout,
    params: PyTree,
    pull: Callable[[PyTree, optax.OptState], PyTree],
    pulled_specs: PyTree,
) -> RoundState:
    """Returns the state before the first round.

    Args:
      inner: the server's optimizer.
      layout: of the devices.
      params: x_0.
      pull: from parameters and the optimizer's state to `RoundState.pulled`.
      pulled_specs: how that lies.

    Raises:
      ValueError: for no parameters, for ones that lie otherwise than the layout says, and for an
        optimizer that delays.
    """
    _check_params(layout, params)
    refuse_explicit_context(layout)

    def make(params: PyTree) -> RoundState:
        # Copied: an optimizer may keep the parameters themselves, which are donated elsewhere.
        inner_state = jax.tree.map(jnp.copy, inner.init(params))
        if has_history(inner_state):
            raise ValueError(
                "rounds delays the gradients itself: give it the optimizer that is inside delayed"
            )
        pulled = pull(params, inner_state)
        return RoundState(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), pulled, inner_state
        )

    if layout.mesh is None:
        return make(params)
    pieces = piece_specs(layout, params)
    inner_specs = state_specs(layout, jax.eval_shape(inner.init, params), params)
    count: Any = PartitionSpec()
    specs = RoundState(count, pieces, pulled_specs, inner_specs)
    params = jax.device_put(params, shardings(layout, pieces))
    made: RoundState = jax.jit(make, out_shardings=shardings(layout, specs))(params)
    return made


def place_server(layout: WorkerLayout, state: RoundState) -> RoundState:
    """The state with parameters and optimizer state in pieces."""
    return state._replace(
        params=place(layout, state.params, piece_specs(layout, state.params)),
        inner_state=place(
            layout, state.inner_state, state_specs(layout, state.inner_state, state.params)
        ),
    )


def gradients_of(
    layout: WorkerLayout,
    gradient: WorkerGradient,
    pulled: PyTree,
    batches: PyTree,
    num_batches: int,
) -> tuple[PyTree, Any]:
    """`each_worker`, of batches and gradients that are what they should be.

    Raises:
      ValueError: for batches without the axis of workers, or gradients unlike the parameters.
    """
    _check_batches(batches, num_batches)
    refuse_explicit_context(layout)

    def checked(params: PyTree, batch: PyTree) -> tuple[PyTree, Any]:
        made = gradient(params, batch)
        grads, aux = made if isinstance(made, tuple) and len(made) == 2 else (None, None)
        if _structure(grads) != _structure(params):
            raise ValueError(
                "gradient(params, batch) must return (gradients, aux), gradients like params, got "
                f"{_structure(made)}: jax.value_and_grad returns (value, gradients), exchange them"
            )
        _check_shapes(grads, params)
        return grads, aux

    return each_worker(layout, checked, pulled, batches)


def _structure(tree: PyTree) -> Any:
    return jax.tree.structure(tree, is_leaf=is_none)


def _check_shapes(grads: PyTree, params: PyTree) -> None:
    pairs = zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(params), strict=False)
    for (path, leaf), param in pairs:
        if jnp.shape(leaf) != jnp.shape(param):
            raise ValueError(
                f"gradient(params, batch) returned {jax.tree_util.keystr(path) or 'a gradient'} of "
                f"shape {jnp.shape(leaf)} for a parameter of shape {jnp.shape(param)}"
            )


def _check_batches(batches: PyTree, num_batches: int) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(batches)
    for path, leaf in leaves:
        if jnp.shape(leaf)[:1] != (num_batches,):
            raise ValueError(
                f"batches{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}: its first axis "
                f"must be that of the {num_batches} batches of a round"
            )
    if not leaves:
        raise ValueError(
            f"batches holds no arrays: a round takes {num_batches} batches, stacked (step numbers "
            "do, where the gradient makes its own batch)"
        )


def _check_params(layout: WorkerLayout, params: PyTree) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError(
            f"params holds no arrays, got {params!r:.80}: init takes the parameters to be trained"
        )
    if layout.mesh is None:
        return
    pieces = jax.tree.leaves(shardings(layout, piece_specs(layout, params)))
    for (path, leaf), piece in zip(leaves, pieces, strict=True):
        given = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        if not isinstance(given, NamedSharding) or given.is_fully_replicated:
            continue
        lost = {name for entry in given.spec for name in _as_tuple(entry)}
        lost &= set(layout.mesh.axis_names) - {layout.axis}
        lost -= {name for entry in piece.spec for name in _as_tuple(entry)}
        if lost:
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} is divided as {given.spec} and specs does not "
                f"say so: pass specs=, a PartitionSpec for every parameter over {sorted(lost)}"
            )


def _as_tuple(entry: Any) -> tuple[Any, ...]:
    return entry if isinstance(entry, tuple) else (entry,)
