r"""By how much a product of Jacobians grows: of the mean, of the mean square, of a typical run.

All functions take the Jacobians of one period of T updates, of shape (T, num_alternatives, n, n):
an update has an alternative for each staleness. At the start of a period only the entries `loop` of
the state are counted, see `in_play`.
"""

import functools
import math

import numpy as np
import scipy.linalg
from scipy.sparse.linalg import LinearOperator, eigs

_DENSE = 150  # largest map of second moments whose eigenvalues are all computed
_NUM_CHAINS = 32
_UNSCALED = 16  # updates in which a chain cannot overflow
_FEWEST_BLOCKS = 8


def log_growth(
    jacobians: np.ndarray, weights: np.ndarray, sequence: np.ndarray | None = None
) -> float:
    r"""Logarithm of the growth in one update; inf where the Jacobians are not finite.

    Args:
      jacobians: float64, shape (T, num_alternatives, n, n + 1), of one period: with respect to the
        state, of which x comes first, and to the noise.
      weights: probability of each alternative, shape (num_alternatives,). Of a single one the
        growth of the state is returned, of several that of the root mean square.
      sequence: int, shape (num_updates,): which alternative each update of a run takes. If given,
        the growth of the state along it is returned.

    >>> halved = np.array([[[[0.5, 1.0]], [[1.5, 1.0]]]])
    >>> round(log_growth(halved, np.array([0.5, 0.5])), 4)  # (1/4 + 9/4) / 2 = 1.25
    0.1116
    >>> round(log_growth(halved, np.array([0.5, 0.5]), np.array([0, 1])), 4)  # 3/4 in two updates
    -0.1438
    """
    if not np.isfinite(jacobians).all():
        return math.inf
    if (jacobians == jacobians[:1]).all():
        jacobians = jacobians[:1]
    loop = np.flatnonzero(in_play((jacobians != 0.0).any(1)))
    steps = jacobians[..., :-1]
    if weights.size == 1:
        growth = _period_growth(steps[:, 0], loop)
    elif sequence is None:
        growth = 0.5 * _second_moment_growth(_balanced(steps), weights, loop)
    else:
        return _typical_growth(_balanced(steps), sequence, loop)
    return growth / len(steps)


def in_play(touches: np.ndarray) -> np.ndarray:
    """x, and the values that the noise excites and that act on x, at the start of a period.

    All others are left out, because their eigenvalues say nothing about x: averages that nobody
    reads, settings, slots about to be overwritten.

    Args:
      touches: bool, shape (T, n, n + 1), which entries of the Jacobians are not zero.

    Returns:
      bool, shape (n,).

    >>> in_play(np.array([[[True, False, True], [True, True, False]]]))  # nothing reads the second
    array([ True, False])
    """
    excited, acting = np.zeros((2, touches.shape[1]), bool)
    while True:
        before = excited, acting
        for touch in touches:
            excited = touch @ np.append(excited, True)
        for touch in touches[::-1]:
            acting = touch[:, :-1].T @ np.append(True, acting[1:])
        if np.array_equal(before, (excited, acting)):
            return np.append(True, (excited & acting)[1:])


def _period_growth(steps: np.ndarray, loop: np.ndarray) -> float:
    """Logarithm of the spectral radius of the period's product."""
    with np.errstate(all="ignore"):
        period = functools.reduce(lambda first, second: second @ first, steps)
    if not np.isfinite(period).all():
        return math.inf
    return _log_largest(scipy.linalg.eigvals(period[np.ix_(loop, loop)]))


def _log_largest(eigenvalues: np.ndarray) -> float:
    largest = float(abs(eigenvalues).max())
    return math.log(largest) if largest > 0.0 else -math.inf


def _balanced(steps: np.ndarray) -> np.ndarray:
    """One change of units for all updates, or a large sharpness would cost accuracy."""
    units = scipy.linalg.matrix_balance(abs(steps).sum((0, 1)), permute=False, separate=True)[1][0]
    return steps * units / units[:, None]


def _random_rows(alternatives: np.ndarray) -> np.ndarray:
    """The few rows in which the alternatives of an update differ: x and momenta, not the ring."""
    return np.flatnonzero((alternatives != alternatives[:1]).any((0, 2)))


