"""How the workers of a round lie on the devices: a worker's sets on its device, updates in pieces.

Two layouts of a stack of parameter sets (or gradients). *By worker*: the stack's axis is split over
the mesh's worker axis, every device holds whole sets. *In pieces*: every device holds its piece of
every set, cut along one axis of each leaf. From one to the other is one all-to-all a leaf.

Without a mesh (`WorkerLayout.mesh` None) everything here leaves arrays where they are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from asgd_jax.transforms.history import PyTree


class WorkerLayout(NamedTuple):
    """Where things lie.

    Attributes:
      mesh: of automatic axes, or None for a single device.
      axis: the mesh axis of the workers.
      specs: pytree prefix of the parameters, `PartitionSpec`s over the mesh's other axes.
    """

    mesh: Mesh | None
    axis: str
    specs: PyTree

    @property
    def num_devices(self) -> int:
        """Places on the worker axis."""
        return 1 if self.mesh is None else self.mesh.shape[self.axis]

    @property
    def in_turn(self) -> bool:
        """Whether one device computes its workers' gradients one after another.

        On a CPU a batch of convolutions with a kernel each is slower than the convolutions.
        """
        device = None if self.mesh is None else self.mesh.devices.flat[0]
        return (jax.default_backend() if device is None else device.platform) == "cpu"


def make_layout(mesh: Mesh | None, axis: str, specs: PyTree) -> WorkerLayout:
    """Returns the layout of a mesh.

    Raises:
      ValueError: for a mesh without such an axis, or specs that use it.

    >>> make_layout(None, "workers", None).num_devices
    1
    """
    if mesh is None:
        return WorkerLayout(None, axis, PartitionSpec())
    if axis not in mesh.axis_names:
        raise ValueError(
            f"axis={axis!r} is none of the mesh's axes {mesh.axis_names}: pass axis= the one that "
            "the workers are to be divided over"
        )
    specs = PartitionSpec() if specs is None else specs
    used = [spec for spec in jax.tree.leaves(specs, is_leaf=_is_spec) if axis in _names(spec)]
    if used:
        raise ValueError(
            f"specs has {used[0]}, which divides parameters over the workers' axis {axis!r}: every "
            "worker needs them whole; name the mesh's other axes only"
        )
    # Of axes with types (jax.make_mesh) the user's optimizer would have to name each in each op.
    automatic = Mesh(
        mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names)
    )
    return WorkerLayout(automatic, axis, specs)


def refuse_explicit_context(layout: WorkerLayout) -> None:
    """Refuses to work within `jax.set_mesh` of a mesh with axes of another type.

    Raises:
      ValueError: naming the remedy.
    """
    around = jax.sharding.get_abstract_mesh()
    if layout.mesh is not None and any(kind != AxisType.Auto for kind in around.axis_types):
        inside = [kind for kind in around.axis_types if kind == AxisType.Explicit]
        if inside:
            raise ValueError(
                f"rounds is used within jax.set_mesh of a mesh whose axes {around.axis_names} are "
                "Explicit: leave jax.set_mesh out, or make it by jax.make_mesh(..., "
                "axis_types=(jax.sharding.AxisType.Auto,) * n)"
            )


def whole_specs(layout: WorkerLayout, params: PyTree) -> PyTree:
    """Returns the `PartitionSpec` of every parameter, as a worker sees it."""
    specs = jax.tree.broadcast(layout.specs, params, is_leaf=_is_spec)
    return jax.tree.map(_tidy, specs, is_leaf=_is_spec)


def piece_specs(layout: WorkerLayout, params: PyTree) -> PyTree:
    """Returns the `PartitionSpec` of every parameter in pieces.

    The worker axis cuts a leaf's longest axis that it divides and that no other mesh axis has; a
    leaf without one is kept whole on every device.
    """

    def cut(spec: PartitionSpec, leaf: Any) -> PartitionSpec:
        shape = jnp.shape(leaf)
        names = [*spec, *[None] * (len(shape) - len(spec))]
        free = [
            (size, -at)
            for at, size in enumerate(shape)
            if size and size % layout.num_devices == 0 and names[at] is None
        ]
        if free:
            names[-max(free)[1]] = layout.axis
        return _tidy(names)

    return jax.tree.map(cut, whole_specs(layout, params), params, is_leaf=_is_spec)


def state_specs(layout: WorkerLayout, state: PyTree, params: PyTree) -> PyTree:
    """Returns the `PartitionSpec` of every leaf of an optimizer's state.

    A leaf whose path ends in a parameter's, and that has its shape, is cut as the parameter is; so
    is a stack of them (a ring of buffers), along the same axis. All else is whole. (Paths, because
    `optax.tree.map_params` cannot read Muon's state, SM3's or L-BFGS's.)

    >>> state_specs(
    ...     make_layout(None, "workers", None),
    ...     {"count": jnp.array(3), "mu": jnp.ones(2)},
    ...     jnp.ones(2),
    ... )
    {'count': P(), 'mu': P('workers',)}
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    specs = jax.tree.leaves(piece_specs(layout, params), is_leaf=_is_spec)
    known = {
        path: (jnp.shape(leaf), spec) for (path, leaf), spec in zip(leaves, specs, strict=True)
    }

    def find(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        suffixes = (path[at:] for at in range(len(path) + 1))
        for shape, spec in (known[end] for end in suffixes if end in known):
            if jnp.shape(leaf) == shape:
                return spec
            if jnp.shape(leaf)[1:] == shape:
                return PartitionSpec(None, *spec)
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(find, state)


def stacked(specs: PyTree, axis: str | None = None) -> PyTree:
    """Returns the specs of a stack of such trees, whose first axis lies over `axis`.

    >>> stacked(PartitionSpec("model"), "workers")
    P('workers', 'model')
    """
    return jax.tree.map(lambda spec: PartitionSpec(axis, *spec), specs, is_leaf=_is_spec)


def shardings(layout: WorkerLayout, specs: PyTree) -> PyTree:
    """Returns the specs as shardings on the mesh."""
    return jax.tree.map(lambda spec: NamedSharding(_mesh_of(layout), spec), specs, is_leaf=_is_spec)


def place(layout: WorkerLayout, tree: PyTree, specs: PyTree) -> PyTree:
    """Has the compiler lay `tree`, which may have None for some leaves, as `specs` say."""
    if layout.mesh is None:
        return tree

    def put(spec: PartitionSpec, leaf: Any) -> Any:
        if leaf is None or leaf.dtype == jax.dtypes.float0:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(_mesh_of(layout), spec))

    return jax.tree.map(put, specs, tree, is_leaf=_is_spec)


def each_worker(
    layout: WorkerLayout,
    gradient: Callable[[PyTree, PyTree], tuple[PyTree, Any]],
    pulled: PyTree,
    batches: PyTree,
) -> tuple[PyTree, Any]:
    """Takes the gradient of every worker, each device those of its own, without communication.

    Args:
      layout: a stack's axis must be a multiple of its devices.
      gradient: from parameters and a batch to (gradients, aux).
      pulled: a stack of L parameter sets, by worker.
      batches: a stack of N batches, N a multiple of L; N / L consecutive workers share a set.

    Returns:
      L gradients, means over the workers that share a set, by worker; and N aux.
    """

    def of_device(pulled: PyTree, batches: PyTree) -> tuple[PyTree, Any]:
        num_sets, num_workers = _length(pulled), _length(batches)

        def of_set(pair: tuple[PyTree, PyTree]) -> tuple[PyTree, Any]:
            params, batches = pair
            grads, aux = _each(lambda batch: gradient(params, batch), batches, layout.in_turn)
            return jax.tree.map(_mean, grads), aux

        by_set = _reshape(batches, 1, (num_sets, num_workers // num_sets))
        grads, aux = _each(of_set, (pulled, by_set), layout.in_turn)
        return grads, _reshape(aux, 2, (num_workers,))

    if layout.mesh is None:
        return of_device(pulled, batches)
    over = PartitionSpec(layout.axis)
    made: tuple[PyTree, Any] = jax.shard_map(
        of_device,
        mesh=layout.mesh,
        in_specs=(over, over),
        out_specs=(over, over),
        axis_names={layout.axis},
        # A loop in the user's gradient may carry what does not vary and then does.
        check_vma=False,
    )(pulled, batches)
    return made


def _each(function: Callable[[Any], Any], stack: PyTree, in_turn: bool) -> Any:
    if _length(stack) == 1:  # as it is: no batch of one, no loop
        result = function(jax.tree.map(lambda leaf: leaf[0], stack))
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], result)
    return jax.lax.map(function, stack) if in_turn else jax.vmap(function)(stack)


def _mean(stack: jax.Array) -> jax.Array:
    return stack[0] if stack.shape[0] == 1 else stack.mean(0)


def _length(stack: PyTree) -> int:
    return int(jax.tree.leaves(stack)[0].shape[0])


def _reshape(tree: PyTree, num_axes: int, shape: tuple[int, ...]) -> PyTree:
    """Gives the first axes of every leaf another shape."""
    return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[num_axes:]), tree)


def _mesh_of(layout: WorkerLayout) -> Mesh:
    assert layout.mesh is not None, "a layout without a mesh has no shardings"
    return layout.mesh


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)


def _tidy(entries: Any) -> PartitionSpec:
    """The spec without Nones at its end, as programs return it: another one is compiled again."""
    used = [at for at, entry in enumerate(entries) if entry is not None]
    return PartitionSpec(*entries[: used[-1] + 1 if used else 0])


def _names(entries: Any) -> list[str]:
    """The mesh axes that entries of a `PartitionSpec` name."""
    groups = [entry if isinstance(entry, tuple) else (entry,) for entry in entries]
    return [name for group in groups for name in group if isinstance(name, str)]
