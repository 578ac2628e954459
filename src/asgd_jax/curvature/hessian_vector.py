r"""Hessian-vector products of the mean loss over a fixed set of batches.

`loss_fn(params, batch)` is the mean loss of one batch, a scalar, and must be a pure function of its
two arguments: no dropout, no augmentation. Batch normalisation is the caller's decision. With
running statistics (evaluation mode, `batch_stats` closed over or kept in the batch) this is the
Hessian of what evaluation sees, one sum over examples. With batch statistics every batch defines a
loss of its own, and the answer depends on how the data is cut into batches.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asgd_jax.checksum import checksum


class GaussNewton(NamedTuple):
    r"""A loss of a model's outputs, whose curvature is to be that of the loss alone.

    $G = \sum_i J_i^T (\nabla^2_o \ell_i) J_i$ with J the Jacobian of the outputs: the Hessian less
    the curvature of the model. It is positive semidefinite where the loss is convex in the outputs.
    Every function of this package takes one in the place of `loss_fn`.

    Attributes:
      outputs: `outputs(params, batch)`, a pytree of arrays.
      loss: `loss(outputs, batch)`, the scalar mean loss of the batch.

    >>> squared = GaussNewton(lambda p, batch: jnp.sin(p), lambda out, batch: jnp.sum(out**2) / 2)
    >>> hessian_vector_product(squared)(jnp.zeros(1), jnp.ones(1), [None])
    Array([1.], dtype=float32)
    """

    outputs: Callable[[Any, Any], Any]
    loss: Callable[[Any, Any], jax.Array]


LossFn = Callable[[Any, Any], jax.Array]
Loss = LossFn | GaussNewton
Batches = Iterable[Any] | Callable[[], Iterable[Any]]
# (params, vector, batch) -> ((loss, product), both times the batch size; checksum of the batch)
Step = Callable[[Any, Any, Any], tuple[Any, jax.Array]]


def hessian_vector_product(loss_fn: Loss) -> Callable[[Any, Any, Batches], Any]:
    r"""The function `product(params, vector, batches)`: the mean loss's Hessian times a vector.

    $\nabla^2 L(\theta) v = \partial_\epsilon \nabla L(\theta + \epsilon v)$ at $\epsilon = 0$,
    forward over reverse, L as in `sharpness`. It compiles once for each shape of batch. Matrix
    products run in full float32 also where the device's default is less (TF32, bfloat16).

    Args:
      loss_fn: as for `sharpness`.

    Returns:
      `product(params, vector, batches)`. `vector` is a pytree like `params`, and so is the result.
      The batches are passed over once, hence may be a generator.

    Raises:
      ValueError: from `product`, for no batches, or parameters that are not floating point.

    >>> product = hessian_vector_product(lambda p, batch: jnp.mean((batch @ p) ** 2) / 2)
    >>> product(jnp.zeros(2), jnp.array([1.0, 0.0]), [jnp.eye(2), jnp.array([[4.0, 1.0]] * 2)])
    Array([8.25, 2.  ], dtype=float32)
    """
    step = make_step(loss_fn)

    def product(params: Any, vector: Any, batches: Batches) -> Any:
        params = as_parameters(params)
        tangent = jax.tree.map(lambda p, x: jnp.asarray(x, p.dtype), params, vector)
        (_, total), examples, _ = one_pass(step, params, tangent, batches)
        return jax.tree.map(lambda p, x: (x / examples).astype(p.dtype), params, total)

    return product


def make_step(loss_fn: Loss) -> Step:
    """One batch's share in the sums over examples of (loss, product)."""
    multiply = _gauss_newton(loss_fn) if isinstance(loss_fn, GaussNewton) else _hessian(loss_fn)

    @jax.jit
    def step(params: Any, vector: Any, batch: Any) -> tuple[Any, jax.Array]:
        with jax.default_matmul_precision("highest"):
            loss, product = multiply(params, vector, batch)

        def summed(mean: jax.Array) -> jax.Array:
            return _batch_size(batch) * mean.astype(jnp.promote_types(mean.dtype, jnp.float32))

        return jax.tree.map(summed, (loss, product)), checksum(batch)

    return step


