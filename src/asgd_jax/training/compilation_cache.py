"""XLA's compiled programs, kept between processes: a second start compiles nothing again."""

import os
from pathlib import Path

import jax


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
    return folder
