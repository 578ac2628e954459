"""Whether the Jacobians of a train step describe it, and from where on they repeat.

A step that is linear near the minimum agrees with its Jacobian for finite noise too, which is
checked; one that is not is refused with what was found when the remedy was tried. A step with rings
or schedules in its state is followed until it repeats.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asgd_jax.stability.quadratic_step import Memory, QuadraticStep
from asgd_jax.stability.step_jacobian import PROBES, RANDOM_DELAYS, StepJacobian, Stretch

_WARM_UP = 16  # updates that fill a state
_LARGEST_PROBE, _LARGEST_HELD_PROBE = 1e-3, 1e-6
_NONLINEAR = 1e-4  # relative deviation that rounding does not explain
_LONGEST_WAIT = 2**16  # updates in which bias corrections and warm-ups must fade
_SETTLED, _SETTLED_AT = 1e-9, 0.1  # relative change in a period; around an update that was named
_MOST_REPEATS = 8  # stretches in a period: a schedule may have one of its own


class PeriodicStep(NamedTuple):
    """A train step that repeats with the period of `repeats` stretches, from update `start` on."""

    jacobian: StepJacobian
    start: int
    repeats: int

    def jacobians(self, rate: float) -> np.ndarray:
        """Those of one period, shape (T, num_alternatives, n, n + 1): the noise comes last."""
        starts = (self.start + k * self.jacobian.num_steps for k in range(self.repeats))
        stretches = [self.jacobian.run(rate, start, 0.0).jacobians for start in starts]
        return np.concatenate(stretches)


class _Fault(NamedTuple):
    """Why a step is not linear, and whether it is because x moves by itself."""

    reason: str
    drifts: bool = False


def settle(jacobian: StepJacobian, rate: float, at_update: int | None) -> PeriodicStep:
    """Checks that the step is linear, and waits until it is periodic.

    Args:
      jacobian: the linearised train step.
      rate: a learning rate to try. Where x explodes, a smaller one is taken, because the probes
        would grow to gradients that may be clipped.
      at_update: where to read the state, or None for wherever it settles.

    Raises:
      ValueError: when the step is not linear or does not settle.
    """
    first = max(jacobian.ramp, at_update or 0)
    for _ in range(300):
        predicted = _respond(jacobian, jacobian.run(rate, first, 0.0))
        if not jacobian.step.sharpness * abs(predicted).max() > 10.0:
            break
        rate /= 4.0
    probe = _LARGEST_HELD_PROBE if jacobian.step.held else _LARGEST_PROBE
    fault = _fault(jacobian, rate, first, probe)
    if fault is not None:
        raise ValueError(f"the optimizer {fault.reason}: {_remedy(jacobian, rate, first, fault)}")
    if at_update is not None:
        return _periodic(jacobian, rate, [first], _SETTLED_AT)
    octaves = max(1, math.ceil(math.log2(_LONGEST_WAIT / first)))
    return _periodic(jacobian, rate, [first << k for k in range(0, octaves + 1, 2)], _SETTLED)


def _fault(jacobian: StepJacobian, rate: float, first: int, probe: float) -> _Fault | None:
    """What is wrong unless noise of up to `probe` acts as the Jacobian says."""
    predicted = _respond(jacobian, jacobian.run(rate, first, 0.0))
    if not np.isfinite(predicted).all():
        return _Fault("is not linear near a minimum (its Jacobian is not finite)")
    stretch = jacobian.run(rate, first, probe)
    if stretch.drifts:
        return _Fault("moves the parameter without any gradient", drifts=True)
    if stretch.hidden:
        raise ValueError(
            "the optimizer keeps values in integers (a half-precision history, quantised state), "
            "which have no Jacobian: use full precision here"
        )
    found = stretch.deviations / (probe * PROBES)
    error = abs(found - predicted[:, None]).max()
    scale = max(abs(predicted).max(), abs(found).max())
    if error <= max(_NONLINEAR, 8.0 * jacobian.precision) * scale:
        return None
    return _Fault(
        f"is not linear near a minimum (gradients of {probe:g} and less move the parameter "
        f"otherwise than its Jacobian says, by {100 * error / scale:.3g}%)"
    )


def _remedy(jacobian: StepJacobian, rate: float, first: int, fault: _Fault) -> str:
    """What helps, tried before it is named."""
    step, names = jacobian.step, jacobian.step.layout.names
    warm = _warm_up(step, rate)
    given = np.asarray(jacobian.start(rate)[0])
    if step.held and fault.drifts and (moving := _names(names, warm.momenta & (given != 0.0))):
        return f"set its momenta in optimizer_state= to zero, here {moving}"
    held = _names(names, warm.preconditioner)
    trial = jacobian.held_at(warm.memory) if held else jacobian
    left = _fault(trial, rate, first, _LARGEST_HELD_PROBE)
    if left is not None and left.drifts:
        return "leave out what adds noise"
    if left is not None:
        return (
            "nor is it while its state is held (optimizer_state=), because it uses a sign, a norm "
            "or a ratio of gradients or parameters: leave that part out and ask about the rest"
        )
    if not held:
        return "smaller ones do not; leave out the clipping, which is not active near a minimum"
    if step.held:
        zero = _names(names, ~warm.momenta & (given == 0.0) & np.asarray(warm.memory[0] != 0.0))
        return f"{zero or held} in optimizer_state= must not be {'zero' if zero else 'so small'}"
    momenta = _names(names, warm.momenta)
    return f"pass optimizer_state=, a warmed-up state for one parameter, to hold {held} fixed" + (
        f", with {momenta} set to zero" if momenta else ""
    )


class _WarmState(NamedTuple):
    """What gradients of order 1 leave in a state.

    Attributes:
      memory: with its momenta at zero.
      momenta: of each value, whether it is affine in the gradients and moves the parameter.
      preconditioner: whether it depends on the gradients otherwise, as a second moment does.
    """

    memory: Memory
    momenta: np.ndarray
    preconditioner: np.ndarray


def _warm_up(step: QuadraticStep, rate: float) -> _WarmState:
    """Fills the state by gradients, their opposites and none; the parameter is kept at zero."""

    def after(sign: Any) -> Memory:
        def update(k: int, memory: Memory) -> Memory:
            vector, others = step.advance(rate, memory, sign * jnp.cos(1.0 + 2.0 * k))
            return jnp.where(is_parameter, 0.0, vector), others

        return jax.lax.fori_loop(0, _WARM_UP, update, step.fresh(rate))

    def after_each(signs: jax.Array) -> Memory:
        vectors, others = jax.vmap(after)(signs)
        return vectors, [leaf[0] for leaf in others]

    is_parameter = np.array([name == "" for name in step.layout.names])
    ends, others = jax.jit(after_each)(jnp.array([1.0, 0.0, -1.0]))
    up, still, down = np.asarray(ends)
    moved = up != still
    middle = np.where(np.isfinite(still), 2.0 * still, 0.0)  # without gradients some divide by 0
    affine = moved & np.isclose(up + down, middle, rtol=1e-9, atol=1e-9 * abs(up).max())
    # One at a time: what does not move x must stay, others divide by it (Prodigy's grad_sum).
    each = np.where(affine & ~np.eye(up.size, dtype=bool), 0.0, up)
    new = jax.vmap(lambda row: step.advance(rate, (row, others), 0.0)[0])
    moving = np.asarray(jax.jit(new)(each))[:, 0] != 0.0
    momenta = affine & moving
    memory = jnp.asarray(np.where(momenta, 0.0, up)), others
    return _WarmState(memory, momenta, moved & ~affine & ~is_parameter)


def _names(names: list[str], which: np.ndarray) -> str:
    found = dict.fromkeys(name for name, chosen in zip(names, which, strict=True) if chosen)
    return ", ".join(name for name in found if name)


def _respond(jacobian: StepJacobian, stretch: Stretch) -> np.ndarray:
    """By how much unit noise, and x starting at 1 / a, change x, to first order."""
    if not np.isfinite(stretch.jacobians).all():
        return np.array([np.nan])
    memory = np.eye(stretch.jacobians.shape[2])[0] / jacobian.step.sharpness
    response = []
    for jacobians, kick in zip(stretch.jacobians, jacobian.noise, strict=True):
        memory = jacobian.weights @ (jacobians @ np.append(memory, kick))
        response.append(memory[0])
    return np.array(response)


def _periodic(
    jacobian: StepJacobian, rate: float, starts: list[int], tolerance: float
) -> PeriodicStep:
    """From the first of the starts from which the step repeats with a period."""
    num_steps = jacobian.num_steps
    for start in starts:
        stretches: list[np.ndarray] = []
        for repeats in range(1, _MOST_REPEATS + 1):
            for k in range(len(stretches), 2 * repeats):
                stretches.append(jacobian.run(rate, start + k * num_steps, 0.0).jacobians)
            pairs = zip(stretches[:-repeats], stretches[repeats:], strict=True)
            if all(_close(a, b, tolerance) for a, b in pairs):
                return PeriodicStep(jacobian, start, repeats)
    raise ValueError(
        f"the train step still changes after {starts[-1]} updates, with no period of up to "
        f"{_MOST_REPEATS * num_steps}: give a schedule that ends, or at_update=, the update around "
        f"which to take it as constant; {RANDOM_DELAYS}"
    )


def _close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    """Entry by entry: parameters and momenta may have very different units."""
    return bool((abs(a - b) <= tolerance * np.maximum(abs(a), abs(b))).all())
