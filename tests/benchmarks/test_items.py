"""What is deterministic in the items: bytes, programs, the same recursion on both sides."""

import json
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asgd_jax
from asgd_jax import models
from asgd_jax.training.step import cross_entropy
from benchmarks import delay_cost, growth, pytorch
from benchmarks.jax_worker import count_flops, make_epochs
from benchmarks.loops import NUM_BATCHES, make_loop, make_workload
from benchmarks.result import BenchOptions, Skipped
from benchmarks.run import ITEMS, item_names

ROOT = Path(__file__).parents[2]
HIDDEN = {"hidden": (8,), "activation": "relu"}
DELAY = 3


@pytest.fixture(scope="module")
def problem():
    return make_workload("mlp", 4, (4, 4, 1), **HIDDEN)


def test_a_loop_is_delayed_sgd_update_for_update(problem):
    updates = 6
    loop = make_loop(problem, asgd_jax.delayed(optax.sgd(0.1), DELAY), updates)
    measured = jax.tree.leaves(loop.run())

    def loss(params, index):
        images = problem.images[index].astype(jnp.float32) / 255
        logits = problem.model.apply({"params": params}, images, train=True)
        return cross_entropy(logits, problem.labels[index]).mean()

    past = [problem.variables["params"]]
    for step in range(updates):
        gradient = jax.grad(loss)(past[max(step - DELAY, 0)], step % NUM_BATCHES)
        past.append(jax.tree.map(lambda x, g: x - 0.1 * g, past[-1], gradient))
    for got, expected in zip(measured, jax.tree.leaves(past[-1]), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


# With the parameter sets that each must hold: the live parameters are in no ring of `delayed`, the
# newest gradient and momentum are in theirs.
RINGS = {
    "delayed": (lambda: asgd_jax.delayed(optax.sgd(0.1), DELAY), DELAY),
    "bfloat16": (
        lambda: asgd_jax.delayed(optax.sgd(0.1), DELAY, history_dtype=jnp.bfloat16),
        DELAY / 2,
    ),
    "gradients": (lambda: optax.chain(asgd_jax.delay_gradients(DELAY), optax.sgd(0.1)), DELAY + 1),
    "shifted": (
        lambda: asgd_jax.delayed(asgd_jax.shifted_sgd(0.1, 0.9, DELAY), DELAY),
        2 * DELAY + 1,
    ),
    "plain": (lambda: optax.sgd(0.1), 0),
}


@pytest.mark.parametrize("name", RINGS)
def test_the_bytes_of_the_rings_are_those_of_their_slots(name, problem):
    make, sets = RINGS[name]
    loop = make_loop(problem, make(), 2)
    assert loop.parameter_bytes == 4 * (16 * 8 + 8 + 8 * 10 + 10)
    assert loop.history_bytes == sets * loop.parameter_bytes


def test_further_updates_compile_nothing(problem):
    loop = make_loop(problem, asgd_jax.delayed(optax.sgd(0.1), DELAY), 2)
    compiled = []
    jax.block_until_ready(loop.run())
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiled.append(event) if "compile" in event else None
    )
    try:
        for _ in range(3):
            jax.block_until_ready(loop.run())
    finally:
        jax.monitoring.clear_event_listeners()
    assert compiled == []


def test_the_delay_item_finds_the_history_exact():
    case = delay_cost.QUICK_CASES[0]._replace(delays=(1, 4))
    small = make_workload(case.model, case.batch_size, **case.model_options)
    rows, goals = delay_cost.measure_group(case, small, delay_cost.groups(case)[0])
    assert [row["history (sets)"] for row in rows] == [1.0, 4.0]
    exact = [one for one in goals if "exactly" in one.claim]
    assert [one.holds for one in exact] == [True]


def test_every_case_has_the_delays_and_the_transforms_that_are_asked_for():
    for case in delay_cost.CASES:
        assert case.delays == (0, 1, 8, 32, 64, 128)
        names = [group.name for group in delay_cost.groups(case)]
        assert names == ["delayed", "delay_gradients", "shifted"]


