"""`delayed`: any optax optimizer, with gradients taken at parameters from the past."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from asgd_jax.delays.processes import DelayProcess, as_process
from asgd_jax.transforms.history import PyTree, init_history, read_slot, write_then_read


class DelayedState(NamedTuple):
    """State of `delayed`.

    Attributes:
      count: int32 scalar, number of updates made.
      history: ring of `max_delay + 1` parameter sets, half-precision ones as uint16 bits; slot
        `count` holds the live parameters. An empty tuple when there is no delay.
      staleness: int32 scalar, staleness of the *next* gradient.
      stale: the parameters that gradient is to be taken at; an empty tuple when there is no delay.
      key: random key of the delay process, as raw uint32 data.
      inner_state: state of the wrapped optimizer.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as optax's states do
    history: PyTree
    staleness: jax.Array
    stale: PyTree
    key: jax.Array
    inner_state: optax.OptState


def delayed(
    inner: optax.GradientTransformation,
    delay: int | DelayProcess,
    *,
    history_dtype: DTypeLike | None = None,
    seed: int | jax.Array = 0,
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

    It is the *outermost* transform that changes the updates: `update` computes the new parameters
    itself, to store them, so `optax.chain(delayed(...),
    optax.scale(0.5))` would remember parameters that never were. `optax.inject_hyperparams`,
    `optax.masked` and `optax.MultiSteps` around it are fine. Under `MultiSteps(delayed(...), k)`
    delays count emitted updates; under `delayed(MultiSteps(...))` they count calls.

    What `inner` sees: stale gradients, *live* parameters (weight decay and clipping act on the
    server), and the extra arguments `staleness` (int32 scalar, of this gradient) and
    `stale_params`, for staleness-aware transforms.

    Args:
      inner: the server's optimizer.
      delay: int >= 0, or a `DelayProcess`. With 0 no history is kept and the trajectory is bitwise
        that of `inner`.
      history_dtype: floating-point dtype that stores the history (`jnp.bfloat16` halves it); the
        parameters' own by default. Gradients are then taken at rounded parameters, whatever their
        staleness; the live parameters are never rounded.
      seed: seed of the delay process, an int or an int scalar array.

    Returns:
      A GradientTransformationExtraArgs whose state is a `DelayedState`; `update` needs `params`.

    Raises:
      ValueError: for a delay that is neither an integer >= 0 nor a DelayProcess, for a
        `history_dtype` that is not floating, and from `update` when `params` is missing.

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
      Giladi et al., "At Stability's Edge", ICLR 2020, section 2.
    """
    process = as_process(delay)
    if history_dtype is not None and not jnp.issubdtype(history_dtype, jnp.floating):
        raise ValueError(f"history_dtype must be a floating-point dtype, got {history_dtype!r}")
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: PyTree) -> DelayedState:
        history: PyTree = ()
        stale: PyTree = ()
        if process.max_delay > 0:
            history = init_history(params, process.max_delay + 1, history_dtype)
            stale = read_slot(history, 0, params, history_dtype)
        return DelayedState(
            count=jnp.zeros((), jnp.int32),
            history=history,
            staleness=jnp.zeros((), jnp.int32),
            stale=stale,
            key=jax.random.PRNGKey(seed),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: PyTree, state: DelayedState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, DelayedState]:
        if params is None:
            raise ValueError("delayed needs params, got None: call update(grads, state, params)")
        inner_extra = extra_args | {
            "staleness": state.staleness,
            "stale_params": stale_params(state, params),
        }
        updates, inner_state = inner.update(updates, state.inner_state, params, **inner_extra)
        count = state.count + 1
        history, staleness, stale = state.history, state.staleness, state.stale
        if process.max_delay > 0:
            # The next stale parameters are read now and kept: read at the start of the next step,
            # the slices would be fused into every operation that uses a bias, and slow the model.
            staleness = jnp.minimum(process.sample(state.key, count), count).astype(jnp.int32)
            new_params = optax.apply_updates(params, updates)
            history, stale = write_then_read(
                history, count, new_params, count - staleness, history_dtype
            )
        return updates, DelayedState(count, history, staleness, stale, state.key, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def stale_params(state: optax.OptState, params: PyTree) -> PyTree:
    """Returns the parameters at which the next gradient is to be taken.

    Args:
      state: an optimizer state that holds one or more `DelayedState`s at any depth (inside
        `optax.chain`, `inject_hyperparams`, `masked`, `multi_transform`, ...). They are recognised
        by their class name, so a restored or rebuilt state works too.
      params: the live parameters.

    Returns:
      A pytree like `params` with the same dtypes. A leaf without a history (no delay, or masked
      out) is the live leaf itself.

    Raises:
      ValueError: when there is no `DelayedState` in `state`.

    >>> tx = delayed(optax.sgd(0.1), delay=2)
    >>> stale_params(tx.init(jnp.ones(2)), jnp.ones(2))
    Array([1., 1.], dtype=float32)
    """
    nodes = jax.tree.leaves(state, is_leaf=_is_delayed_state)
    found = [node for node in nodes if _is_delayed_state(node)]
    if not found:
        raise ValueError(
            f"no DelayedState in an optimizer state of type {type(state).__name__}: "
            "wrap the optimizer in asgd_jax.delayed(optimizer, delay)"
        )
    stale: dict[Any, jax.Array] = {}
    for node in found:
        stale.update(jax.tree_util.tree_leaves_with_path(node.stale))
    return jax.tree_util.tree_map_with_path(lambda path, leaf: stale.get(path, leaf), params)


def _is_delayed_state(node: Any) -> bool:
    return type(node).__name__ == DelayedState.__name__
