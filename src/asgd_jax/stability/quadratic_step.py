"""One implemented train step on the quadratic a x^2 / 2, as a function of a vector.

The vector holds the parameter and every floating-point value of the optimizer's state; counters,
random keys and the like come beside it and move on by themselves.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from asgd_jax.transforms import delayed, stale_params
from asgd_jax.transforms.history import read_slot

MakeOptimizer = Callable[[Any], optax.GradientTransformation]
Memory = tuple[jax.Array, list[jax.Array]]  # floating-point values, and all others


class Layout(NamedTuple):
    """How a parameter and an optimizer state lie in a memory: their structure, and their leaves."""

    structure: Any
    leaves: list[jax.ShapeDtypeStruct]

    def pack(self, tree: Any) -> Memory:
        """The parameter comes first."""
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
        floats = [leaf.ravel().astype(jnp.float64) for leaf in leaves if is_float(leaf)]
        return jnp.concatenate(floats), [leaf for leaf in leaves if not is_float(leaf)]

    def unpack(self, memory: Memory) -> Any:
        """The inverse of `pack`, with the dtypes of `leaves`."""
        vector, others = memory[0], iter(memory[1])
        leaves, at = [], 0
        for leaf in self.leaves:
            if is_float(leaf):
                part = vector[at : at + math.prod(leaf.shape)]
                leaves.append(part.reshape(leaf.shape).astype(leaf.dtype))
                at += part.size
            else:
                leaves.append(next(others))
        return jax.tree.unflatten(self.structure, leaves)


class QuadraticStep(NamedTuple):
    """A train step on the quadratic.

    Attributes:
      layout: of its memory.
      start: `start(learning_rate) -> Memory` before the first update, at the minimum.
      advance: `advance(learning_rate, memory, noise, staleness=None) -> Memory`, one update with
        the gradient a x_stale + noise; an int32 `staleness` overrules the optimizer's delay.
      held: whether the floating-point values are those of a given state, to be put back after
        every update.
    """

    layout: Layout
    start: Callable[[Any], Memory]
    advance: Callable[..., Memory]
    held: bool


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Double precision on the CPU, and none of the caller's promotion rules, for a while."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(True))
        # The optimizer is the user's: how it promotes dtypes is not our business.
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        # Thousands of tiny updates: to an accelerator they would be nothing but latency.
        with contextlib.suppress(RuntimeError):
            stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
        yield


def quadratic_step(
    make_optimizer: MakeOptimizer,
    delay: int | np.ndarray,
    sharpness: float,
    optimizer_state: optax.OptState | None,
) -> QuadraticStep:
    """Builds the train step; call it, and what it returns, inside `float64()`.

    Args:
      make_optimizer: learning rate -> the server's optimizer. It is wrapped in `delayed`, unless
        its state shows that it delays by itself.
      delay: checked delay: an int, or the mass function of random delays.
      sharpness: > 0.
      optimizer_state: state of `make_optimizer(...)` for a scalar parameter, or None.

    Raises:
      ValueError: when the optimizer does not start, would delay twice, or has other states.
    """
    if not callable(make_optimizer):
        raise ValueError(
            f"make_optimizer must be a function of the learning rate, got {make_optimizer!r}: "
            "pass for instance optax.sgd or lambda learning_rate: optax.sgd(learning_rate, 0.9)"
        )
    rate = 1.0 / sharpness
    shapes = run_user_code(lambda: jax.eval_shape(lambda: _at_minimum(make_optimizer(rate))))
    wrapped = not _delays_by_itself(shapes)
    if not wrapped and not (isinstance(delay, int) and delay == 0):
        raise ValueError(
            "make_optimizer returns an optimizer that already delays its gradients: pass delay=0 "
            "to use it as it is, or the optimizer without delayed / delay_gradients"
        )
    # Random staleness is set from outside, update by update; only the size of the history counts.
    longest = delay if isinstance(delay, int) else delay.size - 1

    def make(rate: Any) -> optax.GradientTransformationExtraArgs:
        inner = make_optimizer(rate)
        return delayed(inner, longest) if wrapped else optax.with_extra_args_support(inner)

    shapes = jax.eval_shape(lambda: _at_minimum(make(rate)))
    layout = Layout(jax.tree.structure(shapes), jax.tree.leaves(shapes))

    def start(rate: Any) -> Memory:
        return layout.pack(_at_minimum(make(rate)))

    def advance(
        rate: Any, memory: Memory, noise: Any, staleness: jax.Array | None = None
    ) -> Memory:
        params, state = layout.unpack(memory)
        if staleness is not None:
            past = read_slot(state.history, state.num_updates - staleness, params)
            state = state._replace(staleness=staleness, stale=past)
        where = params
        with contextlib.suppress(ValueError):  # no history: delay_gradients by itself
            where = stale_params(state, params)
        updates, state = make(rate).update(sharpness * where + noise, state, params)
        vector, others = layout.pack((optax.apply_updates(params, updates), state))
        # In a loop the dtypes must stay.
        return vector, [_like(new, old) for new, old in zip(others, memory[1], strict=True)]

    if optimizer_state is not None:
        params, state = _at_minimum(make(rate))
        given = _match(optimizer_state, state.inner_state if wrapped else state)
        given = layout.pack((params, state._replace(inner_state=given) if wrapped else given))
        # A learning rate in the state (inject_hyperparams) is not held: it is the one asked about.
        ours = np.asarray(start(rate)[0] == start(rate / 2.0)[0])
        start = functools.partial(_start_held, start, advance, given, ours)
    return QuadraticStep(layout, start, advance, optimizer_state is not None)


def _start_held(
    fresh: Callable[[Any], Memory],
    advance: Callable[..., Memory],
    given: Memory,
    ours: np.ndarray,
    rate: Any,
) -> Memory:
    """The memory from which an update ends in `given`, where the update multiplies its values.

    Adam's second moment decays before it is used: to be used as given, it must start higher.
    """
    vector = jnp.where(ours, given[0], fresh(rate)[0])
    after = advance(rate, (vector, given[1]), 0.0)[0]
    ratio = jnp.where(after == 0.0, 1.0, vector / jnp.where(after == 0.0, 1.0, after))
    return vector * ratio, given[1]


def _delays_by_itself(tree: Any) -> bool:
    """Whether it holds the state of `delayed` or `delay_gradients`."""
    names = ("DelayedState", "DelayGradientsState")

    def is_delay(node: Any) -> bool:
        return type(node).__name__ in names

    return any(is_delay(node) for node in jax.tree.leaves(tree, is_leaf=is_delay))


def _match(given: optax.OptState, expected: optax.OptState) -> optax.OptState:
    """`given` with the dtypes of `expected`, if it has its structure and shapes."""
    if str(jax.tree.structure(given)) != str(jax.tree.structure(expected)):
        raise ValueError(
            "optimizer_state has another structure than the state of make_optimizer(...) for a "
            "scalar parameter: start from make_optimizer(learning_rate).init(jnp.zeros(()))"
        )
    pairs = zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True)
    for shape, wanted in ((jnp.shape(leaf), jnp.shape(like)) for leaf, like in pairs):
        if shape != wanted:
            raise ValueError(
                f"optimizer_state has a leaf of shape {shape}, not {wanted}: "
                "it must be the state of a scalar parameter"
            )
    return jax.tree.map(_like, given, expected)


def _at_minimum(optimizer: Any) -> tuple[jax.Array, optax.OptState]:
    """The parameter and a new optimizer state."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(f"make_optimizer must return an optax optimizer, got {optimizer!r}")
    return jnp.zeros(()), optimizer.init(jnp.zeros(()))


def is_float(leaf: Any) -> bool:
    """Whether an array, or its shape and dtype, is floating point."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _like(leaf: Any, reference: Any) -> jax.Array:
    leaf, dtype = jnp.asarray(leaf), jnp.asarray(reference).dtype
    return leaf if leaf.dtype == dtype else leaf.astype(dtype)


def run_user_code(function: Callable[[], Any]) -> Any:
    """Calls the function; whatever an optimizer raises in it becomes one line."""
    try:
        return function()
    except ValueError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            "the optimizer cannot make a train step with a scalar parameter by "
            f"update(gradient, state, params): {reason}"
        ) from error
