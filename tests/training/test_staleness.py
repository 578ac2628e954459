"""Pipelines, prediction and compensation from a configuration, against loops of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from asgd_jax import compensate, data, delays
from asgd_jax.training import Batch, default_config, set_up, train, validate_config
from asgd_jax.training.folder.metrics import read_rows
from asgd_jax.training.optimizer import make_multiplier, make_server
from asgd_jax.training.sweep import sweep


@pytest.fixture
def three_layers(tiny_config):
    """Three stages of a layer each; six workers, of which two share an update."""
    tiny_config.update(num_workers=6, worker_batch_size=8, delay=2, epochs=2)
    tiny_config.model_options.hidden = (12, 12)
    tiny_config.delay_distribution = "pipeline"
    return tiny_config


AGES = {"Dense_0": 2, "Dense_1": 1, "Dense_2": 0}


def batches_of(config, setup):
    dataset = data.load("digits", num_train=config.num_train, num_validation=1)
    for epoch in range(config.epochs):
        for samples in np.asarray(data.epoch_batches(config.seed, epoch, setup.feed.facts.plan)):
            yield dataset.train_images[samples], dataset.train_labels[samples]


def simulate(config, setup, server):
    """A list of every layer's values, and the mixed point of each update, in plain Python."""
    model, normalize = setup.run.model, setup.feed.facts.normalize

    @jax.jit
    def gradient(params, images, labels):
        def loss(params):
            logits = model.apply({"params": params}, normalize(images), train=True)
            logits = logits.reshape(-1, 10)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels.ravel()).mean()

        return jax.grad(loss)(params)

    past = [jax.device_get(setup.state.params)]
    state, update = server.init(past[0]), jax.jit(server.update)
    for step, (images, labels) in enumerate(batches_of(config, setup)):
        point = {name: past[-1 - min(age, step)][name] for name, age in ages_of(config).items()}
        images = images.reshape(-1, *images.shape[2:])
        staleness = {
            name: {leaf: jnp.int32(min(age, step)) for leaf in point[name]}
            for name, age in ages_of(config).items()
        }
        told = {"staleness": staleness, "stale_params": point}
        grads = gradient(point, images, labels)
        updates, state = update(grads, state, past[-1], **told)
        past.append(optax.apply_updates(past[-1], updates))
    return past[-1]


def ages_of(config):
    pipeline = config.delay_distribution == "pipeline"
    return {name: age if pipeline else config.delay for name, age in AGES.items()}


def trained(setup, config):
    state, step = setup.state, jax.jit(setup.run.advance)
    for images, labels in batches_of(config, setup):
        state, metrics = step(state, Batch(jnp.asarray(images), jnp.asarray(labels)))
    return state, metrics


def assert_close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected
    )


def test_a_pipeline_reads_every_layer_as_old_as_its_stage(three_layers):
    three_layers.momentum = 0.9
    three_layers.learning_rate = 0.02
    setup = set_up(three_layers)
    state, metrics = trained(setup, three_layers)
    server = optax.with_extra_args_support(optax.sgd(0.02, momentum=0.9))
    assert_close(state.params, simulate(three_layers, setup, server))
    assert int(metrics.staleness) == 2  # that of the first stage


@pytest.mark.parametrize("distribution", ["constant", "pipeline"])
def test_compensation_stands_before_the_optimizer(three_layers, distribution):
    three_layers.update(delay_distribution=distribution, compensate="dc_ema", optimizer="adamw")
    three_layers.update(learning_rate=0.01, weight_decay=0.1, adam_b1=0.8)
    setup = set_up(three_layers)
    server = optax.chain(compensate.dc_ema(), optax.adamw(0.01, b1=0.8, weight_decay=0.1))
    assert_close(trained(setup, three_layers)[0].params, simulate(three_layers, setup, server))


def test_a_worker_looks_ahead_with_the_rate_of_the_moment(tiny_config):
    """Momentum's own prediction in NumPy, while the learning rate still rises."""
    tiny_config.update(delay=3, momentum=0.8, learning_rate=0.05, warmup_epochs=2.0, epochs=1)
    tiny_config.predict = "optimizer"
    setup = set_up(tiny_config)
    multiplier = make_multiplier(tiny_config, setup.feed.facts.plan.steps_per_epoch)
    state, step = setup.state, jax.jit(setup.run.advance)
    ahead = [jax.device_get(state.params)]
    for number, (images, labels) in enumerate(batches_of(tiny_config, setup)):
        state, _ = step(state, Batch(jnp.asarray(images), jnp.asarray(labels)))
        (velocity,) = (v for _, v in optax.tree.get_all_with_path(state.opt_state, "trace"))
        # What the worker pulls now arrives three updates from now.
        factor = 0.05 * float(multiplier(number + 1)) * (0.8 - 0.8**4) / (1 - 0.8)
        ahead.append(
            jax.tree.map(lambda x, v, f=factor: np.asarray(x - f * v), state.params, velocity)
        )
        if number >= 3:
            assert_close(setup.run.stale(state), ahead[number - 2])


def test_runs_of_a_sweep_are_cut_by_their_own_stages(three_layers, tmp_path):
    """Points of two depths: in one program the second would be read as old as the first."""
    three_layers.update(worker_batch_size=16, num_workers=6)
    points = [{"delay": delay} for delay in (2, 1)]
    found = sweep(three_layers, points, progress=False)
    for point in points:
        three_layers.update(point)
        folder = tmp_path / str(point["delay"])
        train(three_layers, folder, progress=False)
        rows = [record for record in found if record["delay"] == point["delay"]]
        assert len(rows) == 2
        for row, record in zip(read_rows(folder), rows, strict=True):
            assert record["train_loss"] == pytest.approx(row["train_loss"], rel=1e-4)
            assert record["validation_loss"] == pytest.approx(row["validation_loss"], rel=1e-4)


