"""Around a run: programs are kept for the next process, and no terminal is no reason to end."""

import io
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from asgd_jax.training import command
from asgd_jax.training.command import (
    THREADED_CONVOLUTIONS,
    progress_bar,
    use_compilation_cache,
    use_threaded_convolutions,
)

ROOT = Path(__file__).parents[2]
PROGRAM = """
import jax, jax.numpy as jnp
from asgd_jax.training.command import use_compilation_cache
print(use_compilation_cache())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(float(jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))(jnp.arange(8.0))))
"""
CONVOLUTION = """
import os, sys
import jax, jax.numpy as jnp
from asgd_jax.models.convolution import Window, convolve_by_lax
from asgd_jax.training import command
if sys.argv[1:]:
    print(command.use_threaded_convolutions(), os.environ["XLA_FLAGS"])
    print(command.use_a_device_a_core(), command.use_a_device_a_core(), jax.device_count())
window = Window((1, 1), ((1, 1), (1, 1)))
shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 28, 28, 32), (3, 3, 32, 64))]
program = jax.jit(convolve_by_lax, static_argnums=2).lower(*shapes, window).compile()
names = [line for line in program.as_text().splitlines() if "ROOT" in line and "28,28,64" in line]
print(" ".join(names))
"""


def run(program=PROGRAM, *arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
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


def test_the_flag_for_convolutions_is_accepted_and_gives_them_to_eigen():
    """A flag that XLA does not know ends the process; YNNPACK wraps the convolution in a fusion."""
    chosen, devices, compiled = run(CONVOLUTION, "choose", JAX_PLATFORMS="cpu", XLA_FLAGS="")
    assert chosen == f"True {THREADED_CONVOLUTIONS}"
    assert devices == f"True False {len(os.sched_getaffinity(0))}"
    assert " convolution(" in compiled
    (untouched,) = run(CONVOLUTION, JAX_PLATFORMS="cpu", XLA_FLAGS="")
    assert "ynn_fusion" in untouched


def test_flags_stay_where_the_user_has_chosen_or_another_compiler_reads_them(monkeypatch):
    mine = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT"
    monkeypatch.setenv("XLA_FLAGS", mine)
    assert not use_threaded_convolutions()
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    assert not use_threaded_convolutions()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(command.jaxlib.version, "__version_info__", (0, 99, 0))
    assert not use_threaded_convolutions()
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=x"


@pytest.fixture
def cache_option():
    """JAX's own setting, as it was before."""
    before = jax.config.jax_compilation_cache_dir
    yield lambda: jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", before)


def test_where_no_folder_can_be_had_the_cache_stays_off(monkeypatch, cache_option, tmp_path):
    """No home and a user without a name (containers); no right to write; a file in the way."""
    before = cache_option()
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert use_compilation_cache() is None
    (tmp_path / "file").touch()
    for folder in ("/proc/none", tmp_path / "file"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        assert use_compilation_cache() is None
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "read_only"))
    assert use_compilation_cache() is None
    assert cache_option() == before


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize(
    "stream", [None, SimpleNamespace(), closed()], ids=["none", "no", "closed"]
)
def test_no_bar_without_a_terminal(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(3, unit="step") as bar:
        bar.update(2)
        assert bar.disable


def test_a_terminal_shows_it_unless_told_not_to(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(4, unit="epoch", initial=1, show=False):
        assert terminal.getvalue() == ""
    with progress_bar(4, unit="epoch", initial=1) as bar:
        bar.update(3)
    assert "4/4" in terminal.getvalue()
    assert "epoch" in terminal.getvalue()


def test_train_with_standard_error_closed(tmp_path):
    arguments = [
        "--config=configs/digits.py", "--config.model=mlp", "--config.num_train=64",
        "--config.num_workers=1", "--config.worker_batch_size=32", "--config.epochs=1",
        f"--workdir={tmp_path}",
    ]  # fmt: skip
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "scripts/train.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout[:23]) == (0, "completed after 2 steps")
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "completed"
