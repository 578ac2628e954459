"""Data sets that TFDS has prepared, and what to say when they are missing.

TensorFlow only reads and decodes here. It is imported at the first use, never with the package, and
is kept away from the accelerators, which belong to JAX.
"""

import contextlib
import functools
import os
import re
import tempfile
import urllib.request
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from asgd_jax.data.facts import FACTS

# TFDS retries an unreachable host for minutes; one short request tells beforehand.
_PROBE_SECONDS = 5.0


class DatasetNotFoundError(FileNotFoundError):
    """A data set is neither prepared in the folder nor within reach of the network."""


@functools.cache
def tensorflow_modules() -> tuple[ModuleType, ModuleType]:
    """Returns the modules (tensorflow, tensorflow_datasets), quiet and without accelerators."""
    # All are read once, while TensorFlow starts. oneDNN serves nothing here but its greeting.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    if os.path.expanduser("~") == "~":  # no home: Keras would make a folder of that name here
        os.environ.setdefault("KERAS_HOME", os.path.join(tempfile.gettempdir(), "keras"))
    import tensorflow as tf

    # A program that has already used TensorFlow on the GPU chose so itself.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
    import tensorflow_datasets as tfds

    return tf, tfds


def resolve_data_dir(data_dir: str | os.PathLike[str] | None) -> str:
    """Returns the folder of prepared data: the argument, else TFDS_DATA_DIR, else TFDS's default.

    TFDS reads the variable only while it is imported; here it counts at the time of the call.

    Raises:
      ValueError: for a home folder that is not known, or a name in which TFDS sees a pattern of
        other folders' names.

    >>> resolve_data_dir("gs://bucket/tfds")
    'gs://bucket/tfds'
    """
    named = os.fspath(data_dir) if data_dir else os.environ.get("TFDS_DATA_DIR")
    folder = os.path.expanduser(named or os.path.join("~", "tensorflow_datasets"))
    reason = "begins with a home folder that is not known" if folder.startswith("~") else None
    if special := re.search(r"[*?[\ud800-\udfff]", folder):
        reason = f"holds {special[0]!r}, below which TFDS finds no data"
    if reason:
        raise ValueError(
            f"data_dir={folder!r} {reason}: set TFDS_DATA_DIR or --config.data_dir to another name "
            "of the folder"
        )
    return folder


def _url(name: str) -> str | None:
    return FACTS[name].url if name in FACTS else None


def _not_found(name: str, folder: str, reason: str) -> DatasetNotFoundError:
    reason = " ".join(reason.split())[:200]
    other = "run where the network lets TFDS download it"
    if _url(name) is None:
        other = f"prepare it from its archives with `tfds build {name}`"
    return DatasetNotFoundError(
        f"{name} is not in {folder} and was not downloaded ({reason}): set TFDS_DATA_DIR or "
        f"--config.data_dir to a folder that holds it, or {other}"
    )


def _download(builder: Any, name: str, folder: str) -> None:
    url = _url(name)
    if url is None:
        raise _not_found(name, folder, "TFDS has no automatic download of it")
    try:
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=_PROBE_SECONDS):
            pass
        builder.download_and_prepare()
    # Network, disk, checksum: whatever it was, the remedies are the same.
    except Exception as error:
        raise _not_found(name, folder, f"{type(error).__name__}: {error}") from error


def prepared_builder(name: str, data_dir: str | os.PathLike[str] | None = None) -> Any:
    """Returns the TFDS builder of a data set that is ready to read, downloading it when it can.

    Args:
      name: TFDS's name of the data set. Of the versions in the folder the newest is read.
      data_dir: folder (or `gs://` address) of prepared data; see `resolve_data_dir`.

    Returns:
      A `tfds.core.DatasetBuilder` whose `as_dataset` works; the same one for the same folder, which
      is read only at the first call.

    Raises:
      DatasetNotFoundError: one line with the data set, the folder looked in and the remedies.
        ImageNet is never downloaded: its archives need a licence, and preparing them takes hours.
    """
    return _open_builder(name, resolve_data_dir(data_dir))


@functools.lru_cache(maxsize=8)  # opening reads the folder, over the network for a gs:// address
def _open_builder(name: str, folder: str) -> Any:
    _, tfds = tensorflow_modules()
    try:
        builder = tfds.builder(f"{name}:*.*.*", data_dir=folder)
        prepared = builder.is_prepared()
    except Exception as error:  # TFDS has no common base class for what a folder can do to it
        raise _not_found(name, folder, f"{type(error).__name__}: {error}") from error
    if not prepared:
        _download(builder, name, folder)
    return builder


@contextlib.contextmanager
def reading(builder: Any) -> Iterator[None]:
    """Within it, prepared data is read: whatever TFDS and TensorFlow raise becomes one line.

    Raises:
      OSError: naming the data set, its folder and what was found there.

    >>> import types
    >>> with reading(types.SimpleNamespace(name="mnist", data_dir="/data/mnist/3.0.1")):
    ...     raise RuntimeError("truncated record at 15099")
    Traceback (most recent call last):
    ...
    OSError: mnist in /data/mnist/3.0.1 cannot be read (RuntimeError: truncated record at 15099):
    prepare it again, or name another folder by TFDS_DATA_DIR or --config.data_dir
    """
    try:
        yield
    except Exception as error:  # TensorFlow's have no base class in common with Python's
        # Of TensorFlow's text: without the node of the graph before it, and what follows the cause.
        words = re.sub(r"\{\{.*?\}\}|\[Op:.*", "", str(error), flags=re.DOTALL).split()
        raise OSError(
            f"{builder.name} in {builder.data_dir} cannot be read "
            f"({type(error).__name__}: {' '.join(words)[:300]}): prepare it again, or name another "
            "folder by TFDS_DATA_DIR or --config.data_dir"
        ) from error
