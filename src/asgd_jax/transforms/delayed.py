"""`delayed`: any optax optimizer, with gradients taken at parameters from the past."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from asgd_jax.delays.processes import (
    DelayProcess,
    as_integer,
    as_process,
    expected_staleness,
)
from asgd_jax.predict import Predict
from asgd_jax.transforms.accumulation import accumulate, init_accumulation, update_if
from asgd_jax.transforms.hand_down import hand_down
from asgd_jax.transforms.history import (
    PyTree,
    Ring,
    check_ring,
    init_ring,
    keep_slot_unless,
    of_shape,
    read_slot,
    write_slot,
)
from asgd_jax.transforms.leaf_delays import (
    LeafDelays,
    check_integers,
    delays_of_leaves,
    is_leafwise,
    longest,
    only_delayed,
    staleness_of_leaves,
)
from asgd_jax.transforms.stale import stale_params


class Dropped(NamedTuple):
    """How many gradients were dropped as too old, int32."""

    num_dropped: jax.Array


class DelayedState(NamedTuple):
    """State of `delayed`.

    Attributes:
      num_updates: int32 scalar, number of updates made: t. (No field is called `count`, which
        `optax.tree.get` finds in the inner optimizer.)
      history: the last `max_delay` parameter sets that `update` was given, x_{t-1} first among
        them; an empty tuple when there is no delay. The live parameters x_t are the loop's.
      history_start: int32 scalar, the first update whose parameters are known; 0 unless
        `resize_history` made the history longer.
      staleness: int32 scalar, staleness of the *next* gradient; where leaves have delays of their
        own, that of the oldest leaf.
      stale: the parameters that gradient is to be taken at, unless `staleness` is 0: then the live
        ones are. An empty tuple when there is no delay. Here and in `history` a leaf whose own
        delay is 0 is an `optax.MaskedNode`.
      key: random key of the delay process, as raw uint32 data.
      accumulated: gradients of an update that is not due yet; `Dropped` with `drop_stale`; else an
        empty tuple.
      inner_state: state of the wrapped optimizer.
    """

    num_updates: jax.Array
    history: Ring | tuple[()]
    history_start: jax.Array
    staleness: jax.Array
    stale: PyTree
    key: jax.Array
    accumulated: PyTree
    inner_state: optax.OptState


def delayed(
    inner: optax.GradientTransformation,
    delay: int | DelayProcess | LeafDelays,
    *,
    history_dtype: DTypeLike | None = None,
    seed: int | jax.Array = 0,
    every: int = 1,
    skip_nonfinite: bool = False,
    predict: Predict | None = None,
    drop_stale: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Delays the gradients that `inner` receives by `delay` updates.

    $$x_{t+1} = x_t + u_t, \qquad u_t = \mathrm{inner}(\nabla f(x_{t - s_t})), \qquad
      s_t = \min(\tau_t, t)$$

    where $\tau_t$ is the delay (constant: N = tau + 1 round-robin workers) and the minimum is the
    start-up ramp: before update t there are no older parameters than $x_0$. With `inner =
    optax.sgd(eta)` and a constant delay this is A-SGD, eq. 5 of the paper.

    The transform keeps the parameters that the gradient must be taken at; the loop asks for them:

    ```python
    grads = jax.grad(loss)(asgd_jax.stale_params(state, params), batch)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    ```

    What is remembered as $x_t$ is the `params` that update t is given, so a loop may do to its
    parameters what it likes between two updates (project, clip, average, freeze), and other
    transforms may change the updates afterwards, as in `optax.chain(delayed(...),
    optax.scale(0.5))`.

    Delays by leaf (the stages of an asynchronous pipeline): `delay` is a pytree of ints, or a
    function. Leaf l is then read $\min(\tau_l, t)$ updates old, gradients are those of the whole
    loss at that mixed point, and each leaf keeps only as many values as it needs.

    What `inner` sees: stale gradients, *live* parameters (weight decay and clipping act on the
    server), and, if it takes them, the extra arguments `staleness` (int32 scalar, of this
    gradient; with delays by leaf a pytree of them) and `stale_params`, for staleness-aware
    transforms. One that `inner`, or a member of
    its chain, refuses is left out.

    Gradient accumulation: with `every=k` the loop makes k calls an update, their gradients are
    averaged, and k - 1 of the k updates are zero; delays count updates. `optax.MultiSteps(delayed(
    ...), k)` is the same trajectory, but copies the history at every call; so does a loop that
    keeps or drops a whole optimizer state by `jnp.where`, as loss scaling is often written:
    `skip_nonfinite=True` is the way without a copy. (`delayed(optax.MultiSteps(...))` copies
    nothing, and its delays count calls.)

    Args:
      inner: the server's optimizer.
      delay: int >= 0, or a `DelayProcess`. With 0 no history is kept and the trajectory is bitwise
        that of `inner`. By leaf: a pytree of ints like the parameters, a prefix of one, or a
        function from a leaf's path (as in `jax.tree_util.tree_map_with_path`) to int.
      history_dtype: floating-point dtype that stores the history (`jnp.bfloat16` halves it); the
        parameters' own by default. Gradients of staleness >= 1 are then taken at rounded
        parameters; the live parameters are never rounded. Half precision is stored as bits, through
        which no derivative with respect to older parameters passes.
      seed: seed of the delay process, an int or an int scalar array.
      every: int >= 1, gradients of one update. Their mean has the parameters' dtype.
      skip_nonfinite: a gradient with an entry that is not finite changes nothing: no parameter, no
        inner state, no count. Under `vmap` every run then counts for itself, and that costs a copy;
        where a device sees a piece of the gradients only (`shard_map`), it judges that piece.
      predict: `predict(params, inner_state, staleness)`, what is remembered in the place of the
        parameters: where they are expected to be once the gradient arrives, see `asgd_jax.predict`.
        Called at every update with the live parameters, the state of `inner` and the expected
        staleness (int32; of a random or recorded delay its mean, rounded; by leaf a pytree). In
        the start-up ramp, too, x_0 is predicted for the whole of it, which shows only with weight
        decay. A gradient of staleness 0 is taken at the live parameters, not at a prediction.
      drop_stale: int >= 1; a gradient of this staleness or more is dropped and advances nothing: no
        parameter, no inner state, no version (Ringmaster ASGD). The process goes on with the next
        gradient, so that what is applied has its distribution below the limit.

    Returns:
      A GradientTransformationExtraArgs whose state is a `DelayedState`; `update` needs `params`.

    Raises:
      ValueError: for a `drop_stale` that drops everything, or with `every` or delays by leaf; for a
        delay that is none of these (one that does not fit the parameters: from
        `init`), for a `history_dtype` that is not floating, for `every` below 1, and from `update`
        when `params` is missing, of other leaves than those of `init`, or `state` one of another
        delay.

    >>> tx = delayed(optax.sgd(0.5), delay=1)
    >>> params = jnp.array(1.0)
    >>> state = tx.init(params)
    >>> for _ in range(3):  # the loss x^2 / 2: its gradient is x
    ...     updates, state = tx.update(stale_params(state, params), state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(params)
    0.5
    0.0
    -0.25

    References:
      Giladi et al., "At Stability's Edge", ICLR 2020, section 2. `drop_stale`: Maranjyan, Tyurin,
      Richtarik, "Ringmaster ASGD", ICML 2025.
    """
    _refuse_traced(delay=delay, every=every, skip_nonfinite=skip_nonfinite)
    process = _process_of(delay)
    every = _check_options(every, history_dtype)
    _check_drop(drop_stale, process, every)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: PyTree) -> DelayedState:
        inner_state = inner.init(params)
        _refuse_delay_within(inner_state)
        kept = _keep(delay, process, params)
        return DelayedState(
            num_updates=jnp.zeros((), jnp.int32),
            history=init_ring(kept.params, kept.depth, history_dtype) if kept.longest else (),
            history_start=jnp.zeros((), jnp.int32),
            staleness=jnp.zeros((), jnp.int32),
            stale=(
                jax.tree.map(lambda leaf: of_shape(jnp.array, leaf), kept.params)
                if kept.longest
                else ()
            ),
            key=jax.random.PRNGKey(seed),
            accumulated=(
                init_accumulation(params, every)
                if drop_stale is None
                else Dropped(jnp.zeros((), jnp.int32))
            ),
            inner_state=inner_state,
        )

    def update_fn(
        updates: PyTree, state: DelayedState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, DelayedState]:
        if params is None:
            raise ValueError("delayed needs params, got None: call update(grads, state, params)")
        kept = _keep(delay, process, params)
        _check(state, kept, history_dtype)
        if predict is not None and kept.longest:
            kept = _foresee(predict, process, kept, params, state.inner_state)
        staleness = state.staleness
        if kept.delays is not None:
            staleness = staleness_of_leaves(kept.delays, staleness)
        handed = {"staleness": staleness, "stale_params": stale_params(state, params)}

        def apply(gradients: PyTree, inner_state: optax.OptState) -> tuple[PyTree, optax.OptState]:
            arguments = (gradients, inner_state, params)
            made: tuple[PyTree, optax.OptState] = hand_down(
                inner.update, arguments, extra_args, handed, kept.longest
            )
            return made

        due, updates, accumulated = accumulate(updates, state.accumulated, every, skip_nonfinite)
        dropped: bool | jax.Array = False
        if drop_stale is not None:
            dropped = state.staleness >= drop_stale
            due = due & ~dropped
            accumulated = Dropped(accumulated.num_dropped + jnp.asarray(dropped, jnp.int32))
        updates, inner_state = update_if(due, apply, updates, state.inner_state)
        state = state._replace(
            num_updates=state.num_updates + jnp.asarray(due, jnp.int32),
            accumulated=accumulated,
            inner_state=inner_state,
        )
        return updates, _turn(state, due, dropped, kept, process)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _process_of(delay: Any) -> DelayProcess | None:
    """The process of a delay that is all leaves'; None of one by leaf, as far as it is known."""
    if not is_leafwise(delay):
        return as_process(delay)
    if not callable(delay):
        check_integers(delay)
    return None