def _second_moment_growth(steps: np.ndarray, weights: np.ndarray, loop: np.ndarray) -> float:
    r"""Log spectral radius of $S \mapsto \sum_k p_k A_k S A_k^T$ over a period, on these entries.

    Where one of two rows is the same in all $A_k$, the mean of their product is the product of
    their means; only the block of the random rows needs the sum.
    """
    size, inside = steps.shape[-1], np.ix_(loop, loop)
    parts = []
    for alternatives in steps:
        rows = _random_rows(alternatives)
        mean = np.tensordot(weights, alternatives, 1)
        parts.append((mean, np.ix_(rows, rows), alternatives[:, rows]))

    def apply(moments: np.ndarray) -> np.ndarray:
        full = np.zeros((size, size))
        full[inside] = moments.reshape(loop.size, loop.size)
        for mean, block, rows in parts:
            random = np.einsum("k,kin,kjn->ij", weights, rows @ full, rows, optimize=True)
            full = mean @ full @ mean.T
            full[block] = random
        return full[inside].ravel()

    identity = np.eye(loop.size).ravel()
    if identity.size <= _DENSE:
        columns = np.array([apply(each) for each in np.eye(identity.size)])
        return _log_largest(scipy.linalg.eigvals(columns))
    operator = LinearOperator((identity.size, identity.size), matvec=apply, dtype=np.float64)
    # The map keeps positive matrices positive: its spectral radius is its rightmost eigenvalue.
    options = {"k": 3, "which": "LR", "ncv": 60, "tol": 1e-11}
    return _log_largest(eigs(operator, v0=identity, return_eigenvectors=False, **options))


def _typical_growth(steps: np.ndarray, sequence: np.ndarray, loop: np.ndarray) -> float:
    """Growth of the log norm along the sequence, an update.

    The sequence is cut into chains that run side by side, each through the piece of the chain
    before it, in which it forgets its start, and then through its own.
    """
    period = len(steps)
    block = period * max(1, _UNSCALED // period)
    blocks = max(_FEWEST_BLOCKS, round(sequence.size / (_NUM_CHAINS * block)))
    own = np.resize(sequence, (_NUM_CHAINS, blocks * block))
    taken = np.concatenate([np.roll(own, 1, axis=0), own], axis=1).T
    log_norms = _log_norms(steps, taken.reshape(-1, block, _NUM_CHAINS), loop)[blocks:]
    if not np.isfinite(log_norms).all():
        return math.inf if np.isnan(log_norms).any() or log_norms.max() > 0.0 else -math.inf
    # Least squares: the norm beats with the period of the iterates, which would show at two ends.
    time = np.arange(blocks) - (blocks - 1) / 2.0
    return float(time @ log_norms.mean(1)) / (block * float(time @ time))


def _log_norms(steps: np.ndarray, taken: np.ndarray, loop: np.ndarray) -> np.ndarray:
    """Log norm of every chain after every block; `taken` has shape (blocks, updates, chains).

    The states are rescaled at every block, or they would overflow; what is not in play is cleared.
    """
    rows = [_random_rows(alternatives) for alternatives in steps]
    fixed = [alternatives[0].T for alternatives in steps]
    varied = [alternatives[:, each] for alternatives, each in zip(steps, rows, strict=True)]
    counted = np.zeros(steps.shape[-1])
    counted[loop] = 1.0
    num_blocks, block, num_chains = taken.shape
    state = counted * np.random.default_rng(0).normal(size=(num_chains, counted.size))
    growths = np.empty((num_blocks, num_chains))
    with np.errstate(all="ignore"):
        for number, choices in enumerate(taken):
            for update in range(block):
                phase = update % len(steps)
                after = state @ fixed[phase]
                after[:, rows[phase]] = np.einsum(
                    "crn,cn->cr", varied[phase][choices[update]], state
                )
                state = after
            state = state * counted
            norms = np.linalg.norm(state, axis=1)
            growths[number] = np.log(norms)
            state /= np.where(norms > 0.0, norms, 1.0)[:, None]
        return np.cumsum(growths, axis=0)
