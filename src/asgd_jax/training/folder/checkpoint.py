"""Checkpoints of a run: saved asynchronously by Orbax, refused when they do not fit the run.

`workdir/checkpoints/STEP/` holds the whole train state, history and momentum included, and a JSON
of what else a resumed run must know. Orbax writes into `STEP.orbax-checkpoint-tmp` and renames it
at the end, so a process that is killed leaves either a whole checkpoint or one that is skipped. A
checkpoint counts as saved when its index has been read back: Orbax can leave a part out with no
more than a warning.
"""

import contextlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asgd_jax.checksum import checksum
from asgd_jax.training.folder.provenance import Fingerprint, refuse_mismatch

PyTree = Any

FOLDER = "checkpoints"
FORMAT = 2
# A storage format can lose a piece and read zeros in its place; this cannot be fooled so.
_checksum = jax.jit(checksum)


class Checkpoints(NamedTuple):
    """The checkpoints of a run. In a run of several processes all of them call, at the same steps.

    Attributes:
      save: `save(step, state, progress, error=None)`: starts to write a checkpoint and returns
        while that goes on; `state` may be donated right away. `progress` is JSON. `error` ranks the
        checkpoint: the one with the smallest is kept beside the last ones. Raises OSError when this
        or the previous checkpoint cannot be written, or the previous one not be read back.
      restore: `restore(template)`: (state, progress) of the last checkpoint, or None where there is
        none. The state has the template's structure and shardings, and buffers that may be donated;
        the template's own are freed first. Raises ValueError when the checkpoint is damaged, or of
        other shapes than the template.
      close: `close()`: waits until everything is written and read back; raises as `save` does.
    """

    save: Callable[..., None]
    restore: Callable[[PyTree], tuple[PyTree, dict[str, Any]] | None]
    close: Callable[[], None]