def _check_drop(limit: Any, process: DelayProcess | None, every: int) -> None:
    if limit is None:
        return
    if as_integer(limit, "drop_stale") < 1:
        raise ValueError("drop_stale must be >= 1, got 0: that drops every gradient")
    if every > 1:
        raise ValueError(f"drop_stale={limit} with every={every}: drop or accumulate, not both")
    if process is None:
        raise ValueError(
            f"drop_stale={limit} needs one delay for all leaves: a gradient is dropped as a whole"
        )
    some = process.min_delay < limit
    if process.pmf is not None:
        some = bool(np.any(np.asarray(process.pmf)[:limit]))
    if not some:
        raise ValueError(
            f"drop_stale={limit} drops every gradient of this delay, which is never below it"
        )


class _Kept(NamedTuple):
    """What a history keeps of the parameters.

    Attributes:
      params: the live ones, without those that have no delay.
      depth: slots of every leaf: an int, or a pytree of them like `params`.
      longest: the largest of them.
      delays: of every leaf of the parameters; None where one delay is all leaves'.
    """

    params: PyTree
    depth: Any
    longest: int
    delays: PyTree | None


def _keep(delay: Any, process: DelayProcess | None, params: PyTree) -> _Kept:
    if process is not None:
        return _Kept(params, process.max_delay, process.max_delay, None)
    if not jax.tree.leaves(params):  # optax's placeholder for parameters: there are no leaves yet
        return _Kept(params, 1, 1, None)
    delays = delays_of_leaves(delay, params)
    depth = jax.tree.map(lambda each: each or optax.MaskedNode(), delays)
    return _Kept(only_delayed(params, delays), depth, longest(delays), delays)