def test_a_sharded_history_falls_with_the_devices():
    one, four = growth.history_on_devices((1, 4))
    assert one["history (bytes/device)"] == one["history (bytes)"]
    # What the devices do not divide, the ten biases of the last layer, stays whole on each.
    whole = 32 * 4 * 10
    assert four["history (bytes/device)"] == (one["history (bytes)"] - whole) // 4 + whole


def test_fits_are_against_the_quantity_that_grows():
    rows = [{"width": w, "parameters": w * w, "us/update": 2.0 * w * w} for w in (2, 4, 8)]
    (fit,) = growth.fit("width", rows, ("us/update",))
    assert (fit["against"], round(fit["exponent"], 9)) == ("parameters", 1.0)


def write_task(folder, batch_size=4):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (24, 8, 8, 1), np.uint8)
    np.savez(folder / "arrays.npz", images=images, labels=random.integers(0, 10, 24, np.int32))
    return {
        "arrays": str(folder / "arrays.npz"),
        "model": "mlp",
        "model_options": {"hidden": [16]},
        "num_workers": 3,
        "batch_size": batch_size,
        "learning_rate": 0.1,
        "channels_last": False,
    }


def test_both_sides_of_the_comparison_learn_the_same(tmp_path):
    run = make_epochs(write_task(tmp_path))
    first, last = run(1), run(30)  # one epoch, then the last of 30 more
    assert last < first < 3.5
    pytest.importorskip("torch")
    from benchmarks import torch_worker

    theirs = torch_worker.make_eager_epochs(write_task(tmp_path))
    theirs(1)
    assert theirs(30) == pytest.approx(last, rel=0.5)


def test_without_pytorch_the_item_is_skipped_with_the_remedy(tmp_path):
    with pytest.raises(Skipped, match=r"pip install 'asgd-jax\[bench\]'"):
        pytorch.run(BenchOptions(quick=True, torch_python=str(tmp_path / "python")))


def test_pytorch_counts_its_faster_form_in_each_round():
    case = pytorch.QUICK_CASES[0]
    times = {"jax": [1.0, 1.0], "torch": [30.0, 12.0], "torch, NHWC": [20.0, 40.0]}
    row, (goal,) = pytorch.judge(case, 1, 1e9, times)
    assert row["speed / PyTorch"] == 16.0
    assert goal.holds


def test_operations_are_those_of_plain_convolutions():
    """By hand for LeNet: three products a layer, but no gradient of the image."""
    task = {"model": "mnist_cnn", "model_options": {}, "batch_size": 1}
    output = 2 * (576 * 25 * 20 + 64 * 500 * 50 + 800 * 500 + 500 * 10)
    first = 2 * 576 * 25 * 20  # of the image no gradient is asked for
    counted = count_flops(task, (28, 28, 1))
    assert 3 * output - first <= counted <= 1.05 * (3 * output - first)


def test_pytorch_models_have_the_parameters_of_ours():
    pytest.importorskip("torch")
    from benchmarks.torch_models import TORCH_MODELS

    for case in pytorch.CASES:
        height, width, channels = case.image_shape or (8, 8, 1)
        theirs = TORCH_MODELS[case.model]((channels, height, width), case.model_options).params
        model = models.create(case.model, num_classes=10, **case.model_options)
        image = jax.ShapeDtypeStruct((1, height, width, channels), "float32")
        ours = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image)["params"]
        assert sum(p.numel() for p in theirs) == sum(p.size for p in jax.tree.leaves(ours))


def test_items_are_asked_for_by_name():
    assert item_names("all") == list(ITEMS)
    with pytest.raises(ValueError, match="unknown item 'speed': use delay, pytorch"):
        item_names("delay,speed")


def test_the_script_runs_an_item_and_writes_both_files(tmp_path):
    done = subprocess.run(
        [sys.executable, "scripts/bench.py", f"--out={tmp_path}", "--quick", "--only=calculator"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    assert (report["quick"], list(report["items"])) == (True, ["calculator"])
    assert "A quick run" in (tmp_path / "README.md").read_text()


def test_the_script_refuses_a_mistake_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--only=speed"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "bench.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("bench.py: unknown item 'speed'")
    assert said.count("\n") == 1
