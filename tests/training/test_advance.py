"""The loop over a stream: it runs ahead of the check, and stops where a plain loop would."""

import contextlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from asgd_jax import data
from asgd_jax.training import Batch, default_config, set_up, setup, train
from asgd_jax.training.advance import follow_stream, stream_step
from asgd_jax.training.chunk import NOT_DIVERGED, add_step, zero_totals
from asgd_jax.training.config import validate_config
from asgd_jax.training.optimizer import make_delay_process
from asgd_jax.training.setup import make_validation

DELAY = 3


class Flag:
    """A `diverged_at` that notes when the host waits for it."""

    def __init__(self, step, log):
        self.step, self.log = step, log

    def addressable_data(self, _):
        self.log.append(("wait", self.step))
        return np.int32(NOT_DIVERGED)


def test_a_step_is_dispatched_while_the_one_before_may_still_run(tiny_config):
    log = []
    state = set_up(tiny_config).state

    def step(state, batch, totals):
        log.append(("dispatch", batch))
        return state, totals._replace(diverged_at=Flag(batch, log))

    advance = follow_stream(lambda start: iter(range(start, 99)), step, lambda b: b[0], 8, DELAY)
    advance(state, 1, 0, 5)
    waits = {"dispatch": -1}
    for kind, number in log:
        if kind == "wait":
            waits["dispatch"] = number
        else:
            assert waits["dispatch"] == (number - 2 if number >= 10 else -1)
    assert [number for kind, number in log if kind == "dispatch"] == [8, 9, 10, 11, 12]


def streamed(config):
    """Setup, the stream's step and `advance` on digits, as if they were read from disk."""
    setup = set_up(config)
    dataset = data.load("digits", num_train=256)
    step = stream_step(setup.run.advance, config.divergence_loss, setup.placement)

    def batches(start):
        for samples in np.asarray(data.epoch_batches(0, 0, setup.feed.facts.plan))[start:]:
            yield Batch(dataset.train_images[samples], dataset.train_labels[samples])

    advance = follow_stream(batches, step, lambda b: jax.device_put(b[0]), 16, DELAY)
    return setup, batches, step, advance


