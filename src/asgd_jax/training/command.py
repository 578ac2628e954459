"""What a command does around its runs: signals, exit codes, progress bar, compiled programs."""

import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jaxlib.version
import numpy as np

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(Exception):
    """A run was asked to stop, and has: its checkpoint is written, rerunning resumes it.

    Attributes:
      step: updates made, all of them saved.
    """

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step}, which is saved: run the same command to resume")
        self.step = step


@contextmanager
def catch_signals() -> Iterator[Callable[[], bool]]:
    """Within it SIGTERM and SIGINT kill nobody: they make the yielded `stop_requested()` true.

    Python heeds a signal between two calls of compiled code, and a run asks at the end of a chunk:
    `log_every_steps` bounds how long it goes on, and is to be chosen below the grace period of the
    cluster. A second SIGINT, of somebody who won't wait, raises KeyboardInterrupt. Of several
    processes all stop when any was asked to: all must call `stop_requested` at the same steps.
    Outside the main thread, where Python delivers no signals, nothing is caught.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True

    def stop_requested() -> bool:
        if jax.process_count() == 1:
            return asked
        from jax.experimental.multihost_utils import process_allgather

        return bool(np.any(process_allgather(np.asarray(asked))))

    if threading.current_thread() is not threading.main_thread():
        yield stop_requested
        return
    previous = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield stop_requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def exit_code(program: str, *, stopped: str | None = None) -> Iterator[list[int]]:
    """Within it an error is one line on standard error; afterwards `[code]` has the exit code.

    That is 0, or 2 for a mistake of the user's (ValueError, OSError), 75 when stopped by a signal
    at a checkpoint, 130 when interrupted elsewhere.

    Args:
      program: its name, with which the line begins.
      stopped: what to say when it was stopped, if not that the same command resumes.

    >>> with exit_code("demo") as code:
    ...     pass
    >>> code
    [0]
    """
    code = [0]
    try:
        yield code
        return
    except (OSError, ValueError) as error:
        code[0], line = 2, " ".join(str(error).split())
    except Preempted as stop:
        code[0], line = EXIT_CODE, stopped or str(stop)
    except KeyboardInterrupt:
        code[0], line = 130, stopped or "interrupted; what is finished is kept"
    print(f"{program}: {line}", file=sys.stderr)


def run_command(program: str, command: Callable[[], None], *, stopped: str | None = None) -> int:
    """Runs what a command line asks for; returns its exit code, see `exit_code`.

    >>> run_command("demo", lambda: None)
    0
    """
    with exit_code(program, stopped=stopped) as code:
        command()
    return code[0]


def named_folder(text: str, option: str) -> Path:
    """Returns the folder that an option of a command line names; `~` is a home folder.

    Raises:
      ValueError: for an address, or the home folder of nobody.

    >>> named_folder("gs://bucket/run", "workdir")
    Traceback (most recent call last):
    ...
    ValueError: workdir='gs://bucket/run' must be a folder: mount the bucket (gcsfuse) and name its
    mount point
    """
    if "://" in text:
        raise ValueError(
            f"{option}={text!r} must be a folder: mount the bucket (gcsfuse) and name its mount "
            "point"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{option}={text!r} begins with a home folder that is not known: name the whole path, "
            f"or ./{text}"
        ) from error


def progress_bar(total: int, *, unit: str, initial: int = 0, show: bool = True) -> Any:
    """Returns tqdm's bar, a context manager with `update(n)`; silent where no terminal sees it.

    Args:
      total: units in all.
      unit: what is counted.
      initial: units done already.
      show: False for silence on a terminal too.
    """
    from tqdm import tqdm

    return tqdm(total=total, initial=initial, unit=unit, disable=not (show and _on_terminal()))


def _on_terminal() -> bool:
    # None where the descriptor is closed (`2>&-`); a stand-in for a stream may lack the method.
    try:
        return bool(sys.stderr.isatty())
    except (AttributeError, ValueError, OSError):
        return False


def use_compilation_cache() -> str | None:
    """Turns JAX's persistent compilation cache on, for scripts; returns its folder.

    JAX_COMPILATION_CACHE_DIR names the folder; without it, one in the user's cache folder
    (XDG_CACHE_HOME or ~/.cache). What is kept there are programs, found by their code, options
    and versions: deleting the folder costs nothing but time, and so does having none: where there
    is no home folder, or it cannot be written to, the cache stays off and None is returned.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")  # JAX reads it by itself
    if not folder:
        try:
            home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            folder = str(Path(home) / "asgd_jax" / "compiled")
            os.makedirs(folder, exist_ok=True)
        except (OSError, RuntimeError):  # pathlib's, for a user without a home
            return None
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            return None
        jax.config.update("jax_compilation_cache_dir", folder)
    # JAX keeps only what took a second or more: of a small run nothing, and it has ten programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


# What else YNNPACK does, sums along axes, it does well.
THREADED_CONVOLUTIONS = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE"


def use_threaded_convolutions() -> bool:
    """Has XLA share every convolution on a CPU among all threads, for scripts; returns if it does.

    XLA hands 3x3 convolutions of many shapes to YNNPACK, which runs each on one thread; its other
    library, Eigen, uses all: on two cores a step of a CNN takes .65 (mnist_cnn_bn) to .9 of the
    time (see results/bench). To be called before JAX has met its devices, as that is when XLA reads
    XLA_FLAGS. Nothing is changed where these name the choice already, and where the flag could be
    unknown, which would end the process: beside an accelerator's plugin, or another jaxlib.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    name = THREADED_CONVOLUTIONS.partition("=")[0]
    known = jaxlib.version.__version_info__[:2] == _JAXLIB_WITH_FLAG
    if name in flags or not known or _has_accelerator_plugin():
        return False
    os.environ["XLA_FLAGS"] = f"{flags} {THREADED_CONVOLUTIONS}".strip()
    return True


_JAXLIB_WITH_FLAG = (0, 10)
_NUM_CPU_DEVICES = "--xla_force_host_platform_device_count"


def use_a_device_a_core() -> bool:
    """Has JAX count every core of a CPU as a device, for scripts that sweep; returns if it does.

    A sweep divides its runs over the devices, and small steps gain nothing from a second thread: on
    two cores it makes 1.5 to 2.2 times as many updates a second (see results/bench). To be called
    before JAX has met its devices; a number of devices in XLA_FLAGS stays.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _NUM_CPU_DEVICES in flags:
        return False
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ["XLA_FLAGS"] = f"{flags} {_NUM_CPU_DEVICES}={cores}".strip()
    return True


def _has_accelerator_plugin() -> bool:
    """Whether JAX may find a TPU or GPU here; JAX_PLATFORMS=cpu rules it out."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    plugins = ("libtpu", "jax_plugins")  # every plugin but libtpu lives in that namespace
    return any(importlib.util.find_spec(plugin) is not None for plugin in plugins)
