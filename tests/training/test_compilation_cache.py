"""The persistent cache: where it lies, and that a second process compiles nothing again."""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp
from asgd_jax.training.compilation_cache import use_compilation_cache
print(use_compilation_cache())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(float(jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))(jnp.arange(8.0))))
"""


def run(**environment):
    kept = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def entries(folder):
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir() if "cache" in file.name}


def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    folder = tmp_path / "asgd_jax" / "compiled"
    first = run(XDG_CACHE_HOME=str(tmp_path))
    assert first[0] == str(folder)
    programs = entries(folder)
    assert programs
    assert run(XDG_CACHE_HOME=str(tmp_path)) == first
    assert entries(folder) == programs


def test_the_environment_names_another_folder(tmp_path):
    assert run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))[0] == str(tmp_path / "mine")