Multiply = Callable[[Any, Any, Any], tuple[jax.Array, Any]]  # (params, vector, batch)


def _hessian(loss_fn: LossFn) -> Multiply:
    def multiply(params: Any, vector: Any, batch: Any) -> tuple[jax.Array, Any]:
        gradient = jax.value_and_grad(lambda p: loss_fn(p, batch))
        (loss, _), (_, product) = jax.jvp(gradient, (params,), (vector,))
        return loss, product

    return multiply


def _gauss_newton(both: GaussNewton) -> Multiply:
    def multiply(params: Any, vector: Any, batch: Any) -> tuple[jax.Array, Any]:
        outputs, forward = jax.linearize(lambda p: both.outputs(p, batch), params)
        of_outputs = jax.value_and_grad(lambda out: both.loss(out, batch))
        (loss, _), (_, curved) = jax.jvp(of_outputs, (outputs,), (forward(vector),))
        (product,) = jax.linear_transpose(forward, params)(curved)
        return loss, product

    return multiply


# Apart from the step: with the running sums among its arguments it would compile once more for
# each layout that they take on a mesh.
_add = jax.jit(lambda total, share: jax.tree.map(jnp.add, total, share), donate_argnums=0)


def one_pass(
    step: Step, params: Any, vector: Any, batches: Batches, expected: list[int] | None = None
) -> tuple[Any, int, list[Any]]:
    """Sums of (loss, product) over the batches, the number of examples, and the checksums.

    Raises:
      ValueError: for no batches, or ones that differ from `expected`, an earlier pass's checksums.
    """
    if isinstance(batches, dict) or hasattr(batches, "shape"):
        raise ValueError(
            f"batches is one {type(batches).__name__}, not a collection of batches: pass [batch]"
        )
    total, examples, checksums = None, 0, list[Any]()
    for batch in batches() if callable(batches) else batches:
        # One batch back: the device worked on that one while the host prepared this one.
        jax.block_until_ready(checksums[-1:])
        share, bits = step(params, vector, batch)
        total = share if total is None else _add(total, share)
        examples += _batch_size(batch)
        checksums.append(bits)
    if expected is not None:
        _check_unchanged([int(bits) for bits in checksums], expected)
    needed = len(expected or [None])
    if len(checksums) < needed:
        raise ValueError(
            f"batches gave {len(checksums)} in a pass that needs {needed}: pass a list, or a "
            "function that returns a fresh iterator (a generator is exhausted after one pass)"
        )
    return total, examples, checksums


def _check_unchanged(found: list[int], expected: list[int]) -> None:
    """Compares the checksums of a pass with those of an earlier one."""
    pairs = enumerate(zip(found, expected, strict=False))
    differing = [at for at, (here, there) in pairs if here != there]
    if len(found) > len(expected):
        differing.append(len(expected))
    if differing:
        raise ValueError(
            f"batches changed between two passes, at batch {differing[0]}: pass a list, or turn "
            "shuffling and augmentation off (every pass needs the same batches in the same order)"
        )


def _batch_size(batch: Any) -> int:
    """Number of examples: the leading dimension of the first leaf; 1 for a batch without leaves."""
    leaves = jax.tree.leaves(batch)
    shape = np.shape(leaves[0]) if leaves else (1,)
    if not shape or not shape[0]:
        raise ValueError(
            f"the first leaf of a batch has shape {shape}, which gives no number of examples: put "
            "an array with the examples along its leading axis first"
        )
    return int(shape[0])


def as_parameters(params: Any) -> Any:
    """Returns `params` as jax arrays; refuses leaves that have no real derivative."""
    params = jax.tree.map(jnp.asarray, params)
    for path, leaf in jax.tree.leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} has dtype {leaf.dtype}: pass only the "
                "floating-point parameters and close over the rest in loss_fn"
            )
    if not sum(leaf.size for leaf in jax.tree.leaves(params)):
        raise ValueError(f"params holds no number: {params!r}; pass at least one parameter")
    return params
