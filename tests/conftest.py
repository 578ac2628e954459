"""Settings that every test runs under: CPU, eight fake devices, no silent dtype or rank change."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eigenvalues of small matrices; a worker a core leaves a second thread nothing but to spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import functools
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Programs that scripts compile in tests are kept for the next test, out of the user's own cache.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "xdg")

import hypothesis
import jax
import pytest
from jax._src import compiler  # options of every program at once have no public name

# What tests compile is kept there too, for the other workers and the next run; not by the
# environment, because scripts choose a cache for themselves.
jax.config.update(
    "jax_compilation_cache_dir", os.path.join(os.environ["XDG_CACHE_HOME"], "asgd_jax", "compiled")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# No assertion on time: a loaded machine is no failure.
hypothesis.settings.register_profile(
    "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")

# Every folder's has this name, and none has doctests to be collected.
collect_ignore = ["conftest.py"]

STRICT_FOLDERS = ("transforms", "delays", "stability")

# Most of the suite's time would go into optimising thousands of tiny programs that run once. XLA's
# passes over a program stay; LLVM's over its loops are left out, but for tests marked `optimised`:
# those that assert bits, bytes or copies, and those that run for longer than they would compile.
UNOPTIMISED = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,  # of tiny programs a split costs more than it saves
}
options_of_users = compiler.get_compile_options


def options_of_tests(*args: Any, env_options_overrides: Any = None, **kwargs: Any) -> Any:
    overrides = {**UNOPTIMISED, **(env_options_overrides or {})}
    return options_of_users(*args, env_options_overrides=overrides, **kwargs)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before fixtures of any scope: how the test's programs are compiled."""
    optimised = item.get_closest_marker("optimised") is not None
    if optimised and compiler.get_compile_options is options_of_tests:
        jax.clear_caches()  # what other tests left is not what users run
    compiler.get_compile_options = options_of_users if optimised else options_of_tests


# A trace makes millions of objects that reference counts free; looking for cycles among all that
# JAX, Flax and TensorFlow have loaded would be a tenth of the suite's time.
gc.set_threshold(200_000, 50, 50)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of every file that imports subprocess, for `make test-fast` to leave out, and
    puts the optimised ones first: what a worker has traced is forgotten once, not at each of them.
    """
    for item in items:
        if hasattr(getattr(item, "module", None), "subprocess"):
            item.add_marker("process")
    items.sort(key=lambda item: item.get_closest_marker("optimised") is None)


@pytest.fixture(scope="session", autouse=True)
def _children_compile_as_tests() -> Iterator[None]:
    """For the processes that tests start: this one has read its own flags, once for all."""
    jax.devices()
    flags = " ".join(f"--{name}={str(value).lower()}" for name, value in UNOPTIMISED.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} {flags}")
        yield


@pytest.fixture(autouse=True)
def _strict_jax(request: pytest.FixtureRequest):
    """The core promises never to promote a dtype or a rank behind the caller's back."""
    relaxed = request.node.get_closest_marker("standard_promotion") is not None
    if relaxed or request.path.parent.name not in STRICT_FOLDERS:
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="session")
def tfds_data_dir() -> Iterator[Path]:
    """The folder with the real data sets; a test that asks for it skips where there is none."""
    folder = Path(os.environ.get("TFDS_DATA_DIR", Path(__file__).parents[2] / "shared" / "tfds"))
    if not (folder / "mnist").is_dir():
        pytest.skip(f"no prepared data sets in {folder}: set TFDS_DATA_DIR")
    os.environ["TFDS_DATA_DIR"] = str(folder)
    with pytest.MonkeyPatch.context() as patch:
        _read_once(folder, patch)
        yield folder


def _read_once(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Keeps what is read from this folder, whose images take seconds to decode, for later tests."""
    from asgd_jax.data import in_memory

    read = in_memory._load_tfds

    @functools.cache
    def kept(name: str) -> Any:
        found = read(name, folder)
        for array in jax.tree.leaves(found):
            array.flags.writeable = False  # it is every test's
        return found

    def load(name: str, data_dir: Any) -> Any:
        here = str(data_dir or os.environ.get("TFDS_DATA_DIR")) == str(folder)
        return kept(name) if here else read(name, data_dir)

    patch.setattr(in_memory, "_load_tfds", load)