def open_checkpoints(workdir: Path, fingerprint: Fingerprint, *, keep: int = 3) -> Checkpoints:
    """Opens the checkpoints of the run in `workdir`.

    Args:
      workdir: folder of the run.
      fingerprint: JSON of what must not change between a run and its resumption.
      keep: how many of the last checkpoints stay; the best one stays too.

    Raises:
      ValueError: one line, when the last checkpoint is damaged, foreign or of another fingerprint,
        or checkpoints in a folder of that name would be lost.
      OSError: when the folder cannot be written to.
    """
    refuse_pattern(workdir)
    folder = (workdir / FOLDER).absolute()
    last = last_step(workdir)
    found = None if last is None else _read_meta(folder / str(last))
    if found is not None:
        refuse_mismatch(found["fingerprint"], fingerprint, folder / str(last))
    _refuse_damaged_errors(folder)
    manager = _open_manager(folder, keep)
    unchecked: int | None = None  # the step that was written last

    def check_saved() -> None:
        nonlocal unchecked
        step, unchecked = unchecked, None  # what fails is said once
        manager.wait_until_finished()
        if step is not None and jax.process_index() == 0:
            _read_back(folder / str(step))

    def save(
        step: int, state: PyTree, progress: dict[str, Any], error: float | None = None
    ) -> None:
        import orbax.checkpoint as ocp

        nonlocal unchecked
        meta = {
            "format": FORMAT,
            "fingerprint": dict(fingerprint),
            "leaves": _describe(state),
            "checksum": int(_checksum(state)),
            "progress": progress,
        }
        meta["own_checksum"] = _text_checksum(meta)
        with _clear_errors(folder):
            check_saved()
            started = manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
                ),
                metrics={"error": np.inf if error is None or np.isnan(error) else error},
            )
            if not started:
                raise OSError(f"step {step} is not later than step {manager.latest_step()}")
            unchecked = step

    def restore(template: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
        if last is None or found is None:
            return None
        _refuse_other_leaves(found["leaves"], _describe(template), folder / str(last))
        return _restore_state(manager, last, template, found), found["progress"]

    def close() -> None:
        with _clear_errors(folder), contextlib.closing(manager):
            check_saved()

    return Checkpoints(save, restore, close)


def refuse_pattern(workdir: Path) -> None:
    r"""Raises the error that refuses a folder in which checkpoints would be lost.

    Orbax looks for the parts of a checkpoint by a pattern that begins with its folder: it finds
    nothing below `a[b]`, and below `a*b` what another run is writing to `axb`.

    >>> refuse_pattern(Path("/runs/lr[0.1]"))
    Traceback (most recent call last):
    ...
    ValueError: workdir='/runs/lr[0.1]' holds '[', which checkpoints cannot be kept below: ...
    """
    path = workdir.absolute().as_posix()
    special = re.search(r"[*?\[\\\ud800-\udfff]", path)
    if special:
        raise ValueError(
            f"workdir={path!r} holds {special[0]!r}, which checkpoints cannot be kept below: "
            "name another folder"
        )


def last_step(workdir: Path) -> int | None:
    """Returns the step of the last checkpoint that was written to its end; None without any."""
    folder = workdir / FOLDER
    if not folder.is_dir():
        return None
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    return max((int(name) for name in names if name.isdecimal()), default=None)


def _read_meta(checkpoint: Path) -> dict[str, Any]:
    try:
        meta = json.loads((checkpoint / "meta" / "metadata").read_text())
    except FileNotFoundError as error:
        raise ValueError(
            f"{checkpoint} is no checkpoint of asgd_jax: name another workdir, or delete it"
        ) from error
    except ValueError as error:
        raise _damaged(checkpoint, error) from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(
            f"{checkpoint} is no checkpoint of this version of asgd_jax: name another workdir, or "
            "delete it"
        )
    if meta.pop("own_checksum", None) != _text_checksum(meta):
        raise _damaged(checkpoint, "its metadata has changed")
    return meta


def _read_back(checkpoint: Path) -> None:
    """Refuses a checkpoint that was written without complaint, but not whole."""
    import orbax.checkpoint as ocp

    try:
        wanted = len(_read_meta(checkpoint)["leaves"])
        found = len(jax.tree.leaves(ocp.StandardCheckpointHandler().metadata(checkpoint / "state")))
    except Exception as error:  # what is missing decides what is raised
        raise OSError(f"step {checkpoint.name} cannot be read back: {_reason(error)}") from error
    if found != wanted:
        raise OSError(f"step {checkpoint.name} holds {found} arrays of {wanted}")


def _text_checksum(meta: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _refuse_damaged_errors(folder: Path) -> None:
    """Orbax reads the error of every checkpoint at once, and does not say which it cannot read."""
    for file in folder.glob("*/metrics/metrics"):
        try:
            json.loads(file.read_text())
        except ValueError as error:
            raise _damaged(file.parents[1], error) from error


def _damaged(checkpoint: Path, reason: Exception | str) -> ValueError:
    return ValueError(
        f"{checkpoint} is damaged ({_first_line(reason)[:120]}): "
        "delete it to resume from the one before"
    )


def _describe(state: PyTree) -> dict[str, str]:
    """Name to dtype and shape of every leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def _refuse_other_leaves(
    found: Mapping[str, str], wanted: Mapping[str, str], checkpoint: Path
) -> None:
    for name in {**wanted, **found}:
        there, here = found.get(name, "nothing"), wanted.get(name, "nothing")
        if there != here:
            raise ValueError(
                f"{checkpoint} holds {there} as {name} and this run needs {here}: "
                "name another workdir"
            )


def _restore_state(manager: Any, step: int, template: PyTree, meta: Mapping[str, Any]) -> PyTree:
    import orbax.checkpoint as ocp

    checkpoint = Path(manager.directory) / str(step)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), template
    )
    for leaf in jax.tree.leaves(template):
        leaf.delete()  # two states with their history may not fit
    try:
        found = manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
        )
    except Exception as error:  # what a damaged file raises depends on where the damage is
        raise _damaged(checkpoint, error) from error
    # Restored arrays can share memory with Orbax's own, which a donating step would write into
    # (jax issue 18617); copies cannot.
    copy = jax.jit(
        lambda tree: jax.tree.map(jnp.copy, tree),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes),
    )
    state = copy(found["state"])
    if int(_checksum(state)) != meta["checksum"]:
        raise _damaged(checkpoint, "its checksum is wrong")
    return state


def _open_manager(folder: Path, keep: int) -> Any:
    import orbax.checkpoint as ocp
    from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

    def error_of(metrics: Mapping[str, float]) -> float:
        return metrics.get("error", np.inf)

    best = policies.BestN(get_metric_fn=error_of, reverse=True, n=1)
    options = ocp.CheckpointManagerOptions(
        best_fn=error_of,
        best_mode="min",
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
        cleanup_tmp_directories=True,
    )
    with _clear_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return ocp.CheckpointManager(folder, options=options)


@contextlib.contextmanager
def _clear_errors(folder: Path) -> Iterator[None]:
    """Whatever Orbax raises when it cannot write, as one line that says where and why."""
    try:
        yield
    except Exception as error:
        raise OSError(f"cannot write checkpoints to {folder}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The operating system's words for an error where it has any, else the error's first line."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    code = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore, far down a long text
    return os.strerror(int(code[1])) if code else _first_line(error)


def _first_line(error: Exception | str) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
