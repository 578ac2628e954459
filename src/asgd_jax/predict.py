r"""Weight prediction: what a worker pulls is where the parameters will be when its gradient lands.

For `delayed(inner, delay, predict=...)` and `rounds(..., predict=...)`. A predictor is a function
`predict(params, inner_state, staleness)` to parameters; `staleness`, the number of updates to look
ahead, is an int32 scalar, or a pytree of them like the parameters where leaves have delays of their
own. Each finds the momentum that it needs inside the state of the optimizer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from asgd_jax.by_leaf import PyTree, map_staleness

Predict = Callable[[PyTree, optax.OptState, Any], PyTree]


def momentum(
    learning_rate: float | None = None, *, decay: float, nesterov: bool = False
) -> Predict:
    r"""Predicts SGD with momentum: n updates whose gradients are zero.

    $$\hat x = x - \eta \frac{m - m^{n + 1}}{1 - m} v$$

    and m times that displacement with Nesterov's momentum, as `optax.sgd(..., nesterov=True)` has
    it.

    Args:
      learning_rate: of the optimizer; None reads the one that `optax.inject_hyperparams` keeps, of
        a schedule that of the last update.
      decay: m in [0, 1), the optimizer's momentum.
      nesterov: whether it is Nesterov's.

    Raises:
      ValueError: from the predictor, when the optimizer's state has no `trace`.

    >>> tx = optax.sgd(0.1, momentum=0.5)
    >>> _, state = tx.update(jnp.ones(1), tx.init(jnp.zeros(1)))
    >>> momentum(0.1, decay=0.5)(jnp.zeros(1), state, 2)
    Array([-0.075], dtype=float32)

    References:
      Chen, Yang, Cheng, "Efficient and Robust Parallel DNN Training through Model Parallelism on
      Multi-GPU Platform" (SpecTrain), arXiv:1809.02839.
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay must be in [0, 1), the optimizer's momentum, got {decay!r}")

    def predict(params: PyTree, inner_state: optax.OptState, staleness: Any) -> PyTree:
        velocity = _only(inner_state, "trace", "optax.trace or optax.sgd(..., momentum=m)")
        rate = _rate(inner_state, learning_rate)

        def ahead(x: jax.Array, v: jax.Array, n: Any) -> jax.Array:
            far = rate * (decay - decay ** (1.0 + jnp.asarray(n, jnp.float32))) / (1.0 - decay)
            return (x - (decay * far if nesterov else far) * v).astype(x.dtype)

        return map_staleness(ahead, staleness, params, velocity)

    return predict


def adamw(
    learning_rate: float | None = None,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Predict:
    r"""Predicts Adam or AdamW: n updates whose gradients are zero, the second moment held.

    $$\hat x = (1 - \eta \lambda)^n x - \eta \sum_{k=1}^n (1 - \eta \lambda)^{n - k}
      \frac{\beta_1^k}{1 - \beta_1^{t + k}} \frac{\mu}{\sqrt{\nu / (1 - \beta_2^t)} + \epsilon}$$

    Args:
      learning_rate: of the optimizer; None reads the one that `optax.inject_hyperparams` keeps.
      b1, b2, eps, weight_decay: those of the optimizer; the decay is AdamW's own.

    Raises:
      ValueError: from the predictor, when the optimizer's state has no `mu`, `nu` and `count`.

    >>> tx = optax.adam(0.1, b1=0.5)
    >>> _, state = tx.update(jnp.ones(1), tx.init(jnp.zeros(1)))
    >>> adamw(0.1, b1=0.5)(jnp.zeros(1), state, 1).round(4)  # mu = 1/2, which 1/2 and 3/4 divide
    Array([-0.0333], dtype=float32)

    References:
      Guan, Yin, Li, Lu, "XPipe", arXiv:1911.04610; Eliad et al., "Fine-tuning giant neural networks
      on commodity hardware with automatic pipeline model parallelism" (FTPipe), USENIX ATC 2021.
    """

    for name, value in (("b1", b1), ("b2", b2)):
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} must be in [0, 1), the optimizer's, got {value!r}")

    def predict(params: PyTree, inner_state: optax.OptState, staleness: Any) -> PyTree:
        kind = "optax.adam or optax.adamw"
        if list(optax.tree.get_all_with_path(inner_state, "nu_max")):
            raise ValueError(f"prediction is of {kind}, and this optimizer is an AMSGrad")
        first, second = (_only(inner_state, name, kind) for name in ("mu", "nu"))
        count = _beside(inner_state, "mu", "count").astype(jnp.float32)
        rate = _rate(inner_state, learning_rate)
        kept = 1.0 - rate * weight_decay
        correction = jnp.maximum(1.0 - b2**count, 1e-30)

        def weight(n: Any) -> tuple[jax.Array, jax.Array]:
            def add(k: jax.Array, total: jax.Array) -> jax.Array:
                step = jnp.asarray(k, jnp.float32) + 1.0
                return kept * total + b1**step / (1.0 - b1 ** (count + step))

            steps = jnp.asarray(n, jnp.int32)
            total = jax.lax.fori_loop(0, steps, add, jnp.zeros((), jnp.float32))
            return kept ** steps.astype(jnp.float32), total

        def ahead(x: jax.Array, mu: jax.Array, nu: jax.Array, n: Any) -> jax.Array:
            decayed, total = weight(n)
            direction = mu / (jnp.sqrt(nu / correction) + eps)
            return (decayed * x - rate * total * direction).astype(x.dtype)

        return map_staleness(ahead, staleness, params, first, second)

    return predict


