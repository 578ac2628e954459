"""Settings that every test runs under: CPU, eight fake devices, no silent dtype or rank change."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

from pathlib import Path

# Programs that scripts compile in tests are kept for the next test, out of the user's own cache.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "xdg")

import hypothesis
import jax
import pytest

# No assertion on time: a loaded machine is no failure.
hypothesis.settings.register_profile(
    "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")

STRICT_FOLDERS = ("transforms", "delays", "stability")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of every file that imports subprocess, for `make test-fast` to leave out."""
    for item in items:
        if hasattr(getattr(item, "module", None), "subprocess"):
            item.add_marker("process")


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
def tfds_data_dir() -> Path:
    """The folder with the real data sets; a test that asks for it skips where there is none."""
    folder = Path(os.environ.get("TFDS_DATA_DIR", Path(__file__).parents[2] / "shared" / "tfds"))
    if not (folder / "mnist").is_dir():
        pytest.skip(f"no prepared data sets in {folder}: set TFDS_DATA_DIR")
    os.environ["TFDS_DATA_DIR"] = str(folder)
    return folder
