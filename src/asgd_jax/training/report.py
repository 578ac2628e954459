"""What made a result: versions, device, commit, configuration; and where it is written."""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np

PACKAGES = ("asgd-jax", "jax", "jaxlib", "optax", "flax", "numpy", "scipy", "tensorflow-datasets")


def environment() -> dict[str, Any]:
    """Returns versions of Python and the packages, the devices and the commit of the source.

    >>> sorted(environment())
    ['commit', 'device', 'versions']
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = jax.devices()
    device = {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "host_cores": os.cpu_count(),
    }
    return {"versions": versions, "device": device, "commit": commit()}


def commit() -> str | None:
    """Returns the git commit of this source, "-dirty" if changed since; None outside git."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(folder))
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


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


def write_json(file: Path, content: Any) -> None:
    """Writes `content` as JSON, all or nothing; NaN and infinity, which JSON lacks, become null."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")
    partial.replace(file)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
