"""The two programs of a real run: a worker's gradient and the server's update. No other computes.

The replay calls the same two in the recorded order, and so ends with the same bits. They compose
the simulator's own parts: `training.step.make_gradient` and `training.optimizer.make_server`.

What belongs to the past is kept by the server with every pull (`Pulled`) and is no ring: there is
no largest staleness. It is handed to the update together with the gradient that was taken there:

* the parameters, for transforms that take `stale_params=`;
* the buffer of shifted momentum at that version, which is the one that the worker's own last push
  made: one buffer a worker. A worker that starts anew, or whose gradient was dropped, pulls that of
  the last update, as the simulator's ring has it;
* BatchNorm's running statistics at that version, where every worker has its own chain.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from asgd_jax import delays
from asgd_jax.models.layers import BATCH_NORM_DECAY
from asgd_jax.training.optimizer import make_server
from asgd_jax.training.program import DataSpec, make_model
from asgd_jax.training.state import PyTree, TrainState, make_init
from asgd_jax.training.step import Batch, make_gradient
from asgd_jax.transforms import ShiftedTraceState
from asgd_jax.transforms.hand_down import hand_down


class Pulled(NamedTuple):
    """What the server remembers of a version that a worker has pulled.

    Attributes:
      version: updates made until then.
      params: the parameters.
      batch_stats: BatchNorm's running statistics.
      buffers: of shifted momentum, in the order in which the optimizer's state has them.
    """

    version: int
    params: PyTree
    batch_stats: PyTree
    buffers: tuple[PyTree, ...]


class Pushed(NamedTuple):
    """What a worker computes.

    Attributes:
      gradients: like the parameters.
      batch_stats: what its batch adds to BatchNorm's running statistics.
      loss, error, gradient_norm: float32 scalars, of its batch.
    """

    gradients: PyTree
    batch_stats: PyTree
    loss: Any
    error: Any
    gradient_norm: Any


class Programs(NamedTuple):
    """Pure, compiled functions.

    Attributes:
      init: `init() -> TrainState` before the first update, whose `opt_state` is the server's own.
      gradient: `gradient(params, images, labels, number) -> Pushed`; arrays as of `Batch`, number
        that of the batch, int32.
      apply: `apply(state, pulled, pushed, staleness) -> TrainState`, with the fields of a `Pulled`
        but its version as a tuple, and without the scalars of a `Pushed`: see `apply_update`.
    """

    init: Callable[[], TrainState]
    gradient: Callable[[PyTree, Any, Any, Any], Pushed]
    apply: Callable[..., TrainState]


def make_programs(config: ConfigDict, facts: DataSpec) -> Programs:
    """Returns the programs of a configuration, checked before."""
    model = make_model(config, facts.num_classes)
    # No ring: of every buffer only the newest, and with a pull that of its version.
    server = make_server(config, delays.constant(0), facts.plan.steps_per_epoch)
    init = make_init(model, server.init, facts.image_shape, lambda stats: stats)
    root = jax.random.PRNGKey(config.seed)
    zeros = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(init, root).batch_stats
    )
    of_batch = make_gradient(model, facts.preprocess, config.label_smoothing)
    own_chains = config.batch_stats == "worker"

    def gradient(params: PyTree, images: Any, labels: Any, number: Any) -> Pushed:
        key = jax.random.fold_in(root, number)
        # From zeros, a step of the running average is what the batch adds to it: it is linear.
        grads, (stats, loss, error) = of_batch(params, zeros, Batch(images, labels), key)
        return Pushed(grads, stats, loss, error, optax.tree.norm(grads))

    def apply(
        state: TrainState, pulled: tuple[PyTree, PyTree, Any], gradients: Any, staleness: Any
    ) -> TrainState:
        grads, added = gradients
        params, stats, buffers = pulled
        updates, opt_state = hand_down(
            server.update,
            (grads, with_buffers(state.opt_state, buffers), state.params),
            {},
            {"staleness": staleness, "stale_params": params},
            0,
        )
        before = stats if own_chains else state.batch_stats
        return TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=jax.tree.map(lambda old, new: BATCH_NORM_DECAY * old + new, before, added),
            opt_state=opt_state,
            key=state.key,
        )

    return Programs(lambda: jax.jit(init)(root), jax.jit(gradient), jax.jit(apply))


def apply_update(
    programs: Programs, state: TrainState, pulled: Pulled, pushed: Pushed, staleness: int
) -> TrainState:
    """Returns the state after one update: the gradient of an earlier version meets the latest."""
    new: TrainState = programs.apply(
        state,
        (pulled.params, pulled.batch_stats, pulled.buffers),
        (pushed.gradients, pushed.batch_stats),
        np.int32(staleness),
    )
    return new


def pull_state(state: TrainState, version: int) -> Pulled:
    """Returns what is to be remembered of the present state; no array is copied."""
    return Pulled(version, state.params, state.batch_stats, tuple(buffers_of(state.opt_state)))


def buffers_of(opt_state: PyTree) -> list[PyTree]:
    """Returns the buffers of shifted momentum in an optimizer's state."""
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_shifted)
    return [node.buffers for node in nodes if _is_shifted(node)]


def with_buffers(opt_state: PyTree, buffers: tuple[PyTree, ...]) -> PyTree:
    """Returns the optimizer's state with these buffers in the place of its own."""
    left = list(buffers)

    def put(node: Any) -> Any:
        return node._replace(buffers=left.pop(0)) if _is_shifted(node) else node

    return jax.tree.map(put, opt_state, is_leaf=_is_shifted)


def _is_shifted(node: Any) -> bool:
    return isinstance(node, ShiftedTraceState)


def first_fault(pushed: Pushed, params: PyTree) -> str | None:
    """Returns what is wrong with a gradient, or None: other leaves or shapes, or not finite.

    >>> bad = Pushed({"w": np.array([1.0, np.nan])}, {}, 0.0, 0.0, 0.0)
    >>> first_fault(bad, {"w": np.zeros(2)})
    "['w'] is not finite"
    >>> first_fault(bad, {"w": np.zeros(3)})
    "['w'] has shape (2,), not (3,)"
    """
    structure: Any = jax.tree.structure(pushed.gradients)
    if structure != jax.tree.structure(params):
        return "other leaves than the parameters"
    leaves = zip(jax.tree.leaves(pushed.gradients), jax.tree.leaves(params), strict=True)
    for k, (leaf, param) in enumerate(leaves):
        if np.shape(leaf) != np.shape(param):
            shapes = f"{np.shape(leaf)}, not {np.shape(param)}"
            return f"{_name_of_leaf(pushed.gradients, k)} has shape {shapes}"
    for tree in (pushed.gradients, pushed.batch_stats):
        for k, leaf in enumerate(jax.tree.leaves(tree)):
            if not _is_finite(np.asarray(leaf)):
                return f"{_name_of_leaf(tree, k)} is not finite"
    return None


def _is_finite(values: np.ndarray) -> bool:
    # A sum is not finite where an entry is not; where it overflows, look at each.
    with np.errstate(over="ignore", invalid="ignore"):
        total = values.sum()
    return bool(np.isfinite(total) or np.isfinite(values).all())


def _name_of_leaf(tree: PyTree, number: int) -> str:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return jax.tree_util.keystr(paths[number]) or "the gradient"
