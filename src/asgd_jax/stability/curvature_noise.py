r"""The mean-square edge of a constant delay under mini-batch noise of the curvature.

Every update meets the curvature of its own batch, $a (1 + \xi_n)$ with independent $\xi_n$ of mean
0 and variance c. In $x_{n+1} = x_n - h (1 + \xi_n) x_{n-\tau}$ the noise $-h \xi_n x_{n-\tau}$ is
white, so E[x^2] is bounded if and only if $c h^2 \gamma_0 < 1$, with $\gamma$ the autocovariance of
the autoregression of the mean driven by unit noise (`mean_square.py`). It obeys

$$\gamma_{j+1} - \gamma_j + h \gamma_{|j - \tau|} = 0 \quad (0 \le j), \qquad
2 h \gamma_\tau = h^2 \gamma_0 + 1.$$

The first is solved by $\gamma_j \propto \cos(j \omega + \vartheta)$ with $h = 2 \sin(\omega/2)$ and
$\vartheta = (\pi - (2\tau + 1)\omega)/4$, the second sets its size, and $c h^2 \gamma_0 = 1$ is

$$\tan \frac{\pi - (2\tau + 1)\omega}{4} = c \tan \frac{\omega}{2}, \qquad
h = 2 \sin\frac{\omega}{2}.$$

At c = 0 it is $\omega = \pi/(2\tau + 1)$, eq. 5; at $\tau = 0$ it is $h = 2/(1 + c)$.

**Large-batch equivalence to second order.** N workers of batch b under round robin have
$\tau = N - 1$; S-SGD with the same N batches averages them, which leaves a noise c/N. Divide each
edge by its own full-batch one. With $\delta = 1 - (2\tau + 1)\omega/\pi$ the equation above reads
$\tan(\pi\delta/4) = c \tan(\omega/2)$, so for large N

$$\frac{h_{A}}{h^*} = 1 - \frac{2c}{2N - 1} + O(N^{-2}), \qquad
\frac{h_{S}}{2} = \frac{1}{1 + c/N} = 1 - \frac{c}{N} + O(N^{-2}):$$

the noise of small batches costs delayed workers the share of the stable learning rate that the
noise of the equivalent large batch costs S-SGD. For c = 1: .618 and .667 at N = 2, .883 and .889 at
N = 8, .969 and .970 at N = 32. That is without momentum: S-SGD with heavy-ball momentum m stands at
an edge of z = -1 that lies (1 + m)/(1 - m) times further out, where noise weighs more.
"""

import math

from asgd_jax.stability.root_finding import bracketed_root


def noisy_constant_threshold(delay: int, curvature_noise: float) -> float:
    """h* in mean square of a constant delay without momentum, from one bracketed scalar root.

    Args:
      delay: constant delay >= 0.
      curvature_noise: c >= 0, relative variance of the curvature that one update sees.

    Returns:
      The step, learning rate x sharpness, at the edge.

    >>> noisy_constant_threshold(0, 1.0), round(noisy_constant_threshold(1, 1.0), 7)
    (1.0, 0.618034)
    >>> [round(noisy_constant_threshold(n - 1, 0.0), 7) for n in (1, 3)]
    [2.0, 0.618034]
    """
    if delay == 0:
        return 2.0 / (1.0 + curvature_noise)
    widest = math.pi / (2 * delay + 1)

    # In shares of the noiseless angle, so that nothing cancels at a delay of a million.
    def excess(lost: float) -> float:
        half = 0.5 * widest * (1.0 - lost)
        noise = curvature_noise * math.sin(half) * math.cos(0.25 * math.pi * lost)
        return math.sin(0.25 * math.pi * lost) * math.cos(half) - noise

    lost = bracketed_root(excess, 0.0, 1.0, xtol=1e-15)
    return 2.0 * math.sin(0.5 * widest * (1.0 - lost))
