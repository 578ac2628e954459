"""What made a result: versions, devices, commit and fingerprint, as JSON files beside it."""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

Fingerprint = Mapping[str, Any]
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
    """Returns the git commit of this source, "-dirty" if changed since; None outside git.

    Recipes and laboratory count as well, results do not: those are what is being made.
    """
    folder = Path(__file__).parents[2]  # of the package

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        status = ("status", "--porcelain", "--untracked-files=no")
        changed = git(*status, "--", ":(top)", ":(top,exclude)results", ":(top,exclude)docs")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def plain(value: Any) -> Any:
    """Returns what is left of a value in JSON: tuples and arrays are lists, NaN and infinity None.

    >>> plain({"decay_epochs": (5, 8), "loss": np.float32("nan")})
    {'decay_epochs': [5, 8], 'loss': None}
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(file: Path, content: Any) -> None:
    """Writes what JSON can hold of `content`, see `plain`, all or nothing."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(plain(content), indent=2, allow_nan=False) + "\n")
    partial.replace(file)


def read_json(file: Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file, None where there is no file.

    Raises:
      ValueError: for a file that holds anything else.
    """
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object, so is no run's: name another workdir")
    return content


def refuse_mismatch(found: Fingerprint, wanted: Fingerprint, where: Path) -> None:
    """Raises the error that names the first field in which two fingerprints differ.

    >>> refuse_mismatch({"delay": 3}, {"delay": 7}, Path("runs/a"))
    Traceback (most recent call last):
    ...
    ValueError: runs/a has delay=3 and this configuration delay=7: name another workdir, or set
    delay=3
    """
    for field in {**wanted, **found}:
        there, here = found.get(field), wanted.get(field)
        if there != here:
            raise ValueError(
                f"{where} has {field}={there!r} and this configuration {field}={here!r}: "
                f"name another workdir, or set {field}={there!r}"
            )