class LastUpdateState(NamedTuple):
    """State of `remember_update`: the last update, a pytree like the parameters."""

    last_update: PyTree


def remember_update() -> optax.GradientTransformation:
    """Keeps the last update for `last_update`; the last member of the optimizer's chain.

    >>> tx = optax.chain(optax.sgd(0.5), remember_update())
    >>> _, state = tx.update(jnp.ones(1), tx.init(jnp.zeros(1)))
    >>> state[-1].last_update
    Array([-0.5], dtype=float32)
    """

    def update(updates: PyTree, state: LastUpdateState, params: PyTree | None = None) -> Any:
        del state, params
        return updates, LastUpdateState(updates)

    return optax.GradientTransformation(
        lambda params: LastUpdateState(optax.tree.zeros_like(params)), update
    )


def last_update(scale: float = 1.0) -> Predict:
    r"""Predicts that the last update repeats: $\hat x = x + n\, s\, (x_t - x_{t-1})$.

    It serves any optimizer, Muon too; its chain must end with `remember_update()`.

    Args:
      scale: s.

    Raises:
      ValueError: from the predictor, when the optimizer's state has no `last_update`.

    >>> tx = optax.chain(optax.sgd(0.5), remember_update())
    >>> _, state = tx.update(jnp.ones(1), tx.init(jnp.zeros(1)))
    >>> last_update(0.5)(jnp.zeros(1), state, 4)
    Array([-1.], dtype=float32)
    """

    def predict(params: PyTree, inner_state: optax.OptState, staleness: Any) -> PyTree:
        last = _only(
            inner_state, "last_update", "optax.chain(..., asgd_jax.predict.remember_update())"
        )

        def ahead(x: jax.Array, u: jax.Array, n: Any) -> jax.Array:
            return (x + scale * jnp.asarray(n, jnp.float32) * u).astype(x.dtype)

        return map_staleness(ahead, staleness, params, last)

    return predict


def _only(state: optax.OptState, name: str, kind: str) -> PyTree:
    found = list(optax.tree.get_all_with_path(state, name))
    if len(found) != 1:
        raise ValueError(
            f"prediction needs the one `{name}` of {kind} in the optimizer's state, which has "
            f"{len(found)}: predict with the optimizer that is inside delayed"
        )
    return found[0][1]


def _beside(state: optax.OptState, name: str, wanted: str) -> jax.Array:
    """The field of the same state as `name`, of several of that name."""
    ((path, _),) = optax.tree.get_all_with_path(state, name)
    fields = optax.tree.get_all_with_path(state, wanted)
    (value,) = (value for where, value in fields if where[:-1] == path[:-1])
    return jnp.asarray(value)


def _rate(state: optax.OptState, learning_rate: float | None) -> Any:
    if callable(learning_rate):
        raise ValueError(
            "prediction takes a number for learning_rate, got a schedule: wrap the optimizer in "
            "optax.inject_hyperparams and leave learning_rate out"
        )
    if learning_rate is not None:
        return learning_rate
    # A schedule has a state of the same name; what it gave the last update is among the numbers.
    found = [
        value
        for path, value in optax.tree.get_all_with_path(state, "learning_rate")
        if not any(getattr(key, "name", "") == "hyperparams_states" for key in path)
    ]
    if len(found) != 1:
        raise ValueError(
            "prediction needs the one `learning_rate` of optax.inject_hyperparams in the "
            f"optimizer's state, which has {len(found)}: or pass learning_rate="
        )
    return found[0]
