r"""The mean-square edge of delayed mini-batch descent at a minimum of a network.

Near a minimum an update is $y \leftarrow y - \eta H_B y_{stale}$, with the Hessian $H_B$ of a batch
of b samples drawn with replacement. In the eigenvectors of the mean Hessian the mean of y falls
apart into directions of their own, with the impulse responses $g_t$ of curvature $\lambda_j$, and
what one update adds is white noise of covariance $Q = \frac{\eta^2}{b} E[(H_i - H) P (H_i - H)^T]$
where P is that of $y_{stale}$. Noise Q makes

$$P_{jl} = Q_{jl} \sum_t g_t(\lambda_j) g_t(\lambda_l),$$

so that E[|y|^2] is bounded if and only if the mean is stable and the map from Q to the next Q has a
spectral radius below 1: `stability.mean_square` in as many dimensions as there are eigenvectors.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq
from scipy.signal import lfilter

from asgd_jax import curvature, stability
from experiments.edges.minimum import Minimum, Problem

_LENGTH = 60_000  # updates of an impulse response
_NEARLY = 0.999  # of the full batch's edge: nearer, a response does not fade within that length
_ITERATIONS = 500


class SampleHessians(NamedTuple):
    """Hessians of the samples' losses at a minimum, in the top eigenvectors of their mean.

    Attributes:
      eigenvalues: (k,), falling, of the mean.
      samples: (n, k, k).
    """

    eigenvalues: np.ndarray
    samples: np.ndarray


def relative_noise(hessians: SampleHessians) -> float:
    """c of a single sample along the first eigenvector: variance over squared mean."""
    along = hessians.samples[:, 0, 0]
    return float(along.var() / along.mean() ** 2)


def sample_hessians(problem: Problem, minimum: Minimum, num_pairs: int) -> SampleHessians:
    """Measures them, by Hessian-vector products of every sample with the top eigenvectors."""
    (batch,) = problem.batches
    top = curvature.eigenpairs(
        problem.loss_fn, minimum.params, problem.batches, num_pairs, tol=1e-6
    )
    vectors = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), top.vectors)

    @jax.jit
    def of_sample(sample: Any) -> jax.Array:
        alone = jax.tree.map(lambda leaf: leaf[None], sample)
        gradient = jax.grad(partial(_loss_of, problem, alone))
        products = jax.vmap(lambda v: jax.jvp(gradient, (minimum.params,), (v,))[1])(vectors)
        dots = jax.tree.map(
            lambda v, h: v.reshape(num_pairs, -1) @ h.reshape(num_pairs, -1).T, vectors, products
        )
        return jnp.sum(jnp.stack(jax.tree.leaves(dots)), axis=0)

    samples = np.asarray(jax.lax.map(of_sample, batch), np.float64)
    return SampleHessians(np.asarray(top.values), (samples + samples.swapaxes(1, 2)) / 2.0)


def _loss_of(problem: Problem, batch: Any, params: Any) -> jax.Array:
    return problem.loss_fn(params, batch)


def noise_radius(
    eigenvalues: np.ndarray,
    covariance: np.ndarray,
    learning_rate: float,
    delay: int,
    batch_size: int,
) -> float:
    """Spectral radius of the map of noises; inf where the mean is not stable.

    Args:
      eigenvalues: (k,), of the mean Hessian.
      covariance: (k^2, k^2), the mean of $(H_i - H) \\otimes (H_i - H)$.
      learning_rate, delay, batch_size: of the updates.
    """
    steps = learning_rate * eigenvalues
    if steps[0] >= stability.max_learning_rate(delay):
        return math.inf
    impulse = np.zeros(_LENGTH)
    impulse[0] = 1.0
    responses = np.array([_response(step, delay, impulse) for step in steps])
    gains = (responses @ responses.T).ravel()
    map_of_noise = (learning_rate**2 / batch_size) * covariance * gains
    noise, radius = np.eye(len(steps)).ravel(), 0.0
    for _ in range(_ITERATIONS):  # a positive map: its largest eigenvector is a covariance
        after = map_of_noise @ noise
        before, radius = radius, float(np.linalg.norm(after))
        noise = after / radius
        if abs(radius - before) < 1e-10 * radius:
            break
    return radius


def _response(step: float, delay: int, impulse: np.ndarray) -> np.ndarray:
    denominator = np.zeros(delay + 2)
    denominator[:2] = 1.0, -1.0
    denominator[delay + 1] += step
    return np.asarray(lfilter([1.0], denominator, impulse))


def mean_square_edge(hessians: SampleHessians, delay: int, batch_size: int) -> float:
    """Returns the largest learning rate at which E[|y|^2] stays bounded.

    It lies below the edge of the full batch, $h^*(tau) / a$.
    """
    values = hessians.eigenvalues
    full = stability.max_learning_rate(delay, sharpness=float(values[0]))
    centred = hessians.samples - np.diag(values)
    flat = np.einsum("nab,ncd->acbd", centred, centred) / len(centred)
    covariance = flat.reshape(len(values) ** 2, -1)

    def excess(share: float) -> float:
        return noise_radius(values, covariance, share * full, delay, batch_size) - 1.0

    if excess(_NEARLY) < 0.0:
        return _NEARLY * full
    return float(brentq(excess, 1e-4, _NEARLY, xtol=1e-6)) * full


def mean_square_growth(
    problem: Problem,
    minimum: Minimum,
    learning_rate: float,
    delay: int,
    batch_size: int,
    *,
    num_updates: int,
    num_replicates: int = 64,
    seed: int = 0,
) -> float:
    """Measures the growth of log E[|y|^2] an update, in all dimensions, by Hessian-vector products.

    A population of linearised runs with batches of their own. After every delay + 1 updates those
    that have grown are copied and those that have shrunk dropped, in proportion to |y|^2: the mean
    is carried by rare runs, which a fixed population would miss.
    """
    (batch,) = problem.batches
    advance = _make_advance(problem, minimum, batch_size)
    size = len(jax.tree.leaves(batch)[0])
    key = jax.random.key(seed)
    start = jax.tree.map(
        lambda v: jnp.broadcast_to(v, (delay + 1, num_replicates, *v.shape)).astype(jnp.float32),
        minimum.direction,
    )
    past, total, counted = start, 0.0, 0
    rounds = -(-num_updates // (delay + 1))
    for number in range(rounds):
        key, batches, choice = jax.random.split(key, 3)
        drawn = jax.random.randint(
            batches, (delay + 1, num_replicates, batch_size), 0, size, jnp.int32
        )
        past, growth = advance(past, batch, drawn, choice, jnp.float32(learning_rate))
        if number >= rounds // 3:
            total, counted = total + float(growth), counted + delay + 1
    return total / counted


def _make_advance(problem: Problem, minimum: Minimum, batch_size: int) -> Callable[..., Any]:
    """Returns `advance(past, data, drawn, key, rate)`: delay + 1 updates, and a resampling.

    `past` holds the last delay + 1 values, oldest first; the second value is the logarithm of the
    mean growth of |past|^2.
    """

    def product(y: Any, samples: Any) -> Any:
        gradient = jax.grad(partial(_loss_of, problem, samples))
        return jax.jvp(gradient, (minimum.params,), (y,))[1]

    def squares(past: Any) -> jax.Array:
        parts = jax.tree.map(lambda v: jnp.sum(v**2, axis=(0, *range(2, v.ndim))), past)
        return jnp.sum(jnp.stack(jax.tree.leaves(parts)), axis=0)

    @jax.jit
    def advance(past: Any, data: Any, drawn: jax.Array, key: jax.Array, rate: jax.Array) -> Any:
        def update(live: Any, inputs: Any) -> tuple[Any, Any]:
            stale, chosen = inputs
            samples = jax.tree.map(lambda leaf: leaf[chosen], data)
            moved = jax.vmap(product)(stale, samples)
            live = jax.tree.map(lambda y, h: y - rate * h, live, moved)
            return live, live

        before = squares(past)
        live = jax.tree.map(lambda v: v[-1], past)
        after = jax.lax.scan(update, live, (past, drawn))[1]
        weights = squares(after) / before
        chosen = jax.random.categorical(key, jnp.log(weights), shape=weights.shape)
        scale = jnp.sqrt(squares(after))[chosen]
        kept = jax.tree.map(
            lambda v: v[:, chosen] / scale.reshape(1, -1, *[1] * (v.ndim - 2)), after
        )
        return kept, jnp.log(jnp.mean(weights))

    return advance