def without_rings(state):
    """Leaves of a state by path, but the past parameters and momenta."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    named = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    kept = {name: leaf for name, leaf in named.items() if not re.search(r"history|buffers", name)}
    assert 0 < len(kept) < len(named)
    return kept


@pytest.mark.parametrize(
    "arm",
    [
        {"learning_rate": 50.0, "divergence_loss": 30.0},
        {"learning_rate": 1e6},
        {
            "learning_rate": 50.0,
            "divergence_loss": 30.0,
            "momentum": 0.9,
            "momentum_kind": "shifted",
        },
        {"learning_rate": 0.1},
    ],
    ids=["too_large_a_loss", "not_finite", "shifted", "does_not_diverge"],
)
def test_a_run_stops_exactly_where_a_plain_loop_does(tiny_config, arm):
    tiny_config.update(delay=DELAY, **arm)
    setup, batches, _, advance = streamed(tiny_config)
    plain_step = jax.jit(setup.run.advance)
    expected, totals = jax.tree.map(jnp.array, setup.state), zero_totals(DELAY)
    for batch in batches(0):
        before = expected.step
        expected, metrics = plain_step(expected, batch)
        totals = add_step(totals, metrics, before, tiny_config.divergence_loss)
        if totals.diverged_at != NOT_DIVERGED:
            break
    state, found = advance(setup.state, 0, 0, 16)
    assert int(found.diverged_at) == int(totals.diverged_at)
    assert int(found.steps) == int(totals.steps) == int(state.step)
    assert (int(found.steps) < 14) == (arm["learning_rate"] > 1)
    np.testing.assert_array_equal(found.staleness, totals.staleness)
    np.testing.assert_allclose(found.loss, totals.loss, rtol=1e-5)
    kept, wanted = without_rings(state), without_rings(expected)
    assert kept.keys() == wanted.keys()
    for name, leaf in wanted.items():
        np.testing.assert_allclose(kept[name], leaf, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.optimised
@pytest.mark.parametrize("kind", ["heavy_ball", "shifted"])
def test_the_check_copies_no_ring(tiny_config, kind):
    tiny_config.update(delay=DELAY, momentum=0.9, momentum_kind=kind)
    setup, batches, step, _ = streamed(tiny_config)
    compiled = step.lower(setup.state, next(batches(0)), zero_totals(DELAY)).compile()
    lines = [
        line for line in compiled.as_text().splitlines() if re.search(r"= f32\[[34],64,8\]", line)
    ]
    assert lines
    assert not [line for line in lines if " copy(" in line or " select(" in line]


class Reads(ConfigDict):
    """A configuration that notes which of its fields are looked at one by one."""

    def __init__(self, *arguments, **options):
        object.__setattr__(self, "noted", set())
        super().__init__(*arguments, **options)

    def __getitem__(self, key):
        self.noted.add(key)
        return super().__getitem__(key)

    @contextlib.contextmanager
    def unnoted(self):
        before = set(self.noted)
        yield
        self.noted.intersection_update(before)

    def to_dict(self, *arguments, **options):
        with self.unnoted():
            return super().to_dict(*arguments, **options)


@pytest.fixture
def small_stream(monkeypatch):
    """ImageNet's stream without its images: 32 of 8x8x3 to train on, 16 to validate."""
    random = np.random.default_rng(0)
    asked = []

    def batches(*, batch_size, image_size, labels):
        images = random.integers(0, 256, (batch_size, image_size, image_size, 3), dtype=np.uint8)
        return images, np.resize(np.arange(labels, dtype=np.int32), batch_size)

    def train_batches(data_dir, *, batch_size, seed, start_step, image_size, **_):
        while True:
            yield batches(batch_size=batch_size, image_size=image_size, labels=4)

    def validation_batches(data_dir, *, batch_size, image_size, process_count, **_):
        asked.append(batch_size)
        batch = batches(batch_size=batch_size // process_count, image_size=image_size, labels=4)
        yield *batch, np.ones(len(batch[1]), np.float32)

    monkeypatch.setattr(data, "stream_sizes", lambda data_dir, name: data.StreamSizes(32, 16, 4))
    monkeypatch.setattr(data, "train_batches", train_batches)
    monkeypatch.setattr(data, "validation_batches", validation_batches)
    return asked


# Changes under which the fields that depend on another one have something to say.
WHOLE_RUN = {
    "model": "mnist_cnn_bn", "width": 0.1, "conv_impl": "lax", "batch_stats": "recalibrate",
    "momentum": 0.5, "weight_decay": 0.1, "decay_epochs": (1,), "warmup_epochs": 0.5,
}  # fmt: skip
DELAYS = (
    {"delay_distribution": "normal"},
    {"delay_distribution": "workers"},
    {"delay_distribution": "trace", "delay_trace": "trace.npy"},
)
LAUNCHER = {"multihost", "coordinator", "coordinator_timeout", "num_processes", "process_id"}


def changed_value(value):
    """Another value of a field's kind."""
    if isinstance(value, bool):
        return not value
    return "half" if isinstance(value, str) else 7 if value is None else value + 1


@pytest.mark.parametrize("dataset", ["imagenet2012", "digits"])
def test_every_field_is_heeded_or_refused(dataset, small_stream, monkeypatch, tmp_path):
    """A field that nothing reads, while a run is made and trains, must not be there to be set."""
    np.save(tmp_path / "trace.npy", np.ones(8, int))
    monkeypatch.chdir(tmp_path)
    config = Reads(default_config())
    config.update(
        dataset=dataset, num_workers=2, worker_batch_size=8, eval_batch_size=16, epochs=2,
        num_devices=1, recalibration_batches=1, **WHOLE_RUN,
    )  # fmt: skip
    if dataset == "imagenet2012":
        config.image_size = 8

    def check(config):  # reading in order to check is not heeding
        with config.unnoted():
            validate_config(config)

    monkeypatch.setattr(setup, "validate_config", check)
    config.noted.clear()
    train(config, tmp_path / "run", progress=False)
    for changes in DELAYS:
        config.update(delay=1, **changes)
        make_delay_process(config, 8)
    read = config.noted | LAUNCHER  # which scripts/train.py reads
    unread = set(default_config()) - read
    assert unread == {"adam_b1", "adam_b2"} | (
        {"normalize", "num_train", "num_validation", "augment"}
        if dataset == "imagenet2012"
        else {"image_size"}
    )
    for field in unread:
        config = default_config()
        config.dataset = dataset
        config[field] = changed_value(config[field])
        owner = "optimizer='sgd'" if field.startswith("adam") else f"dataset='{dataset}'"
        with pytest.raises(ValueError, match=rf"^{field}=.* has no meaning for {owner}"):
            validate_config(config)


def test_evaluation_takes_no_more_at_once_than_it_was_asked_for(small_stream, monkeypatch):
    """Rounded up to the devices, which are those of all processes already."""
    config = default_config()
    config.update(
        dataset="imagenet2012", image_size=8, model="mlp", num_workers=1, worker_batch_size=8,
        eval_batch_size=9, num_devices=8,
    )  # fmt: skip
    setup = set_up(config)
    assert math.isfinite(make_validation(config, setup)(setup.state)[0])
    assert small_stream == [16]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with contextlib.suppress(ValueError):  # this process holds but half of the batch
        make_validation(config, setup)(setup.state)
    assert small_stream == [16, 16]