@pytest.mark.parametrize("predict", ["none", "last_update"])
def test_a_pipeline_resumes_where_it_was(three_layers, tmp_path, predict):
    three_layers.predict = predict
    whole = train(three_layers, tmp_path / "whole", progress=False)
    three_layers.epochs = 1
    train(three_layers, tmp_path / "parts", progress=False)
    three_layers.epochs = 2
    parts = train(three_layers, tmp_path / "parts", progress=False)
    for column in ("train_loss", "gradient_norm", "validation_loss"):
        assert parts["final"][column] == whole["final"][column]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"delay_distribution": "pipeline", "momentum_kind": "shifted"},
            "momentum_kind='shifted' does not go with delay_distribution='pipeline'",
        ),
        (
            {"predict": "optimizer", "parallelism": "workers", "momentum": 0.9},
            "parallelism='workers' does not go with predict='optimizer': rounds do not predict",
        ),
        ({"predict": "optimizer"}, "looks ahead with momentum: set momentum above 0"),
        (
            {"predict": "optimizer", "optimizer": "nadamw"},
            "optimizer='nadamw' does not go with predict='optimizer'",
        ),
        ({"compensate": "hope"}, "unknown compensate='hope': use one of none, staleness_scaling"),
        ({"adam_b1": 1.0, "optimizer": "adam"}, "adam_b1 must be a number >= 0 and < 1, got 1.0"),
    ],
)
def test_what_does_not_go_together_is_one_line(changes, message):
    config = default_config()
    config.update(delay=3, num_workers=4, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        validate_config(config)
    assert "\n" not in str(caught.value)


def test_more_stages_than_layers_are_refused_before_the_run(tiny_config):
    tiny_config.update(delay=3, delay_distribution="pipeline")
    with pytest.raises(ValueError, match="a pipeline of 4 stages is too long for the 2 modules"):
        set_up(tiny_config)


@pytest.mark.parametrize(
    ("changes", "points"),
    [
        # A short delay beside a long one, random ones, and what SGD's momentum decides.
        (
            {"predict": "last_update"},
            [{"delay": 1, "num_workers": 2}, {"delay": 7, "num_workers": 8}],
        ),
        (
            {"predict": "optimizer", "optimizer": "adamw", "delay_distribution": "uniform"},
            [{"delay": 1, "num_workers": 2}, {"delay": 7, "num_workers": 8}],
        ),
        (
            {"predict": "optimizer", "delay": 3, "num_workers": 4},
            [{"momentum": 0.5}, {"momentum": 0.9}],
        ),
        (
            {"compensate": "gap_aware", "delay": 3, "num_workers": 4},
            [{"momentum": 0.1}, {"momentum": 0.9}],
        ),
        (
            {"compensate": "delay_adaptive", "delay_distribution": "uniform"},
            [{"delay": 1, "num_workers": 2}, {"delay": 7, "num_workers": 8}],
        ),
    ],
    ids=lambda value: (
        value.get("predict") or value.get("compensate") if type(value) is dict else ""
    ),
)
def test_a_run_beside_others_does_what_it_does_alone(tiny_config, changes, points):
    """Staleness and momentum of one program's runs differ; so does what is done against it."""
    tiny_config.update(num_train=128, epochs=1, learning_rate=0.01, worker_batch_size=8, **changes)
    together = sweep(tiny_config, points, progress=False)
    alone = [record for point in points for record in sweep(tiny_config, [point], progress=False)]
    assert len(together) == len(alone) == 2
    for record, other in zip(together, alone, strict=True):
        assert record["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert record["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-5)


@pytest.mark.parametrize("distribution", ["uniform", "workers"])
def test_a_sweep_looks_ahead_as_train_does(tiny_config, tmp_path, distribution):
    tiny_config.update(delay=3, delay_distribution=distribution, predict="last_update", epochs=1)
    tiny_config.learning_rate = 0.05
    (record,) = sweep(tiny_config, [{"seed": 0}], progress=False)
    train(tiny_config, tmp_path, progress=False)
    (row,) = read_rows(tmp_path)
    assert record["train_loss"] == pytest.approx(row["train_loss"], rel=1e-4)


def test_gap_aware_shrinks_an_l2_term_with_its_gradient(tiny_config):
    """One update by hand: what is divided is the gradient and the decay together."""
    tiny_config.update(compensate="gap_aware", weight_decay=0.5, delay=3)
    process = delays.constant(3)
    server = make_server(tiny_config, process, steps_per_epoch=8)
    live, stale = {"w": jnp.array([2.0, -1.0])}, {"w": jnp.array([1.5, -1.0])}
    gradients = {"w": jnp.array([0.1, 0.3])}
    updates, _ = server.update(
        gradients, server.init(live), live, staleness=jnp.int32(3), stale_params=stale
    )
    whole = np.array([0.1, 0.3]) + 0.5 * np.array([2.0, -1.0])
    factor = 1.0 + np.array([0.5, 0.0]) / (0.2 * (np.abs(whole) + 1e-8))
    np.testing.assert_allclose(updates["w"], -0.2 * whole / factor, rtol=1e-5)