def _foresee(
    predict: Predict,
    process: DelayProcess | None,
    kept: _Kept,
    params: PyTree,
    inner_state: optax.OptState,
) -> _Kept:
    """What to keep of these parameters: where the optimizer is expected to take them."""
    if process is None:
        ahead = jax.tree.map(jnp.int32, kept.delays)
        foreseen = predict(params, inner_state, ahead)
        return kept._replace(params=only_delayed(foreseen, kept.delays))
    ahead = jnp.asarray(expected_staleness(process), jnp.int32)
    return kept._replace(params=predict(params, inner_state, ahead))


def _turn(
    state: DelayedState,
    due: bool | jax.Array,
    dropped: bool | jax.Array,
    kept: _Kept,
    process: DelayProcess | None,
) -> DelayedState:
    """Stores the parameters of this update and picks those of the next gradient."""
    if not isinstance(state.history, Ring):  # no delay
        return state
    step, params = state.num_updates, kept.params
    written = step - jnp.asarray(due, jnp.int32)
    history = write_slot(
        state.history, written, keep_slot_unless(due, state.history, written, params)
    )
    oldest = jnp.minimum(kept.longest, step - state.history_start)
    # Read now and kept: read at the start of the next step, the slices would be fused into every
    # operation that uses a bias, and slow the model.
    if process is None:
        staleness = oldest
        stale = read_slot(history, lambda depth: step - jnp.minimum(depth, oldest), params)
    else:
        # Of the gradients that arrive, the applied and the dropped ones.
        arrival = step + (state.accumulated.num_dropped if dropped is not False else 0)
        staleness = jnp.clip(_draw(process, state.key, arrival), 0, oldest)
        stale = read_slot(history, step - staleness, params)
    if due is not True:
        done = due | dropped  # else the same gradient is still to come
        staleness = jnp.where(done, staleness, state.staleness)
        stale = jax.tree.map(lambda new, old: jnp.where(done, new, old), stale, state.stale)
    return state._replace(history=history, staleness=staleness, stale=stale)


