"""One implemented train step on the quadratic a x^2 / 2, as a function of a vector.

The vector holds the parameter and every floating-point value of the optimizer's state; counters,
random keys and the like come beside it and move on by themselves. For a wrapper that keeps its own
copy of the parameters (`optax.lookahead`) x is the one whose gradient is taken.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from asgd_jax.transforms import delayed, update_params
from asgd_jax.transforms.history import read_slot

MakeOptimizer = Callable[[Any], optax.GradientTransformation]
Memory = tuple[jax.Array, list[jax.Array]]  # floating-point values, and all others


_MISSING = re.compile(r"missing \d+ required keyword-only arguments?: (.*)")


class Layout(NamedTuple):
    """How a parameter and an optimizer state lie in a memory.

    Rings lie there by age, as if they began anew at every update: the map from one memory to the
    next then repeats with the period of the optimizer, not with that of the rings' slots.

    Attributes:
      structure: of the pair of both.
      leaves: shapes and dtypes.
      names: of the leaf that each floating-point value belongs to, as a path in the state that
        `make_optimizer(...).init` returns; empty for parameters and a history of them.
      counters: which of all other leaves are integers in that state.
    """

    structure: Any
    leaves: list[jax.ShapeDtypeStruct]
    names: list[str]
    counters: list[int]

    def pack(self, tree: Any) -> Memory:
        """The parameter comes first."""
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(_turn_rings(tree, -1))]
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
        return _turn_rings(jax.tree.unflatten(self.structure, leaves), 1)


# The counter by which each kind of state finds the slots of its ring.
_RINGS = {
    "DelayedState": ("num_updates", "history"),
    "ShiftedTraceState": ("num_pushes", "buffers"),
    "DelayGradientsState": ("num_gradients", "gradients"),
}


def _turn_rings(tree: Any, sign: int) -> Any:
    """Moves slot `sign` x counter of every ring to index 0."""

    def turn(node: Any) -> Any:
        if type(node).__name__ not in _RINGS:
            return node
        counter, field = _RINGS[type(node).__name__]
        inner = {k: _turn_rings(v, sign) for k, v in node._asdict().items() if k != field}
        shift = sign * getattr(node, counter)
        ring = jax.tree.map(lambda slots: jnp.roll(slots, shift, axis=0), getattr(node, field))
        return node._replace(**inner, **{field: ring})

    return jax.tree.map(turn, tree, is_leaf=lambda node: type(node).__name__ in _RINGS)


class QuadraticStep(NamedTuple):
    """A train step on the quadratic.

    Attributes:
      sharpness: a.
      layout: of its memory.
      fresh: `fresh(learning_rate) -> Memory` at the minimum, as the optimizer's `init` makes it.
      start: where the updates begin: `fresh`, or a state that is held.
      advance: `advance(learning_rate, memory, noise, staleness=None) -> Memory`, one update with
        the gradient a x_stale + noise; an int32 `staleness` overrules the optimizer's delay.
      held: whether the floating-point values that `start` returns are to be put back after every
        update.
    """

    sharpness: float
    layout: Layout
    fresh: Callable[[Any], Memory]
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
    extra_args: Mapping[str, Any],
) -> QuadraticStep:
    """Builds the train step; call it, and what it returns, inside `float64()`.

    Args:
      make_optimizer: learning rate -> the server's optimizer. It is wrapped in `delayed`, unless
        its state shows that it delays by itself.
      delay: checked delay: an int, or the mass function of random delays.
      sharpness: > 0.
      optimizer_state: state of `make_optimizer(...)` for a scalar parameter, or None.
      extra_args: keyword arguments for every `update`.

    Raises:
      ValueError: when the optimizer does not run, would delay twice, or has other states.
    """
    rate = 1.0 / sharpness
    zero, wrapped = _parameter_of(make_optimizer, rate, extra_args, delay)
    # Random staleness is set from outside, update by update; only the size of the history counts.
    longest = delay if isinstance(delay, int) else delay.size - 1

    def make(rate: Any) -> optax.GradientTransformationExtraArgs:
        inner = make_optimizer(rate)
        return delayed(inner, longest) if wrapped else optax.with_extra_args_support(inner)

    def at_minimum(rate: Any) -> tuple[Any, optax.OptState]:
        return zero, make(rate).init(zero)

    shapes = jax.eval_shape(lambda: at_minimum(rate))
    layout = _layout(shapes, "[1].inner_state" if wrapped else "[1]")
    histories = _nodes(shapes[1], "DelayedState")
    # Inside lookahead, `delayed` knows the fast parameters only.
    inside = any(_nodes(node, "LookaheadState") for node in histories)

    def start(rate: Any) -> Memory:
        return layout.pack(at_minimum(rate))

    def advance(
        rate: Any, memory: Memory, noise: Any, staleness: jax.Array | None = None
    ) -> Memory:
        params, state = layout.unpack(memory)
        if staleness is not None:
            past = read_slot(state.history, state.num_updates - staleness, params)
            state = state._replace(staleness=staleness, stale=past)
        params, state, _ = update_params(
            make(rate),
            lambda where: (sharpness * jax.tree.leaves(where)[0] + noise, None),
            params,
            state,
            live=params if inside else jax.tree.leaves(params)[0],
            **extra_args,
        )
        vector, others = layout.pack((params, state))
        # In a loop the dtypes must stay.
        return vector, [_like(new, old) for new, old in zip(others, memory[1], strict=True)]

    run_user_code(lambda: jax.eval_shape(lambda: advance(rate, start(rate), 0.0)), extra_args)
    step = QuadraticStep(sharpness, layout, start, start, advance, held=False)
    if optimizer_state is None:
        return step
    params, state = at_minimum(rate)
    given = _match(optimizer_state, state.inner_state if wrapped else state, zero)
    return hold(
        step, layout.pack((params, state._replace(inner_state=given) if wrapped else given))
    )


def _parameter_of(
    make_optimizer: MakeOptimizer, rate: float, extra_args: Mapping[str, Any], delay: Any
) -> tuple[Any, bool]:
    """The parameter at 0 that an optimizer takes, and whether it is to be wrapped in `delayed`."""
    if not callable(make_optimizer):
        raise ValueError(
            f"make_optimizer must be a function of the learning rate, got {make_optimizer!r}: "
            "pass for instance optax.sgd or lambda learning_rate: optax.sgd(learning_rate, 0.9)"
        )
    bare = run_user_code(lambda: make_optimizer(rate))
    if not (hasattr(bare, "init") and hasattr(bare, "update")):
        raise ValueError(f"make_optimizer must return an optax optimizer, got {bare!r}")
    zero = _zero_parameter(bare, extra_args)
    shapes = jax.eval_shape(bare.init, zero)
    wrapped = not _nodes(shapes, "DelayedState", "DelayGradientsState")
    if not wrapped and not (isinstance(delay, int) and delay == 0):
        raise ValueError(
            "make_optimizer returns an optimizer that already delays its gradients: pass delay=0 "
            "to use it as it is, or the optimizer without delayed / delay_gradients"
        )
    return zero, wrapped


def hold(step: QuadraticStep, given: Memory) -> QuadraticStep:
    """The step whose every update ends in the given values, before it is linearised there."""
    # A learning rate in the state (inject_hyperparams) is not held: it is the one asked about.
    ours = np.asarray(step.fresh(1.0)[0]) == np.asarray(step.fresh(0.5)[0])

    def start(rate: Any) -> Memory:
        # Where the update multiplies its values they must start higher: Adam's second moment decays
        # before it is used, and is to be used as given.
        vector = jnp.where(ours, given[0], step.fresh(rate)[0])
        after = step.advance(rate, (vector, given[1]), 0.0)[0]
        ratio = jnp.where(after == 0.0, 1.0, vector / jnp.where(after == 0.0, 1.0, after))
        return vector * ratio, given[1]

    return step._replace(start=start, held=True)


def _nodes(tree: Any, *names: str) -> list[Any]:
    """Its outermost nodes of classes with these names."""

    def is_named(node: Any) -> bool:
        return type(node).__name__ in names

    return [node for node in jax.tree.leaves(tree, is_leaf=is_named) if is_named(node)]


def _zero_parameter(optimizer: Any, extra_args: Mapping[str, Any]) -> Any:
    """A scalar, or the least that the optimizer takes in its place."""
    pair = optax.LookaheadParams.init_synced(jnp.zeros(()))
    # Most optimizers take a pair for two parameters, so the state must say that it is none; and
    # those that do not take it at all are not meant for it.
    with contextlib.suppress(Exception):
        if _nodes(jax.eval_shape(optimizer.init, pair), "LookaheadState"):
            return pair
    update = optax.with_extra_args_support(optimizer).update

    def runs(zero: jax.Array) -> bool:
        with contextlib.suppress(Exception):
            jax.eval_shape(lambda: update(zero, optimizer.init(zero), zero, **extra_args))
            return True
        return False

    scalar, vector = jnp.zeros(()), jnp.zeros(1)
    return vector if not runs(scalar) and runs(vector) else scalar  # sm3 has a sum for each axis


def _layout(shapes: Any, prefix: str) -> Layout:
    """The layout of a parameter and a state; what the optimizer itself keeps is at `prefix`."""
    paths, structure = jax.tree_util.tree_flatten_with_path(shapes)
    leaves = [leaf for _, leaf in paths]
    texts = [jax.tree_util.keystr(path) for path, _ in paths]
    names = [
        (name.removeprefix(prefix) or "the whole state") if name.startswith(prefix) else ""
        for name in texts
    ]
    each = [
        name
        for name, leaf in zip(names, leaves, strict=True)
        if is_float(leaf)
        for _ in range(math.prod(leaf.shape))
    ]
    others = [(name, leaf) for name, leaf in zip(names, leaves, strict=True) if not is_float(leaf)]
    counters = [
        k
        for k, (name, leaf) in enumerate(others)
        if name and leaf.shape == () and jnp.issubdtype(leaf.dtype, jnp.integer)
    ]
    return Layout(structure, leaves, each, counters)


def _match(given: optax.OptState, expected: optax.OptState, zero: Any) -> optax.OptState:
    """`given` with the dtypes of `expected`, if it has its structure and shapes."""
    if str(jax.tree.structure(given)) != str(jax.tree.structure(expected)):
        raise ValueError(
            "optimizer_state has another structure than the state of make_optimizer(...) for a "
            f"scalar parameter: start from make_optimizer(learning_rate).init({_literal(zero)})"
        )
    pairs = zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True)
    for shape, wanted in ((jnp.shape(leaf), jnp.shape(like)) for leaf, like in pairs):
        if shape != wanted:
            raise ValueError(
                f"optimizer_state has a leaf of shape {shape}, not {wanted}: it must be the state "
                f"of one parameter, make_optimizer(learning_rate).init({_literal(zero)})"
            )
    return jax.tree.map(_like, given, expected)


def _literal(zero: Any) -> str:
    if isinstance(zero, optax.LookaheadParams):
        return "optax.LookaheadParams.init_synced(jnp.zeros(()))"
    return f"jnp.zeros({zero.shape})"


def is_float(leaf: Any) -> bool:
    """Whether an array, or its shape and dtype, is floating point."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _like(leaf: Any, reference: Any) -> jax.Array:
    leaf, dtype = jnp.asarray(leaf), jnp.asarray(reference).dtype
    return leaf if leaf.dtype == dtype else leaf.astype(dtype)


