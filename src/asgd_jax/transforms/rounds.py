"""`rounds`: the gradients of N asynchronous workers at once, exactly as one after another."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from asgd_jax.delays.blocks import Blocks
from asgd_jax.delays.processes import as_integer
from asgd_jax.predict import Predict
from asgd_jax.transforms.history import PyTree, Ring
from asgd_jax.transforms.recorded_rounds import recorded_rounds
from asgd_jax.transforms.round_server import (
    Rounds,
    RoundState,
    WorkerGradient,
    apply_gradient,
    gradients_of,
    init_rounds,
    place_server,
)
from asgd_jax.transforms.worker_axis import (
    WorkerLayout,
    make_layout,
    piece_specs,
    place,
    stacked,
    whole_specs,
)


def rounds(
    inner: optax.GradientTransformation,
    num_workers: int | Blocks,
    *,
    mesh: Mesh | None = None,
    axis: str = "workers",
    predict: Predict | None = None,
    delay: int | None = None,
    specs: PyTree = None,
) -> Rounds:
    r"""The trajectory of `delayed(inner, N - 1)`, N gradients at a time: a worker a device.

    $$x_{t+1} = x_t + \mathrm{inner}(\nabla f_t(x_{t - \min(\tau, t)})), \qquad \tau = N - 1$$

    The gradients of updates $kN, ..., kN + N - 1$ are taken at $x_{kN-N+1}, ..., x_{kN}$, which are
    all known when update kN is due. So a round takes all N gradients, each on its worker's device
    and without communication; then makes the N updates, every device on its piece of the
    parameters and of the optimizer's state; then gives every worker the version that it pulls. To
    and from the pieces is one all-to-all a leaf: in a round a device sends 2 P (D - 1) / D numbers
    of P parameters for each of its N / D workers, one all-reduce of synchronous training a worker.
    An optimizer that looks at all parameters (a global norm, Muon's products) communicates besides.

    `inner` sees what it sees in `delayed`: one gradient at a time, live parameters, `staleness=`
    and `stale_params=`. An optimizer that needs further arguments of `update` (`value=`) is not
    served.

    ```python
    engine = asgd_jax.rounds(optax.sgd(0.01, 0.9), 8, mesh=Mesh(jax.devices(), "workers"))
    step = jax.jit(engine.round, static_argnums=0, donate_argnums=1)
    state = engine.init(params)
    for batches in data:  # 8 of them stacked: those of the next 8 updates
        state, losses = step(gradient, state, batches)  # gradient(params, batch) -> (grads, loss)
    ```

    Memory of a device, with a worker each: its parameter set (donated, never copied), gradient and
    new version, and 1/D of parameters and optimizer state; with several, up to one set a worker
    more, while layouts change. On one device: sets and gradients. With a recorded schedule the
    versions of the ring come on top. A leaf is cut along its longest axis that D divides; one
    without such an axis is kept whole: every device makes all its updates, and receives N gradients
    of it.

    A mesh may have further axes. Batches may be divided over one (place them so; gradients are then
    summed over it), and parameters over another (`specs`).

    Several workers a device compute one after another on a CPU and as one batch (`vmap`)
    elsewhere. Without a mesh the engine runs on one device, where a round is a win only if one
    worker's batch leaves an accelerator idle.

    Args:
      inner: the server's optimizer.
      num_workers: N >= 1, a multiple of the devices on `axis`; or the `Blocks` of a recorded
        schedule (`delays.rounds_of(trace)`), for the trajectory of `delayed(inner,
        delays.from_trace(trace))`. A round is then a block; its batches are those of
        `blocks.updates(D)`, what pads it is computed and not applied, and the versions come from a
        ring as deep as the blocks need, in pieces. A state goes on under the same blocks only:
        under others of the same depth its parameters become NaN, unless it stands between two.
      mesh: devices; None for one. Types of its axes do not matter; within `jax.set_mesh` they must
        be automatic.
      axis: the mesh axis that workers are divided over.
      predict: `predict(params, inner_state, staleness) -> params`, what a worker gets in the place
        of the live parameters (weight prediction), where `staleness` is that of the gradient that
        it will push.
      delay: N - 1, or a smaller one with (delay + 1) | N: every update then takes the mean of
        N / (delay + 1) consecutive gradients, and a round makes delay + 1 updates
        (`delayed(inner, delay, every=N // (delay + 1))`).
      specs: pytree prefix of the parameters with `PartitionSpec`s over other axes of the mesh, for
        parameters that are divided themselves.

    Returns:
      `Rounds(init, round, num_batches)`. In `round(gradient, state, batches)`, `gradient(params,
      batch)` returns (gradients, aux), and batches have a first axis of `num_batches`. It returns
      the new `RoundState`, and aux stacked in the order of the updates (of a padded block the first
      `length` count).

    Raises:
      ValueError: for a number of workers that the devices do not divide, a delay that does not fit,
        an axis that the mesh has not; from `init`, for no parameters or ones divided unlike
        `specs`; from `round`, for batches without the first axis, gradients unlike the parameters
        or a state of another number of workers.

    >>> engine = rounds(optax.sgd(0.5), 2)  # the loss x^2 / 2, its gradient x, as in `delayed`
    >>> state = engine.init(jnp.array(1.0))
    >>> for batches in jnp.arange(4).reshape(2, 2):
    ...     state, seen = engine.round(lambda x, batch: (x, x), state, batches)
    ...     print(seen, state.params)
    [1. 1.] 0.0
    [0.5 0. ] -0.25

    References:
      Giladi et al., "At Stability's Edge", ICLR 2020, section 2 (the setting).
    """
    inner = optax.with_extra_args_support(inner)
    if isinstance(num_workers, Blocks):
        if predict is not None or delay is not None:
            raise ValueError(
                "predict= and delay= are for a number of workers: in a recorded schedule the "
                "blocks say the delays, and one version may be pulled for several"
            )
        return recorded_rounds(inner, num_workers, make_layout(mesh, axis, specs))
    num_workers, delay = _check_workers(num_workers, delay)
    layout = make_layout(mesh, axis, specs)
    if num_workers % layout.num_devices:
        raise ValueError(
            f"num_workers={num_workers} cannot be divided over the {layout.num_devices} devices of "
            f"the mesh's axis {axis!r}: use a multiple of {layout.num_devices} workers"
        )
    return _round_robin(inner, num_workers, delay + 1, layout, predict)


def _round_robin(
    inner: optax.GradientTransformation,
    num_workers: int,
    num_updates: int,
    layout: WorkerLayout,
    predict: Predict | None,
) -> Rounds:
    """Rounds of `num_updates` updates, each of so many averaged gradients as there are workers."""
    # Workers of one update share a version; each device needs at least one.
    num_sets = math.lcm(num_updates, layout.num_devices)
    copies = num_sets // num_updates
    ages = np.arange(num_updates, dtype=np.int32)

    def foresee(params: PyTree, inner_state: optax.OptState, staleness: Any) -> PyTree:
        if predict is None:
            return params
        return predict(params, inner_state, jnp.asarray(staleness, jnp.int32))

    def init_fn(params: PyTree) -> RoundState:
        def pull(params: PyTree, inner_state: optax.OptState) -> PyTree:
            made = [foresee(params, inner_state, ages[at // copies]) for at in range(num_sets)]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)

        specs = stacked(whole_specs(layout, params), layout.axis)
        return init_rounds(inner, layout, params, pull, specs)

    def update(server: Any, given: Any) -> tuple[Any, PyTree]:
        params, inner_state = server
        gradient, staleness, stale = given
        params, inner_state = apply_gradient(
            inner, gradient, inner_state, params, staleness, stale, num_updates - 1
        )
        return (params, inner_state), foresee(params, inner_state, num_updates - 1)

    def round_fn(
        gradient: WorkerGradient, state: RoundState, batches: PyTree
    ) -> tuple[RoundState, Any]:
        _check_pulled(state, num_sets, num_workers)
        whole = stacked(whole_specs(layout, state.params), layout.axis)
        state = place_server(layout, state)
        pulled = place(layout, state.pulled, whole)
        gradients, aux = gradients_of(layout, gradient, pulled, batches, num_workers)
        server = (state.params, state.inner_state)
        staleness = jnp.where(state.count == 0, ages, num_updates - 1)
        make = _scan_in_place if layout.num_devices == 1 else _scan_in_pieces
        (params, inner_state), pulled = make(layout, update, server, gradients, staleness, pulled)
        pulled = place(layout, pulled, whole)
        return place_server(layout, RoundState(state.count + 1, params, pulled, inner_state)), aux

    return Rounds(init_fn, round_fn, num_workers)


Update = Callable[[Any, Any], tuple[Any, PyTree]]


def _scan_in_pieces(
    layout: WorkerLayout,
    update: Update,
    server: Any,
    gradients: PyTree,
    staleness: jax.Array,
    pulled: PyTree,
) -> tuple[Any, PyTree]:
    """Makes the updates in pieces; returns the server and what the workers pull, by worker."""
    pieces = stacked(piece_specs(layout, server[0]))
    copies = jax.tree.leaves(pulled)[0].shape[0] // staleness.size
    gradients = jax.tree.map(
        lambda leaf: leaf.reshape(-1, copies, *leaf.shape[1:]).mean(1) if copies > 1 else leaf,
        place(layout, gradients, pieces),
    )
    # Nothing of this remains where the optimizer takes no stale_params.
    stale = jax.tree.map(lambda leaf: leaf[::copies], place(layout, pulled, pieces))
    server, versions = jax.lax.scan(update, server, (gradients, staleness, stale))
    # Held in pieces twice: else the compiler moves the change of layout into every update, or does
    # not know how to change it.
    versions = place(layout, versions, pieces)
    versions = jax.tree.map(lambda leaf: jnp.repeat(leaf, copies, axis=0), versions)
    return server, place(layout, versions, pieces)


def _scan_in_place(
    layout: WorkerLayout,
    update: Update,
    server: Any,
    gradients: PyTree,
    staleness: jax.Array,
    pulled: PyTree,
) -> tuple[Any, PyTree]:
    """The same on one device: each new version is written over the one that was used last.

    Otherwise the donated sets and the new ones are both in memory, and one is copied to the other.
    """
    del layout

    def step(at: jax.Array, carry: tuple[Any, PyTree]) -> tuple[Any, PyTree]:
        server, pulled = carry
        here = jax.tree.map(lambda leaf: leaf[at], (gradients, staleness, pulled))
        server, new = update(server, here)
        written = jax.tree.map(
            lambda leaf, version: jax.lax.dynamic_update_index_in_dim(leaf, version, at, 0),
            pulled,
            new,
        )
        return server, written

    made: tuple[Any, PyTree] = jax.lax.fori_loop(0, staleness.size, step, (server, pulled))
    return made


def _check_pulled(state: RoundState, num_sets: int, num_workers: int) -> None:
    if isinstance(state.pulled, Ring):
        raise ValueError(
            f"the state of rounds(..., num_workers={num_workers}) has a ring of versions: it is "
            "the state of a recorded schedule; make it by init(params)"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.pulled):
        if leaf.shape[:1] != (num_sets,):
            raise ValueError(
                f"the state of rounds(..., num_workers={num_workers}) has {leaf.shape[:1]} sets of "
                f"{jax.tree_util.keystr(path) or 'the parameter'} and needs {num_sets}: it is the "
                "state of other workers or devices; make it by init(params)"
            )


def _check_workers(num_workers: Any, delay: Any) -> tuple[int, int]:
    """Returns the number of workers and the delay, N - 1 unless given."""
    num_workers = as_integer(num_workers, "num_workers")
    if num_workers == 0:
        raise ValueError("num_workers must be >= 1, got 0: somebody has to push")
    delay = num_workers - 1 if delay is None else as_integer(delay, "delay")
    if num_workers % (delay + 1):
        fits = [n - 1 for n in range(1, num_workers + 1) if num_workers % n == 0]
        raise ValueError(
            f"delay={delay} does not fit num_workers={num_workers}: delay + 1 must divide it, as "
            f"for {fits}"
        )
    return num_workers, delay
