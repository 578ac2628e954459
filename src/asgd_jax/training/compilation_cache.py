"""XLA's compiled programs, kept between processes: a second start compiles nothing again."""

import os
from pathlib import Path

import jax


def use_compilation_cache() -> str:
    """Turns JAX's persistent compilation cache on, for scripts; returns its folder.

    JAX_COMPILATION_CACHE_DIR names the folder; without it, one in the user's cache folder
    (XDG_CACHE_HOME or ~/.cache). What is kept there are programs, found by their code, options
    and versions: deleting the folder costs nothing but time.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")  # JAX reads it by itself
    if not folder:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = str(Path(home) / "asgd_jax" / "compiled")
        jax.config.update("jax_compilation_cache_dir", folder)
    return folder
