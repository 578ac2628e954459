"""What is released: the files of wheel and sdist, and the wheel in an environment of its own."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import asgd_jax

ROOT = Path(__file__).parents[2]
NO_NETWORK = re.compile(
    "NewConnectionError|ConnectTimeoutError|NameResolutionError|Network is unreachable|"
    "Temporary failure in name resolution|Connection refused"
)
FIVE_LINES = """
import asgd_jax, jax, jax.numpy as jnp, optax, sys

params, batch = {"w": jnp.array([1.0, -2.0])}, jnp.array([2.0, 1.0])
loss = lambda params, batch: jnp.sum(batch * params["w"] ** 2) / 2

tx = asgd_jax.delayed(optax.sgd(0.01), delay=32)
state = tx.init(params)
for _ in range(3):
    grads = jax.grad(loss)(asgd_jax.stale_params(state, params), batch)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)

assert int(asgd_jax.metrics(state, params).staleness) == 3
print(*params["w"])
print(asgd_jax.stability.max_learning_rate(32, sharpness=20.0, momentum=0.9, kind="shifted"))
heavy = [name for name in sys.modules if name.partition(".")[0] in
         ("flax", "tensorflow", "sklearn", "matplotlib", "orbax", "ml_collections", "tqdm")]
assert not heavy, heavy
try:
    import asgd_jax.flax
except ModuleNotFoundError as error:
    print(error)
"""


def run(*command, **options):
    """The output of a program that succeeds; skips where it asked a network that is not there.

    Without PYTHONPATH, on which pip would find the checkout and call it installed.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, **options
    )
    said = done.stdout + done.stderr
    if done.returncode and NO_NETWORK.search(said):
        pytest.skip("pip reaches no package index here")
    assert done.returncode == 0, said[-3000:]
    return done.stdout


@pytest.fixture(scope="module", name="dist")
def _dist(tmp_path_factory):
    """Wheel and sdist of the checkout, built from a copy so that nothing is left in it."""
    copy = tmp_path_factory.mktemp("checkout") / "asgd_jax"
    left_out = shutil.ignore_patterns(
        ".*", "results", "runs", "demo", "build", "dist", "site", "__pycache__", "*.egg-info"
    )
    shutil.copytree(ROOT, copy, ignore=left_out)
    run(sys.executable, "-m", "build", str(copy))
    return copy / "dist"


def library_files():
    files = (path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*"))
    return {str(path) for path in files if path.suffix == ".py" or path.name == "py.typed"}


@pytest.mark.slow
def test_the_wheel_holds_the_library_only(dist):
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name == f"asgd_jax-{asgd_jax.__version__}-py3-none-any.whl"
    assert {name for name in names if ".dist-info/" not in name} == library_files()


@pytest.mark.slow
def test_the_sdist_holds_the_library_only(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    packages = {name.removeprefix("src/") for name in names if name.endswith((".py", "py.typed"))}
    assert packages == library_files()
    assert {name.partition("/")[0] for name in names} - {""} == {
        "src", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg",
    }  # fmt: skip


def install(dist, home):
    """The folder of programs of a new environment: the wheel, its dependencies, nothing else."""
    run(sys.executable, "-m", "venv", "--without-pip", str(home))
    (wheel,) = dist.glob("*.whl")
    pins = str(ROOT / "requirements.txt")
    programs = home / "bin"
    pip = (sys.executable, "-m", "pip", "--python", str(programs / "python"))
    # No bytecode ahead of time: most of what is installed is never imported.
    run(*pip, "install", "--quiet", "--no-compile", "--constraint", pins, str(wheel))
    installed = run(*pip, "list", "--format=freeze")
    assert not re.search("flax|tensorflow|scikit|matplotlib|orbax", installed, re.IGNORECASE)
    return programs


@pytest.mark.slow
def test_the_core_works_with_its_own_dependencies_alone(dist, tmp_path):
    """One test: an environment takes a minute to make, and workers share none."""
    programs = install(dist, tmp_path / "bare")
    python = str(programs / "python")
    printed = run(python, "-c", FIVE_LINES, cwd=tmp_path).split(maxsplit=3)
    assert printed[3].strip() == "asgd_jax.flax needs Flax: pip install flax"
    # Three updates within the delay: all three gradients are those of the first parameters.
    expected = [1.0 * (1 - 3 * 0.01 * 2.0), -2.0 * (1 - 3 * 0.01 * 1.0)]
    assert [float(number) for number in printed[:2]] == pytest.approx(expected, rel=1e-5)
    assert float(printed[2]) == pytest.approx(0.0613709 / 20, rel=1e-5)

    arguments = ("--delay=32", "--momentum=0.9", "--kind=shifted", "--sharpness=20")
    for command in ((python, "-m", "asgd_jax.stability"), (str(programs / "asgd-stability"),)):
        said = run(*command, *arguments, cwd=tmp_path)
        assert re.search(r"\* shifted +0\.0030685", said)
        assert re.search(r"no momentum +0\.0024164", said)


def test_every_file_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = re.findall(
        r"^## \[(\d+\.\d+\.\d+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert citation["version"] == asgd_jax.__version__ == released[0][0]
    assert str(citation["date-released"]) == released[0][1]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]
    supported = re.search(r"SUPPORTED=\((.*)\)", (ROOT / ".ci" / "matrix").read_text())[1].split()
    assert [each.rpartition(" ")[2] for each in project["classifiers"] if "3." in each] == supported
    assert project["requires-python"] == f">={supported[0]}"


def test_the_library_parses_under_the_oldest_python():
    """Syntax of a later Python would pass here and fail there."""
    for file in (ROOT / "src").rglob("*.py"):
        ast.parse(file.read_text(), feature_version=(3, 11))


@pytest.mark.parametrize("name", ["asgd-stability", "python -m asgd_jax.stability"])
def test_a_mistake_is_reported_under_the_name_that_was_called(name, monkeypatch, capsys):
    from asgd_jax.stability.__main__ import main

    started = "/somewhere/bin/asgd-stability" if name == "asgd-stability" else "__main__.py"
    monkeypatch.setattr(sys, "argv", [started])
    with pytest.raises(SystemExit):
        main(["--delay", "many"])
    assert capsys.readouterr().err.startswith(f"{name}: ")
