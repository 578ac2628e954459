"""Eight fake devices against one: the same trajectory, and 1/8 of the history on each."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from asgd_jax import data
from asgd_jax.training import Batch, set_up, train
from asgd_jax.training.advance import make_advance
from asgd_jax.training.folder.metrics import read_rows
from asgd_jax.training.mesh import (
    batch_sharding,
    initialize_processes,
    make_mesh,
    replicated,
)
from asgd_jax.training.step import make_gradient

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tiny_config):
    tiny_config.update(delay=3, log_every_steps=5)
    return tiny_config


def losses(config, folder):
    train(config, folder, progress=False)
    return [
        [row[name] for name in ("train_loss", "validation_loss", "gap", "gradient_norm")]
        for row in read_rows(folder)
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_devices": 8},
        {"num_devices": 8, "shard_history": True},
        {"num_devices": 8, "parallelism": "pmap"},
        {"num_devices": 8, "shard_history": True, "momentum": 0.9, "momentum_kind": "shifted"},
    ],
    ids=["jit", "sharded", "pmap", "sharded_momentum"],
)
def test_eight_devices_follow_one(config, changes, tmp_path):
    changes = dict(changes)
    config.update({key: changes.pop(key) for key in list(changes) if "momentum" in key})
    alone = losses(config, tmp_path / "one")
    config.update(changes)
    np.testing.assert_allclose(losses(config, tmp_path / "eight"), alone, rtol=2e-4, atol=1e-5)


def random_batch(plan, image_shape):
    random = np.random.default_rng(0)
    samples = (plan.workers_per_update, plan.worker_batch_size)
    images = random.integers(0, 256, (*samples, *image_shape), dtype=np.uint8)
    return Batch(images, random.integers(0, 10, samples, dtype=np.int32))


def compiled_step(setup, batch):
    """The train step as the feeds jit it, and its arguments where it wants them."""
    whole, split = replicated(setup.mesh), batch_sharding(setup.mesh)
    step = jax.jit(setup.run.advance, in_shardings=(whole, split), out_shardings=(whole, whole))
    arguments = jax.device_put((setup.state, batch), (whole, split))
    return step.lower(*arguments).compile(), arguments


@pytest.mark.parametrize(
    "changes",
    [
        {"delay": 0},
        {"delay": 1, "model": "digits_cnn", "conv_impl": "lax"},
        {"delay": 3, "model": "digits_cnn"},
        {"delay": 1, "model": "mnist_cnn_bn", "conv_impl": "lax"},
        {"delay": 1, "crops": True},
    ],
    ids=["ssgd", "partial_delay", "one_worker", "batch_norm", "crops"],
)
def test_each_of_four_devices_does_a_quarter_of_the_work(tiny_config, monkeypatch, changes):
    """Floating-point operations of a device, no image on another one, and the same update."""
    changes = dict(changes)
    if changes.pop("crops", False):
        tiny_config.augment = True
        monkeypatch.setattr(data, "augmenter", lambda name: data.random_crop_flip)
    if "model" in changes:
        tiny_config.model_options = ConfigDict()
    tiny_config.update(width=0.1, **changes)
    steps = []
    for num_devices in (1, 4):
        tiny_config.num_devices = num_devices
        setup = set_up(tiny_config)
        batch = random_batch(setup.feed.facts.plan, setup.feed.facts.image_shape)
        compiled, arguments = compiled_step(setup, batch)
        steps.append((compiled.cost_analysis()["flops"], compiled(*arguments)))
    (alone, one), (shared, four) = steps
    assert alone / 4 <= shared <= alone / 4 * 1.2
    for exchange in ("all-gather", "all-to-all", "collective-permute"):
        assert f" {exchange}(" not in compiled.as_text()
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


def bytes_on_first_device(tree):
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


def test_a_sharded_history_takes_an_eighth_on_each_device(config):
    config.num_devices = 8
    config.model_options.hidden = (64,)  # axes that eight divides, but for the last layer's bias
    whole = bytes_on_first_device(set_up(config).state.opt_state.history)
    config.shard_history = True
    setup = set_up(config)
    assert bytes_on_first_device(setup.state.opt_state.history) <= whole / 8 * 1.05
    after, _ = make_advance(config, setup)(setup.state, 0, 0, 3)
    assert bytes_on_first_device(after.opt_state.history) <= whole / 8 * 1.05
    stale = after.opt_state.stale
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(stale))


def test_shifted_momentum_is_sharded_with_the_history(config):
    config.update(num_devices=8, momentum=0.9, momentum_kind="shifted")
    config.model_options.hidden = (64,)
    whole = bytes_on_first_device(set_up(config).state.opt_state.inner_state)
    config.shard_history = True
    state = set_up(config).state
    assert bytes_on_first_device(state.opt_state.inner_state) <= whole / 8 * 1.05


def test_pmap_normalises_by_the_batch_of_each_device(config):
    """Running statistics are the mean of what plain steps on each half of the batch would keep."""
    config.update(
        model="mnist_cnn_bn", width=0.1, num_devices=2, parallelism="pmap", delay=0, num_workers=1
    )
    config.conv_impl = "lax"
    config.model_options = ConfigDict()
    setup = set_up(config)
    put, get = setup.placement.put, setup.placement.get
    placed, totals = make_advance(config, setup)(put(setup.state), 0, 0, 1)
    assert int(totals.steps) == 1
    for leaf in jax.tree.leaves(placed):
        np.testing.assert_array_equal(leaf[0], leaf[1])
    state = get(placed)
    assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, setup.state)
    samples = np.asarray(data.epoch_batches(config.seed, 0, setup.feed.facts.plan))[0, 0]
    halves = []
    gradient = jax.jit(make_gradient(setup.run.model, setup.feed.facts.preprocess))
    for mine in np.split(samples, 2):
        images, labels = setup.feed.samples.train_images, setup.feed.samples.train_labels
        batch = Batch(images[mine][None], labels[mine][None])
        _, (stats, _, _) = gradient(setup.state.params, setup.state.batch_stats, batch, None)
        halves.append(stats)
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    for found, wanted in zip(
        jax.tree.leaves(state.batch_stats), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_batches_that_devices_cannot_share_are_refused(config):
    config.update(num_devices=8, worker_batch_size=12)
    with pytest.raises(ValueError, match=r"worker_batch_size=12 cannot be split over 8 devices.*6"):
        set_up(config)
    config.num_devices = 99
    with pytest.raises(ValueError, match=r"num_devices=99: 8 devices are visible"):
        set_up(config)


def test_processes_that_would_leave_devices_unused_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert make_mesh(8).size == make_mesh().size == 8
    with pytest.raises(ValueError, match=r"num_devices=4: the 2 processes .* num_devices=8"):
        make_mesh(4)


def test_replicas_over_several_processes_are_refused(config, monkeypatch):
    config.parallelism = "pmap"
    config.num_devices = 8
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"parallelism='pmap' .* 2 processes: .*'jit'"):
        set_up(config)


def test_without_jit_a_run_is_refused(config):
    with jax.disable_jit(), pytest.raises(ValueError, match="JAX_DISABLE_JIT is set"):
        set_up(config)


@pytest.mark.parametrize(
    ("coordinator", "message"),
    [
        ("127.0.0.1:{port}", r"did not answer within coordinator_timeout=1 s \(.*refused\)"),
        ("nowhere.invalid:{port}", r"did not answer within coordinator_timeout=1 s"),
        ("127.0.0.1:99999", r"did not answer within coordinator_timeout=1 s"),
        ("127.0.0.1", r"must be HOST:PORT"),
    ],
    ids=["nobody", "no_host", "no_port", "no_address"],
)
def test_a_coordinator_that_does_not_answer_is_one_line(coordinator, message):
    with socket.socket() as free:  # bound and not listening: refuses every connection
        free.bind(("127.0.0.1", 0))
        coordinator = coordinator.format(port=free.getsockname()[1])
        with pytest.raises(ValueError, match=f"^coordinator='{coordinator}' {message}") as caught:
            initialize_processes(coordinator, 2, 1, timeout=1)
    assert len(str(caught.value).splitlines()) == 1


def start_processes(count, workdir, *arguments):
    """Runs scripts/train.py as `count` real processes that talk over this machine's loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} "
        f"--xla_force_host_platform_device_count={2 // count}",
    }
    joined = ["--config.multihost=true", f"--config.num_processes={count}",
              f"--config.coordinator=127.0.0.1:{port}"]  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "scripts/train.py", f"--workdir={workdir}", *arguments]
            + ([*joined, f"--config.process_id={index}"] if count > 1 else []),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def run_processes(count, workdir, *arguments):
    codes, outputs = start_processes(count, workdir, *arguments)
    assert codes == [0] * count, "\n".join(outputs)
    return json.loads((workdir / "summary.json").read_text())


@pytest.mark.slow
def test_two_processes_on_one_device_are_told_so(tmp_path):
    codes, outputs = start_processes(
        2, tmp_path / "run", "--config=configs/digits.py", "--config.num_devices=1"
    )
    assert codes == [2, 2], outputs
    assert all("train.py: num_devices=1: the 2 processes" in out for out in outputs), outputs
    assert not (tmp_path / "run").exists()


TOGETHER = [
    "--config=configs/digits.py:asgd", "--config.model=mlp", "--config.num_devices=2",
    "--config.num_workers=4", "--config.delay=3", "--config.worker_batch_size=16",
    "--config.epochs=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return run_processes(1, tmp_path_factory.mktemp("one"), *TOGETHER)


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", ["jit", "workers"])
def test_two_processes_train_as_one_does(parallelism, one_process, tmp_path):
    two = run_processes(2, tmp_path, *TOGETHER, f"--config.parallelism={parallelism}")
    assert two["steps"] == one_process["steps"] > 0
    for name in ("train_loss", "validation_loss", "parameter_norm", "gap"):
        assert two["final"][name] == pytest.approx(one_process["final"][name], rel=1e-4)
    assert len(read_rows(tmp_path)) == 1