def _draw(process: DelayProcess, key: jax.Array, step: jax.Array) -> jax.Array:
    drawn = jnp.asarray(process.sample(key, step))
    if drawn.shape or not jnp.issubdtype(drawn.dtype, jnp.integer):
        kind = f"{drawn.dtype}{list(drawn.shape)}"
        raise ValueError(f"a delay process must sample an integer scalar, got {kind}")
    return drawn.astype(jnp.int32)


def _check(state: DelayedState, kept: _Kept, dtype: DTypeLike | None) -> None:
    """Refuses the state of another delay, or of other parameters."""
    owner = f"delayed(..., max_delay={kept.longest})"
    if isinstance(state.history, Ring):
        check_ring(state.history, kept.depth, owner, kept.params, dtype)
    elif kept.longest:
        raise ValueError(
            f"the state of {owner} has no history: it is the state of delay 0; convert it by "
            "asgd_jax.resize_history(state, delay, params)"
        )


def _check_options(every: int, dtype: DTypeLike | None) -> int:
    """Returns `every`, an int >= 1, for a dtype that can store a history."""
    if dtype is not None and not (
        jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize > 1
    ):
        raise ValueError(
            f"history_dtype must be a floating-point dtype of 16 bits or more, got {dtype!r}"
        )
    every = as_integer(every, "every")
    if every < 1:
        raise ValueError("every must be >= 1, got 0: 1 updates at every gradient")
    return every


def _refuse_delay_within(inner_state: optax.OptState) -> None:
    """Refuses a second delay of the parameters, which nothing would ever ask for."""
    nodes = jax.tree.leaves(inner_state, is_leaf=lambda node: isinstance(node, DelayedState))
    if any(isinstance(node, DelayedState) and node.history != () for node in nodes):
        raise ValueError(
            "delayed inside delayed: gradients can be taken at one set of stale parameters only; "
            "give the sum of both delays to one of them"
        )


def _refuse_traced(**options: Any) -> None:
    if any(isinstance(value, jax.core.Tracer) for value in options.values()):
        names = ", ".join(f'"{name}"' for name in options)
        raise ValueError(
            f"delayed needs {names} when it is built and got a traced value: with "
            f"optax.inject_hyperparams name them in static_args=({names}); for a delay that is "
            "data use asgd_jax.delays.constant(delay, max_delay=...)"
        )
