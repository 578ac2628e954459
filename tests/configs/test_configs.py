"""Every config file and every arm: it is valid, says what it is, and its step trains."""

import functools
import importlib
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from asgd_jax import data, models
from asgd_jax.training import Batch, init_state, validate_config
from asgd_jax.training.optimizer import (
    effective_learning_rate,
    kernel_mask,
    make_delay_process,
    make_multiplier,
)
from asgd_jax.training.program import DataSpec, build_run
from asgd_jax.training.step import make_gradient

ROOT = Path(__file__).parents[2]


MODULES = {
    path.stem: importlib.import_module(f"configs.{path.stem}")
    for path in sorted(ROOT.glob("configs/[!_]*.py"))
}
ARMS = [(name, arm) for name, module in MODULES.items() for arm in module.ARMS]
SIZES = {name: facts.num_train for name, facts in data.FACTS.items()}
SYNCHRONOUS = {"char_transformer": "sync_adamw"}  # elsewhere ssgd


def plan_of(config, size=None):
    return data.plan_batches(
        size or SIZES[config.dataset],
        num_workers=config.num_workers,
        worker_batch_size=config.worker_batch_size,
        delay=config.delay,
    )


@pytest.mark.parametrize(("name", "arm"), ARMS)
def test_an_arm_is_valid_on_its_data(name, arm):
    config = MODULES[name].get_config(arm)
    validate_config(config)
    plan = plan_of(config)
    # A worker's batch is the same in every arm of a file: only their number in an update differs.
    first = MODULES[name].get_config()
    assert config.worker_batch_size == first.worker_batch_size
    # A pipeline's synchronous arm makes as many updates as the others: it has one worker.
    alone = name == "char_transformer" and config.delay == 0
    assert plan.workers_per_update * (config.delay + 1) == (
        1 if alone else 8 if name == "char_transformer" else first.num_workers
    )


@pytest.mark.parametrize("name", MODULES)
def test_an_unknown_arm_is_one_clear_line(name):
    known = ", ".join(MODULES[name].ARMS)
    with pytest.raises(ValueError, match="unknown arm") as caught:
        MODULES[name].get_config("nothing")
    assert str(caught.value) == f"unknown arm 'nothing' of {name}: use one of {known}"


@pytest.mark.parametrize("name", MODULES)
def test_the_default_arm_is_the_synchronous_one(name):
    assert MODULES[name].get_config() == MODULES[name].get_config(SYNCHRONOUS.get(name, "ssgd"))
    assert MODULES[name].get_config().delay == 0


@pytest.mark.parametrize("name", MODULES)
def test_arms_do_not_share_state(name):
    changed = MODULES[name].get_config()
    changed.epochs = 12345
    changed.model_options.anything = 1
    assert MODULES[name].get_config() != changed


def commands_of(name):
    text = MODULES[name].__doc__.replace("\\\n", " ")
    return [
        shlex.split(line)[1:]
        for line in text.splitlines()
        if line.startswith("  python scripts/train.py")
    ]


@pytest.mark.parametrize("name", MODULES)
def test_the_docstring_names_arms_hardware_and_commands(name):
    text = MODULES[name].__doc__
    arms = MODULES[name].ARMS
    if name == "char_transformer":  # whose arms are every delay with every method
        arms = [*MODULES[name].DELAYS, *MODULES[name].METHODS]
    for arm in arms:
        documented = re.sub(r"\d+$", "T", arm) if "tau" in arm else arm
        assert re.search(rf"^  {documented}\b", text, re.MULTILINE), arm
    assert "Expected" in text
    assert "Hardware" in text
    assert "measured" in text or "ESTIMATE" in text
    assert len(commands_of(name)) == 2


@pytest.mark.parametrize(
    ("name", "index"), [(name, index) for name in MODULES for index in (0, 1)]
)  # fmt: skip
def test_the_commands_of_the_docstring_are_valid(name, index):
    script, config_flag, *options = commands_of(name)[index]
    file, _, arm = config_flag.removeprefix("--config=").partition(":")
    assert (script, file) == ("scripts/train.py", f"configs/{name}.py")
    config = MODULES[name].get_config(arm)
    for option in options:
        key, _, value = option.removeprefix("--").partition("=")
        if key == "workdir":
            continue
        field = key.removeprefix("config.")
        kind = config.get_type(field)
        setattr(config, field, kind(value))
    validate_config(config)
    plan_of(config, size=config.num_train or (800 if index else None))


