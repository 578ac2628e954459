"""Ray, started and stopped: on this machine, or joined at an address.

A local cluster listens on the loopback alone, asks for Ray's token (its default, which is left on)
and has neither dashboard nor usage reports. It ends with this process, however that ends.
"""

import importlib.util
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# What Ray reads once, when it is imported.
_RAY_SETTINGS = {
    # On Linux Ray would listen on all interfaces; this is its own switch for machines that are no
    # clusters.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_SMALLEST_STORE = 80 * 2**20  # bytes; Ray's own limit is 75 MiB


def require_ray() -> None:
    """Refuses to go on without Ray.

    Raises:
      ValueError: saying what to install.
    """
    if importlib.util.find_spec("ray") is None:
        raise ValueError("Ray is not installed: pip install 'asgd-jax[train,ray]'")


@contextmanager
def open_ray(
    address: str | None, *, num_cpus: int, store_bytes: int = _SMALLEST_STORE
) -> Iterator[Any]:
    """Within it Ray runs; yields the module `ray`.

    A cluster that this process has joined already is used as it is, and not left. Without an
    address one is started here with `num_cpus` slots, one a process, however many cores there are,
    and stopped at the end.

    Args:
      address: of a running cluster ("auto": the one of this machine), or None.
      num_cpus: slots of a cluster that is started.
      store_bytes: of its object store, at least.

    Raises:
      ValueError: where Ray is not installed, or no cluster answers at the address.
    """
    require_ray()
    if address is None:
        for name, value in _RAY_SETTINGS.items():
            os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield ray
        return
    # Ray says at the start that it has started; only what is wrong is wanted.
    common = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        with _quiet_logs():
            if address is None:
                ray.init(
                    num_cpus=num_cpus,
                    num_gpus=None,
                    include_dashboard=False,
                    object_store_memory=_size_of_store(store_bytes),
                    **common,
                )
            else:
                ray.init(address=address, **common)
    except (ConnectionError, RuntimeError) as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"no Ray cluster at address={address!r}: {line}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _size_of_store(wanted: int) -> int:
    """What is wanted, and no more than half of the shared memory that is free."""
    try:
        room = shutil.disk_usage("/dev/shm").free // 2
    except OSError:  # no Linux
        room = wanted
    return max(min(wanted, room), _SMALLEST_STORE)


@contextmanager
def _quiet_logs() -> Iterator[None]:
    logger = logging.getLogger("ray")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # JAX warns of every fork; that of a process which has computed nothing is harmless.
            warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)
            yield
    finally:
        logger.setLevel(before)


def worker_environment(*, accelerator: bool = False) -> dict[str, str]:
    """Returns the environment of a process that computes beside others: one thread of XLA's.

    Without an accelerator of its own JAX is to look for none. A replay must run under the same
    settings: how many threads share a sum decides how it is rounded.

    >>> worker_environment()["JAX_PLATFORMS"]
    'cpu'
    """
    settings = {
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        "NPROC": "1",  # XLA's pool of threads
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0",  # all wait for the result: no thread in between
        # Every version is new memory: glibc would fetch it from the kernel, page by page, and give
        # it back at each update.
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    }
    return settings if accelerator else {**settings, "JAX_PLATFORMS": "cpu"}