def jit_over_rate(function: Callable[..., Any], *rest: Any) -> Callable[..., Any]:
    """Compiled once if make_optimizer takes a traced learning rate, the first argument; else anew
    for each rate.
    """
    traced, concrete = jax.jit(function), jax.jit(function, static_argnums=0)
    try:
        traced.lower(1.0, *rest)
    except jax.errors.JAXTypeError:
        concrete.lower(1.0, *rest)
        return concrete
    return traced


def run_user_code(function: Callable[[], Any], extra_args: Mapping[str, Any] = {}) -> Any:
    """Calls the function; whatever an optimizer raises in it becomes one line."""
    try:
        return function()
    except Exception as error:
        raise ValueError(_explain(error, extra_args)) from error


def _explain(error: Exception, extra_args: Mapping[str, Any]) -> str:
    if missing := _MISSING.search(str(error)):
        needs = f"the optimizer's update needs {missing[1]}"
        if "'grad'" in missing[1]:
            return f"{needs} for a line search, which is not linear: leave that out"
        if any(repr(name) in missing[1] for name in extra_args):
            return f"{needs}, which a wrapper around it does not hand on from extra_args="
        return f"{needs}: pass extra_args=, a mapping from its name to what it is at the minimum"
    if isinstance(error, jax.errors.JAXTypeError):
        return (
            "the optimizer's update cannot be compiled by jax.jit: it must not branch on values of "
            f"its arguments ({type(error).__name__})"
        )
    cannot = "the optimizer cannot update one scalar parameter by update(gradient, state, params)"
    if isinstance(error, ValueError) and str(error):  # written for the optimizer's user
        return f"{cannot} (extra_args= hands it more): {str(error).splitlines()[0]}"
    return f"{cannot}, it raises {type(error).__name__}"