def test_the_learning_rates_are_those_of_the_paper():
    def rate(name, arm):
        return effective_learning_rate(MODULES[name].get_config(arm))

    assert rate("mnist_cnn", "asgd") == pytest.approx(0.01, rel=0.04)  # fig. 13
    assert rate("mnist_cnn", "asgd_sqrt") > 0.05  # fig. 1: does not converge
    for tau in (1, 3, 7, 15, 31):
        assert rate("cifar10_vgg11", f"asgd_tau{tau}") == pytest.approx(0.8 / tau)  # fig. 12
    exact = 0.8 * np.sin(np.pi / (2 * (2 * 31 + 1)))
    assert rate("cifar10_vgg11", "asgd_exact") == pytest.approx(exact)
    for arm in ("no_momentum", "standard", "standard_damped", "shifted"):
        assert rate("cifar10_resnet44", arm) == pytest.approx(0.1)
        assert rate("imagenet_resnet50", arm) == pytest.approx(0.1, rel=0.04)  # small-batch
    assert rate("imagenet_resnet50", "ssgd") == pytest.approx(0.1 * 8192 / 256)


@pytest.mark.parametrize("arm", MODULES["imagenet_resnet50"].ARMS)
def test_the_imagenet_regime(arm):
    config = MODULES["imagenet_resnet50"].get_config(arm)
    plan = plan_of(config)
    assert plan.update_batch_size == (8192 if arm == "ssgd" else 256)
    assert plan.steps_per_epoch == (156 if arm == "ssgd" else 5004)
    peak = effective_learning_rate(config)
    multiplier = make_multiplier(config, plan.steps_per_epoch)

    def rate(epoch):
        return peak * float(multiplier(jnp.int32(round(epoch * plan.steps_per_epoch))))

    assert rate(0) == pytest.approx(0.1)
    assert rate(2.5) == pytest.approx((0.1 + peak) / 2, rel=1e-4)
    for epoch, factor in ((5, 1), (29.9, 1), (30, 0.1), (60, 0.01), (80, 1e-3), (89.9, 1e-3)):
        assert rate(epoch) == pytest.approx(peak * factor, rel=1e-5)


def test_the_delays_of_figure_9_are_those_of_workers():
    config = MODULES["imagenet_resnet50"].get_config("shifted_normal")
    process = make_delay_process(config, 20_000)
    sample = jax.vmap(lambda step: process.sample(jax.random.key(0), step))
    staleness = np.asarray(sample(jnp.arange(1000, 20_000, dtype=jnp.int32)))
    assert staleness.mean() == pytest.approx(31, abs=0.1)
    assert staleness.std() == pytest.approx(0.23 * 32, rel=0.05)


# Every path through optimizer and delay, on one small model.

PATH_FIELDS = (
    "optimizer", "momentum", "momentum_kind", "dampening", "weight_decay", "weight_decay_on",
    "clip_norm", "delay_distribution", "worker_schedule", "delay_std", "warmup_epochs",
    "decay_epochs", "history_dtype", "label_smoothing", "predict", "compensate", "adam_b1",
)  # fmt: skip


def shrink(name, arm):
    """The arm with four workers of two samples; its delay stays none, all, or in between."""
    config = MODULES[name].get_config(arm)
    delay = 0 if config.delay == 0 else 3 if config.delay == config.num_workers - 1 else 1
    if config.delay_distribution == "pipeline":  # of two layers
        delay = 1
    config.update(delay=delay, num_workers=4, worker_batch_size=2, epochs=2, conv_impl="lax")
    return config


def paths():
    """One arm for every combination of those fields and the shrunk delay."""
    found = {}
    for name, arm in ARMS:
        config = shrink(name, arm)
        key = (config.delay, *(str(config[field]) for field in PATH_FIELDS))
        found.setdefault(key, (name, arm))
    return list(found.values())


def to_float(key, images):
    del key
    return images.astype(jnp.float32) / 255


