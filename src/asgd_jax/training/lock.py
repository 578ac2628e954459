"""One process a folder: two that write the same run would mix their tables and checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

FILE = ".lock"


@contextmanager
def hold_folder(workdir: Path) -> Iterator[None]:
    """Within it, no other run can hold `workdir`, which is made if it does not exist.

    An advisory lock (`flock`) on `workdir`/.lock: the kernel gives it up when the process ends, in
    whatever way, so a file that was left behind locks nobody out. Of several processes of one run
    the first holds it for all. Where nothing can be locked (no `flock` on the platform or the file
    system, a folder that is read-only) nothing is.

    Raises:
      ValueError: when another process holds the folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, hold_folder(Path(folder)):
    ...     (Path(folder) / FILE).exists()
    True
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    if jax.process_index() != 0:
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / FILE).open("ab")
    except OSError:  # what the run writes first says it better
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{workdir} is in use by another process that trains there: "
                "wait for it, stop it, or name another workdir"
            ) from None
        except OSError:  # ENOLCK, ENOTSUP: a file system without locks
            pass
        yield
