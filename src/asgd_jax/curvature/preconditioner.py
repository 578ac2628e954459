"""The preconditioner of an adaptive optimizer, from its optax state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

_KINDS = ("ScaleByAdamState", "ScaleByAmsgradState")


def adam_preconditioner(
    opt_state: optax.OptState, *, b2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0
) -> Any:
    r"""Returns the diagonal that Adam divides by: $D = \sqrt{\hat\nu + \epsilon_r} + \epsilon$.

    $\hat\nu = \nu / (1 - \beta_2^t)$ after t updates. While D stands still, everything that holds
    of a damped heavy ball of momentum $\beta_1$ holds of Adam with the sharpness of
    $D^{-1/2} H D^{-1/2}$ (`sharpness(..., preconditioner=D)`).

    Args:
      opt_state: holds, at any depth (also inside `delayed`), the state of one of optax's Adam,
        AdamW, NAdam, AMSGrad or others by `scale_by_adam`: `nu` beside its `count`. Of AMSGrad the
        diagonal is that of the largest corrected nu so far.
      b2, eps, eps_root: those of the optimizer.

    Raises:
      ValueError: when the state has no nu, several, or has not made an update yet.

    >>> import asgd_jax
    >>> tx = asgd_jax.delayed(optax.adam(0.1), 2)
    >>> _, state = tx.update(jnp.array([0.5]), tx.init(jnp.ones(1)), jnp.ones(1))
    >>> adam_preconditioner(state).round(4)
    Array([0.5], dtype=float32)

    References:
      Cohen et al., "Adaptive Gradient Methods at the Edge of Stability", arXiv:2207.14484.
    """
    found = list(optax.tree.get_all_with_path(opt_state, "nu"))
    counts = list(optax.tree.get_all_with_path(opt_state, "count"))
    if len(found) != 1 or not counts:
        raise ValueError(
            f"the optimizer state has {len(found)} entries nu and {len(counts)} counts, and Adam's "
            "has one nu beside its count: pass the state of optax.adam or of one of its kin"
        )
    # The count of the transform that nu belongs to: others may be a schedule's.
    (path, nu) = found[0]
    kind = getattr(path[-1], "tuple_name", None)
    beside = [count for where, count in counts if where[:-1] == path[:-1]]
    if not beside or kind not in _KINDS:
        raise ValueError(
            f"nu of {kind or 'this optimizer'} is no Adam's: it divides by something else (of "
            "RMSProp, without a correction, pass sqrt(nu + eps) as preconditioner yourself)"
        )
    (count,) = beside
    if not int(count):
        raise ValueError(
            "the optimizer has made no update yet, so that its nu is 0: measure after the first"
        )
    largest = [value for where, value in optax.tree.get_all_with_path(opt_state, "nu_max")
               if where[:-1] == path[:-1]]  # fmt: skip
    if largest:
        return jax.tree.map(lambda leaf: jnp.sqrt(leaf + eps_root) + eps, largest[0])
    correction = 1.0 - b2 ** jnp.asarray(count, jnp.float32)
    return jax.tree.map(lambda leaf: jnp.sqrt(leaf / correction + eps_root) + eps, nu)
