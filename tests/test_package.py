"""The package as a whole: what importing it costs, and that its public names are documented."""

import inspect
import subprocess
import sys

import pytest

import asgd_jax

HEAVY = ("flax", "tensorflow", "tensorflow_datasets", "orbax", "ml_collections", "sklearn",
         "matplotlib", "tensorboardX", "tqdm", "absl.app")  # fmt: skip


def imported_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_core_import_is_light():
    loaded = imported_by("import asgd_jax")
    assert "jax" in loaded
    assert "asgd_jax.flax" not in loaded
    assert loaded.isdisjoint(HEAVY)


def test_training_imports_no_tensorflow():
    loaded = imported_by("import asgd_jax.training")
    assert loaded.isdisjoint({"tensorflow", "tensorflow_datasets", "matplotlib", "sklearn"})


@pytest.mark.parametrize("name", asgd_jax.__all__)
def test_every_public_name_is_documented(name):
    assert inspect.getdoc(getattr(asgd_jax, name))


@pytest.mark.parametrize("module", [asgd_jax.delays, asgd_jax.stability, asgd_jax.curvature])
def test_every_public_function_of_the_core_is_documented(module):
    names = getattr(module, "__all__", [])
    for name in names:
        assert inspect.getdoc(getattr(module, name)), name