def fake_batches(plan, image_shape):
    """Two updates' samples."""
    shape = plan.workers_per_update, plan.worker_batch_size
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (2, *shape, *image_shape), dtype=np.uint8)
    following = image_shape if len(image_shape) == 1 else ()  # of text, a label a character
    labels = random.integers(0, 10, (2, *shape, *following), dtype=np.int32)
    return [Batch(jnp.asarray(images[k]), jnp.asarray(labels[k])) for k in (0, 1)]


def train_two_steps(run, state, batches):
    """States before, between and after the two updates, and their metrics."""
    step = jax.jit(run.advance)
    states, metrics = [state], []
    for batch in batches:
        state, measured = step(states[-1], batch)
        states.append(state)
        metrics.append(measured)
    for before, after, measured in zip(states, states[1:], metrics, strict=False):
        assert np.isfinite(float(measured.loss))
        assert float(measured.gradient_norm) > 0
        leaves = zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True)
        assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in leaves)
    assert int(states[-1].step) == 2
    return states, metrics


@functools.cache
def small_model():
    """An MLP, its parameters and its jitted gradient, shared by all arms."""
    model = models.create("mlp", num_classes=10, hidden=(4,))
    state = init_state(model, optax.identity(), (4, 4, 1), seed=0)
    return state, jax.jit(make_gradient(model, to_float))


@pytest.mark.parametrize(("name", "arm"), paths())
def test_the_optimizer_of_an_arm_takes_two_steps(name, arm):
    config = shrink(name, arm)
    config.update(model="mlp", width=1.0)
    config.model_options = ConfigDict({"hidden": (4,)})
    plan = plan_of(config, size=100)
    run = build_run(config, DataSpec(plan, 10, (4, 4, 1), to_float, None))
    start, gradient = small_model()
    start = run.init(start.key, start.params)
    batches = fake_batches(plan, (4, 4, 1))
    states, metrics = train_two_steps(run, start, batches)

    second = min(1, int(run.process.sample(jax.random.key(0), jnp.int32(1))))
    assert [int(each.staleness) for each in metrics] == [0, second]
    assert run.process.max_delay >= config.delay

    # The first update by hand: gradient plus decay, times 1 - m where damped.
    gradients, _ = gradient(start.params, {}, batches[0], start.key)
    rate = effective_learning_rate(config)
    rate *= config.warmup_from if config.warmup_epochs else 1.0
    rate *= 1.0 - config.momentum if config.dampening and config.momentum else 1.0
    kernels_only = config.weight_decay_on == "kernels"
    decays = jax.tree.map(
        lambda kernel: config.weight_decay * (kernel or not kernels_only), kernel_mask(start.params)
    )
    if config.optimizer == "nadamw":  # its first update is not one of these
        return
    if config.optimizer == "adamw":
        gradients = jax.tree.map(lambda g: g / (np.abs(g) + 1e-8), gradients)
    jax.tree.map(
        lambda x, g, decay, new: np.testing.assert_allclose(
            new, x - rate * (g + decay * x), rtol=1e-4, atol=1e-6
        ),
        start.params,
        gradients,
        decays,
        states[1].params,
    )


# One arm for every kind of model, at its smallest; the demo's own tests train the one of digits.

FAMILIES = {
    "mnist_cnn": ("asgd", (28, 28, 1), {}),
    "cifar10_vgg11": ("asgd_tau15", (32, 32, 3), {}),
    "cifar10_resnet44": ("shifted", (32, 32, 3), {"stage_sizes": (1, 1), "channels": (16, 32)}),
    "imagenet_resnet50": ("shifted", (32, 32, 3), {"stage_sizes": (1,), "channels": (64,)}),
    "char_transformer": ("pipeline_prediction", (8,), {"num_blocks": 2}),
}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "digits"])
def test_the_model_of_a_config_takes_two_steps(name):
    arm, image_shape, options = FAMILIES[name]
    config = shrink(name, arm)
    config.width = 0.05
    config.model_options.update(options)
    plan = plan_of(config, size=100)
    augment = data.augmenter(config.dataset) if config.augment else lambda key, images: images
    facts = DataSpec(plan, 10, image_shape, lambda key, x: to_float(key, augment(key, x)), None)
    run = build_run(config, facts)
    state = run.init(jax.random.PRNGKey(config.seed))
    states, _ = train_two_steps(run, state, fake_batches(plan, image_shape))
    assert bool(jax.tree.leaves(states[-1].batch_stats)) == config.model.startswith("resnet")
