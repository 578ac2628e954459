r"""The dominant root of the characteristic equation of a constant delay, whatever its size.

With $z = e^\lambda$ the equation of either momentum is, for n = 1 (heavy ball) or $n = \tau + 1$
(shifted),

$$e^{\tau\lambda} (e^\lambda - 1)(1 - m e^{-n\lambda}) = -g h.$$

As h grows from 0, the root that starts at z = 1 meets the real root below it and they leave the
real axis as a pair of angle $\phi \in (0, \pi/(\tau+1))$. No root has a smaller angle, and on every
circle the modulus of the left side grows with the angle, so no root has a larger modulus. On this
branch the modulus is a function of the angle, and h grows with it: one bracketed search.
"""

import cmath
import math

from scipy.special import expm1

from asgd_jax.stability.arguments import Momentum
from asgd_jax.stability.root_finding import bracketed_root, increasing_root

# Of (tau + 1) phi: nearer to the collision of two real roots than float64 sees.
_SMALLEST_ANGLE = 1e-7


def dominant_exponent(delay: int, step: float, momentum: Momentum) -> complex:
    """Logarithm of the root of largest modulus; its real part is the growth rate a step.

    Args:
      delay: constant delay >= 0; the work does not depend on it.
      step: h = learning rate x sharpness >= 0.
      momentum: checked momentum.

    Returns:
      lambda with imaginary part in [0, pi]; real part -inf where every root is 0.

    >>> from asgd_jax.stability.arguments import as_momentum
    >>> dominant_exponent(0, 3.0, as_momentum(0.0, "heavy_ball", True)).real == math.log(2.0)
    True
    """
    force = momentum.gain * step
    if force == 0.0:
        return 0j
    if delay == 0:
        return _undelayed(force, momentum.value)
    m, n = momentum.value, delay + 1 if momentum.shifted else 1
    collision = _collision(delay, m, n)
    if math.log(force) <= _log_force(delay, m, n, collision):
        guess = complex(_real_exponent(delay, m, n, collision, force))
    else:
        guess = _complex_exponent(delay, m, n, force)
    return _polish(delay, m, n, force, guess)


def _undelayed(force: float, m: float) -> complex:
    """The larger root of z^2 - (1 + m - force) z + m, by whichever form does not cancel."""
    half = (1.0 + m - force) / 2.0
    total = 1.0 - m + force  # of the distances 1 - z of the two roots, whose product is `force`
    if half > 0.0 and total * total >= 4.0 * force:
        return complex(math.log1p(-2.0 * force / (total + math.sqrt(total * total - 4.0 * force))))
    if half * half < m:
        return complex(math.log(m) / 2.0, math.acos(half / math.sqrt(m)))
    root = half - math.sqrt(half * half - m)
    return complex(math.log(-root), math.pi) if root else complex(-math.inf)


def _log_force(delay: int, m: float, n: int, x: float) -> float:
    """log(g h) of the real root e^x, for x in (log(m) / n, 0)."""
    rest = -math.expm1(x) * (1.0 - m * math.exp(-n * x))
    return delay * x + math.log(rest) if rest > 0.0 else -math.inf


def _collision(delay: int, m: float, n: int) -> float:
    """Logarithm of the double root where the real roots meet.

    `_log_force` is a sum of concave functions of x, so its maximum is the only zero of its slope.
    """
    lowest = -math.log1p(1.0 / delay)
    if m == 0.0:
        return lowest

    def slope(x: float) -> float:
        gap, rest = -math.expm1(x), math.exp(n * x) - m
        return delay * gap * rest - math.exp(x) * rest + n * m * gap

    lowest = max(lowest, math.log(m) / n)
    # Without momentum the maximum would lie at the first of the two ends; momentum moves it up.
    if slope(lowest) <= 0.0:
        return lowest
    return bracketed_root(slope, lowest, 0.0, xtol=1e-16 / n)


def _real_exponent(delay: int, m: float, n: int, collision: float, force: float) -> float:
    """The larger real root below 1. `_log_force` <= log(-x (1 - m)) gives the upper end."""
    target = math.log(force)
    highest = -force / (1.0 - m)
    if collision >= highest or _log_force(delay, m, n, highest) >= target:
        return highest
    return bracketed_root(
        lambda x: _log_force(delay, m, n, x) - target, collision, highest, xtol=1e-14 * -highest
    )


def _complex_exponent(delay: int, m: float, n: int, force: float) -> complex:
    """The root of the pair with positive angle, found by its angle."""
    target = math.log(force)
    log_modulus = _shifted_modulus if n > 1 else _heavy_ball_modulus

    def at(theta: float) -> complex:
        phi = theta / (delay + 1)
        return complex(log_modulus(delay, m, phi, theta), phi)

    def excess(theta: float) -> float:
        exponent = at(theta)
        rest = abs(expm1(exponent)) * abs(1.0 - m * cmath.exp(-n * exponent))
        return delay * exponent.real + math.log(rest) - target

    low, high = _SMALLEST_ANGLE, math.pi * (1.0 - 1e-15)
    if excess(low) >= 0.0:
        return at(low)
    if excess(high) <= 0.0:
        return at(high)
    return at(bracketed_root(excess, low, high, xtol=1e-13))


def _heavy_ball_modulus(delay: int, m: float, phi: float, theta: float) -> float:
    r"""log|z| at angle phi: the imaginary part of the equation is quadratic in the modulus.

    $\sin((\tau+1)\phi) \sin((\tau-1)\phi) = \sin^2\tau\phi - \sin^2\phi$ takes the cancellation out
    of its discriminant.
    """
    sine = math.sin(theta - phi)
    root = math.hypot((1.0 - m) * sine, 2.0 * math.sqrt(m) * math.sin(phi))
    return math.log(((1.0 + m) * sine + root) / (2.0 * math.sin(theta)))


def _shifted_modulus(delay: int, m: float, phi: float, theta: float) -> float:
    """log|z| at angle phi: the imaginary part of the equation grows with the modulus."""
    sines = math.sin(theta), math.sin(theta - phi), m * math.sin(phi)

    def imaginary(u: float) -> float:
        return math.exp(u / (delay + 1)) * sines[0] - sines[1] - sines[2] * math.exp(-u)

    return increasing_root(imaginary, 1.0, xtol=1e-14) / (delay + 1)


def _polish(delay: int, m: float, n: int, force: float, guess: complex) -> complex:
    """Newton steps on the logarithm of the equation: relative accuracy at any delay.

    Each is kept only if it makes the residual smaller.
    """
    target = math.log(force)

    def residual(exponent: complex) -> complex:
        rest = complex(expm1(exponent)) * (1.0 - m * cmath.exp(-n * exponent))
        value = delay * exponent + cmath.log(rest) - target - 1j * math.pi
        # Any multiple of 2 pi i is the same equation.
        return complex(value.real, math.remainder(value.imag, 2.0 * math.pi))

    error = residual(guess)
    for _ in range(6):
        decay = m * cmath.exp(-n * guess)
        slope = delay - 1.0 / complex(expm1(-guess)) + n * decay / (1.0 - decay)
        if error == 0 or slope == 0:
            break
        proposal = guess - error / slope
        if proposal == 0 or abs(proposal - guess) > 0.5 * abs(guess):
            break
        new_error = residual(proposal)
        if not abs(new_error) < abs(error):
            break
        guess, error = proposal, new_error
    return guess if guess.imag >= 0.0 else guess.conjugate()
