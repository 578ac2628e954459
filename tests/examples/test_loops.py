"""The example loops: complete, a few lines from the synchronous ones, and delayed as they say."""

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LOOPS = ("nnx", "equinox", "haiku")
# What may differ: a model's own way to take a gradient at other parameters.
CHANGED = {"nnx": 3, "equinox": 3, "haiku": 3}


@pytest.fixture(scope="module", params=LOOPS, name="loop")
def _loop(request):
    return request.param, runpy.run_path(str(EXAMPLES / f"{request.param}_loop.py"))


def test_the_delay_changes_the_wrapped_optimizer_and_the_point_of_the_gradient(loop):
    name, program = loop
    lines = program["difference"]().splitlines()[2:]
    added = [line[1:].strip() for line in lines if line.startswith("+")]
    assert added[0] == "def train_delayed(batches, delay):"
    assert len(added) - 1 <= CHANGED[name]
    assert sum("asgd_jax.delayed(" in line for line in added) == 1
    at_stale = ("stale_model(", "stale_params(", "asgd_jax.value_and_grad(")
    assert sum(any(call in line for call in at_stale) for line in added) == 1


def first(batches, number):
    return jax.tree.map(lambda leaf: leaf[:number], batches)


def test_the_first_update_of_a_delayed_run_is_the_synchronous_one(loop):
    """And later ones are not."""
    _, program = loop
    batches = program["make_batches"]()
    for number, same in ((1, True), (4, False)):
        ends = (
            program["train"](first(batches, number))[0],
            program["train_delayed"](first(batches, number), 8)[0],
        )
        leaves = zip(*map(jax.tree.leaves, ends), strict=True)
        close = all(np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in leaves)
        assert close is same


def test_main_prints_the_difference_and_two_losses_that_fall(loop, capsys):
    _, program = loop
    program["main"]()
    said = capsys.readouterr().out
    assert program["difference"]() in said
    for name in ("synchronous", "delay 8"):
        (line,) = (line for line in said.splitlines() if line.startswith(f"{name} "))
        before, after = (float(word) for word in line.split("loss ")[1].split(" -> "))
        assert after < 0.5 * before
