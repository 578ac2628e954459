r"""The largest stable learning rate of any optimizer that is linear near a minimum.

One train step on the quadratic $a x^2 / 2$ maps the parameter and the optimizer's state linearly to
the next. The state that counts updates (a ring of past parameters) makes the map depend on the
update, with a period T, so the minimum is stable when the map of one period, a product of T
Jacobians, has no eigenvalue outside the unit disc.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypedDict, Unpack

import numpy as np
import optax

from asgd_jax.delays import DelayProcess, as_integer, categorical
from asgd_jax.stability.arguments import (
    OPTIMIZER_CRITERIA,
    Delay,
    OptimizerCriterion,
    as_delay,
    choose,
    positive,
)
from asgd_jax.stability.lyapunov import draw_staleness
from asgd_jax.stability.product_growth import log_growth
from asgd_jax.stability.quadratic_step import MakeOptimizer, float64, quadratic_step
from asgd_jax.stability.root_finding import first_root
from asgd_jax.stability.settle import settle
from asgd_jax.stability.step_jacobian import step_jacobian

_MARGIN = 1e-11  # growth a step that rounding of the eigenvalues can produce
_STEPS_PER_OCTAVE = 4
_MOST_OCTAVES = 60  # to either side of 1 / sharpness
_NOT_CONSTANT = {"grad", "staleness", "stale_params"}


class OptimizerOptions(TypedDict, total=False):
    """How the optimizer is read, as `optimizer_max_learning_rate` documents it."""

    optimizer_state: optax.OptState | None
    extra_args: Mapping[str, Any]
    at_update: int | None
    criterion: OptimizerCriterion
    num_steps: int | None
    seed: int


def optimizer_max_learning_rate(
    make_optimizer: MakeOptimizer,
    delay: Delay,
    *,
    sharpness: float = 1.0,
    **options: Unpack[OptimizerOptions],
) -> float:
    r"""The largest learning rate at which an optimizer keeps a minimum stable under delay.

    With z the parameter and all floating-point state, and $J_n$ the Jacobian of the implemented
    train step on the quadratic $a x^2 / 2$,

    $$\rho(\eta) = \rho(J_{n+T} \cdots J_{n+1})^{1/T}, \qquad
      \eta_{max} = \sup \{\eta : \rho(\eta') \le 1 \text{ for all } \eta' \le \eta\},$$

    where T is the period of what the state counts (1 unless gradients are accumulated or the like),
    and of all directions only those are counted that the gradient excites and that act on x. With
    random staleness each $J_n$ is averaged over it, which gives the growth of E[z]; the other
    criteria take the growth of $\sqrt{E[z^2]}$, or of |z| along a sequence of staleness. The
    optimizer is handed the `staleness` of every gradient, so that the methods of
    `asgd_jax.compensate` are what they are in training; for `drop_stale=limit` pass
    `delays.below(process, limit)`. The first crossing is bracketed on a grid of four rates an
    octave and closed to about 1e-8 of it; a narrower window of instability would go unnoticed.

    *Linear near a minimum* (which is at x = 0) are SGD, every momentum, averaging, `lookahead`,
    weight decay, clipping while it is inactive (gradients of up to 1e-3 are tried), and their
    chains. Adam, RMSProp and the like divide by the size of the gradient and are refused. What can
    be asked about them is how they move while their preconditioner stands still: pass an
    `optimizer_state`. All its floating-point values are held, so that every update ends in them,
    and the step is linearised there. For many parameters, with D the preconditioner (for Adam
    diag(sqrt(nu) + eps)), the sharpness that counts is the largest eigenvalue of
    $D^{-1/2} H D^{-1/2}$: pass that one, with a state of D = 1. Adagrad is linear while its
    accumulator is much larger than the squared gradients, and is then taken as `init` makes it.
    Nothing of the kind helps methods that take a sign (sign_sgd, signum, lion, rprop), a trust
    ratio (lars, lamb, fromage), a norm or a line search (lbfgs): they are not linear at all.

    *Gradient accumulation.* `MultiSteps(sgd, 4)` with delay=4 counts the delay in calls, which is
    one update: h < 1. `MultiSteps(delayed(sgd, 4), 4)`, with delay=0, counts it in updates, and has
    the threshold of SGD at a delay of 4, h < 0.3473.

    Args:
      make_optimizer: `make_optimizer(learning_rate)` returns the *server's* optax optimizer, for
        instance `functools.partial(optax.sgd, momentum=0.9)`. It is called with a traced float64
        scalar where it allows that; otherwise everything is compiled anew for each of the about
        twenty rates. The optimizer is wrapped in `delayed` here. One whose state shows that it
        delays by itself (`delayed` with a constant delay, `delay_gradients`) is used as it is; it
        needs delay=0.
      delay: int >= 0; or a mass function of shape (max_delay + 1,), for staleness drawn afresh at
        every update; or a DelayProcess, with a pmf unless the criterion is "lyapunov". A delay of
        128 takes two seconds.
      sharpness: largest eigenvalue of the Hessian, > 0.
      **options: all by keyword:
      optimizer_state: a state of `make_optimizer(...)` for one scalar parameter (one of shape (1,)
        for sm3); None for the state that `init` and updates with zero gradients give. Its momenta
        must be zero; a learning rate in it (`inject_hyperparams`) is replaced by the one that is
        tried.
      extra_args: a mapping of keyword arguments that every `update` gets as they are: what does not
        change near the minimum, for instance the loss there, {"value": 0.5}, for polyak_sgd, momo
        or reduce_on_plateau, and {"obj_fn": lambda x: sharpness * x**2 / 2} for sophia.
      at_update: update around which schedules and bias corrections are read, if they change by
        less than 10 % in a period there; by default as many updates on as it takes them to settle
        (65,536 at most). Never before the start-up ramp is over.
      criterion: "mean": E[x] stays bounded; "mean_square": E[x^2] does, the one to act on when
        delays are random (a second at a max_delay of 16, ten at 64); "lyapunov": a typical run
        does, log|z| neither growing nor shrinking along `num_steps` samples of the process, a
        recorded trace in its order. The samples are the same at every rate. A Monte-Carlo estimate,
        which another seed moves by what `lyapunov_max_learning_rate` states as its standard error:
        of 50,000 updates .6 % of the threshold for `uniform(1, 4)`, 1 % for `uniform(1, 16)`, .1 %
        for `discretized_normal(8)`. It falls as the root of `num_steps`.
      num_steps: of "lyapunov", >= 1000; by default 50,000, or 300 max_delay if that is longer.
      seed: of "lyapunov", of the samples; without effect on a trace.

    Returns:
      The learning rate, a float: what `make_optimizer` is to be called with.

    Raises:
      ValueError: naming the bad argument; for an optimizer that is not linear near a minimum (with
        what to hold, if it is linear then), that does not settle, needs `extra_args`, or has no
        threshold; for a process without a distribution unless the criterion is "lyapunov".

    >>> round(optimizer_max_learning_rate(optax.sgd, 4), 6)
    0.347296

    Adam, where the gradient of the parameter has been 0.01 in the root mean square:

    >>> import jax.numpy as jnp
    >>> state = optax.tree.set(optax.adam(1.0).init(jnp.zeros(())), nu=jnp.array(1e-4))
    >>> round(optimizer_max_learning_rate(optax.adam, 0, sharpness=20.0, optimizer_state=state), 6)
    0.019

    Gradients shrunk where they are older than there are workers, under staleness 1 to 4:

    >>> from asgd_jax import compensate, delays
    >>> def adaptive(rate):
    ...     return optax.chain(compensate.delay_adaptive(2), optax.sgd(rate))
    >>> for criterion in ("mean", "mean_square", "lyapunov"):
    ...     rate = optimizer_max_learning_rate(adaptive, delays.uniform(1, 4), criterion=criterion)
    ...     print(criterion, round(rate, 2))
    mean 0.89
    mean_square 0.74
    lyapunov 0.83

    References:
      Giladi, Nacson, Hoffer, Soudry, "At Stability's Edge", ICLR 2020 (SGD and momentum);
      Cohen et al., "Adaptive Gradient Methods at the Edge of Stability", arXiv:2207.14484
      (frozen preconditioners).
    """
    sharpness = positive(sharpness, "sharpness")
    with float64():
        growth = _growth_of(make_optimizer, delay, sharpness, 0.7 / sharpness, **options)
        return _first_crossing(growth, 1.0 / sharpness)


def optimizer_spectral_radius(
    make_optimizer: MakeOptimizer,
    delay: Delay,
    *,
    learning_rate: float,
    sharpness: float = 1.0,
    **options: Unpack[OptimizerOptions],
) -> float:
    r"""Factor by which an optimizer's distance to a minimum grows in one step, in the long run.

    $\rho(\eta)$ of `optimizer_max_learning_rate`; for "mean_square" the growth of
    $\sqrt{E[x^2]}$, for "lyapunov" that of |x| in a typical run.

    Args:
      learning_rate: > 0.
      make_optimizer, delay, sharpness, **options: as in `optimizer_max_learning_rate`.

    Returns:
      The factor, >= 0; above 1 the minimum is unstable.

    Raises:
      ValueError: as `optimizer_max_learning_rate` does.

    >>> nesterov = functools.partial(optax.sgd, momentum=0.9, nesterov=True)
    >>> round(optimizer_spectral_radius(nesterov, 2, learning_rate=0.1, sharpness=0.1), 6)
    0.954113
    """
    sharpness = positive(sharpness, "sharpness")
    rate = positive(learning_rate, "learning_rate")
    with float64():
        growth = _growth_of(make_optimizer, delay, sharpness, rate, **options)
        return math.exp(growth(rate))


def _growth_of(
    make_optimizer: MakeOptimizer,
    delay: Delay,
    sharpness: float,
    rate: float,
    *,
    optimizer_state: optax.OptState | None = None,
    extra_args: Mapping[str, Any] = MappingProxyType({}),
    at_update: int | None = None,
    criterion: OptimizerCriterion = "mean",
    num_steps: int | None = None,
    seed: int = 0,
) -> Callable[[float], float]:
    """Checks the arguments, and the optimizer at (or, if it explodes there, below) this rate.

    Returns:
      From learning rate to the logarithm of the growth in one update.
    """
    choose(criterion, OPTIMIZER_CRITERIA, "criterion")
    if at_update is not None:
        at_update = as_integer(at_update, "at_update")
    if not isinstance(extra_args, Mapping):
        raise ValueError(
            f"extra_args must be a mapping of names to arguments of update, got {extra_args!r}"
        )
    for name in _NOT_CONSTANT & extra_args.keys():
        raise ValueError(
            f"extra_args must not hold {name!r}, which differs from update to update: a line "
            "search is not linear, and staleness and stale_params are handed on by themselves"
        )
    if criterion == "lyapunov":
        where, sequence = _sampled(delay, num_steps, seed)
    else:
        where, sequence = as_delay(delay), None
    step = quadratic_step(make_optimizer, where, sharpness, optimizer_state, extra_args)
    jacobian = step_jacobian(step, where, average=criterion == "mean")
    settled = settle(jacobian, rate, at_update)
    return lambda rate: log_growth(settled.jacobians(rate), jacobian.weights, sequence)


def _sampled(
    delay: Delay, num_steps: int | None, seed: int
) -> tuple[int | np.ndarray, np.ndarray | None]:
    """The distribution of the staleness drawn, and which of its atoms each update takes."""
    if not isinstance(delay, DelayProcess):
        where = as_delay(delay)
        if isinstance(where, int):
            return where, None
        delay = categorical(where)
    staleness = draw_staleness(delay, num_steps, as_integer(seed, "seed"))
    sequence = np.unique(staleness, return_inverse=True)[1]
    return as_delay(np.bincount(staleness) / staleness.size), sequence


def _first_crossing(growth: Callable[[float], float], middle: float) -> float:
    """The end of the interval of stable learning rates that starts at 0."""

    @functools.cache
    def excess(rate: float) -> float:
        return growth(rate) - _MARGIN

    top = middle
    while excess(top) <= 0.0:
        top *= 2.0
        if top > 2.0**_MOST_OCTAVES * middle:
            raise ValueError(
                f"the optimizer is stable at every learning rate up to {top:.0e}: does "
                "make_optimizer use its argument, and is its schedule not at zero (at_update=, "
                "extra_args=)?"
            )
    bottom = top
    while not _proportional(excess(bottom), excess(bottom / 2.0)):
        bottom /= 2.0
        if bottom < 2.0**-_MOST_OCTAVES * middle:
            raise ValueError(
                f"the optimizer is unstable at every learning rate down to {bottom:.0e}: "
                "does it descend, and does make_optimizer use its argument?"
            )
    grid = (bottom * 2.0 ** (k / _STEPS_PER_OCTAVE) for k in itertools.count())
    crossing = first_root(excess, grid, rtol=1e-10)
    assert crossing is not None  # the optimizer is unstable at `top`
    return crossing


def _proportional(decay: float, half: float) -> bool:
    """Whether x decays at a rate proportional to the learning rate, as it does near 0."""
    return decay < 0.0 and half < 0.0 and abs(decay / half - 2.0) < 0.1
