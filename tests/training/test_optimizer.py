"""Learning-rate rules, regimes, delay processes and momentum arms from a configuration."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from asgd_jax.delays import simulate_workers
from asgd_jax.training import default_config
from asgd_jax.training.optimizer import (
    count_clipped,
    effective_learning_rate,
    kernel_mask,
    make_delay_process,
    make_multiplier,
    make_optimizer,
)


def config_with(**changes):
    config = default_config()
    config.update(changes)
    return config


def test_rules_start_from_what_the_user_typed():
    rates = {
        rule: effective_learning_rate(
            config_with(learning_rate=0.8, delay=31, learning_rate_rule=rule)
        )
        for rule in ("none", "inverse", "sqrt", "exact")
    }
    exact = 0.8 * np.sin(np.pi / (2 * (2 * 31 + 1)))
    expected = {"none": 0.8, "inverse": 0.8 / 31, "sqrt": 0.8 / np.sqrt(31), "exact": exact}
    for rule, rate in expected.items():
        assert rates[rule] == pytest.approx(rate, rel=1e-9)


def test_the_regime_multiplies_and_never_replaces():
    config = config_with(warmup_epochs=2.0, warmup_from=0.25, decay_epochs=(3, 5), decay_factor=0.1)
    multiplier = make_multiplier(config, steps_per_epoch=10)
    measured = [float(multiplier(jnp.asarray(step))) for step in (0, 10, 20, 29, 30, 49, 50)]
    expected = [0.25, 0.625, 1.0, 1.0, 0.1, 0.1, 0.01]
    np.testing.assert_allclose(measured, expected, rtol=1e-5)
    assert float(make_multiplier(default_config(), 10)(jnp.asarray(7))) == 1.0


def test_the_regime_is_its_closed_form_however_late_or_close_its_decays_are():
    """Decays that share an update both count; one beyond int32 never comes."""
    config = config_with(
        warmup_epochs=0.5, warmup_from=0.1, decay_epochs=(0.2, 0.21, 3, 2**30), decay_factor=0.3
    )
    multiplier = jax.jit(make_multiplier(config, steps_per_epoch=10))
    steps = np.asarray([0, 1, 2, 4, 5, 29, 30, 2**31 - 1], np.int32)
    ramp = 0.1 + 0.9 * np.minimum(steps / 5, 1)
    expected = ramp * 0.3 ** (2.0 * (steps >= 2) + (steps >= 30))
    measured = [float(multiplier(step)) for step in steps]
    np.testing.assert_allclose(measured, expected, rtol=1e-6)


def test_delay_distributions_have_the_mean_of_the_configured_delay(tmp_path):
    for distribution in ("constant", "uniform", "normal"):
        process = make_delay_process(
            config_with(delay=7, delay_distribution=distribution), num_updates=10
        )
        assert process.pmf @ np.arange(process.pmf.size) == pytest.approx(7, abs=1e-3)
    process = make_delay_process(
        config_with(delay=3, delay_distribution="workers", seed=5), num_updates=50
    )
    expected = simulate_workers(4, 50, schedule="random", seed=5)
    assert [int(process.sample(None, step)) for step in range(50)] == expected.tolist()
    np.save(tmp_path / "trace.npy", expected)
    np.savetxt(tmp_path / "trace.txt", expected, fmt="%d")
    for file in ("trace.npy", "trace.txt"):
        replay = make_delay_process(
            config_with(delay=3, delay_distribution="trace", delay_trace=str(tmp_path / file)), 50
        )
        assert int(replay.sample(None, 17)) == expected[17]


@pytest.mark.parametrize(("schedule", "limit"), [("random", 28), ("normal", 8)])
def test_simulated_workers_have_one_history_and_one_past_however_long_the_run(schedule, limit):
    config = config_with(delay=3, delay_distribution="workers", worker_schedule=schedule, seed=1)
    short, long = (make_delay_process(config, num_updates) for num_updates in (39, 20_000))
    assert short.max_delay == long.max_delay == limit
    assert [int(short.sample(None, t)) for t in range(39)] == [
        int(long.sample(None, t)) for t in range(39)
    ]
    staleness = simulate_workers(4, 20_000, schedule=schedule, seed=config.seed)
    replayed = jax.vmap(long.sample, (None, 0))(None, jnp.arange(20_000))
    np.testing.assert_array_equal(replayed, np.minimum(staleness, limit))
    clipped = count_clipped(config, 20_000)
    assert 0 < clipped == np.sum(staleness > limit) < 20_000 / 1000
    assert count_clipped(config_with(delay=3), 20_000) == 0


@pytest.mark.parametrize(
    ("content", "delay", "message"),
    [
        ("3\n", 0, r"mean staleness of 3 and delay=0, .*: set delay=3"),
        ("9 9 9\n", 3, r"mean staleness of 9 and delay=3, .*: set delay=9"),
        ("0 2147483648 1\n", 1, r"trace\[1\] is 2147483648: staleness must be below 2\*\*31"),
        ("99999999999999999999\n", 1, r"cannot be read"),
        ("", 1, r"non-empty vector of integers, got shape \(0,\)"),
        ("1 -1\n", 1, r"trace\[1\] is -1: staleness must be >= 0"),
    ],
    ids=["no_delay", "other_delay", "too_large", "no_int64", "empty", "negative"],
)
def test_a_trace_that_is_none_of_this_run_is_refused(content, delay, message, tmp_path):
    file = tmp_path / "trace.txt"
    file.write_text(content)
    config = config_with(delay=delay, delay_distribution="trace", delay_trace=str(file))
    with pytest.raises(ValueError, match=f"^delay_trace='{file}'.*{message}") as caught:
        make_delay_process(config, 50)
    assert len(str(caught.value).splitlines()) == 1


def test_a_trace_of_one_line_is_one_staleness(tmp_path):
    file = tmp_path / "trace.txt"
    file.write_text("3\n")
    config = config_with(delay=3, delay_distribution="trace", delay_trace=str(file))
    assert make_delay_process(config, 50).max_delay == 3
    (tmp_path / "empty.npy").touch()
    config.delay_trace = str(tmp_path / "empty.npy")
    with pytest.raises(ValueError, match=r"empty.npy' cannot be read \(No data left"):
        make_delay_process(config, 50)


def test_momentum_arms_are_their_recursions():
    """v = m v + gain g on a constant gradient, then the learning rate."""
    grads = {"kernel": jnp.ones(2)}
    after = {
        ("heavy_ball", False): 1 + 0.5 + 0.25,
        ("heavy_ball", True): 0.5 * (1 + 0.5 + 0.25),
        ("nesterov", False): 1 + 0.5 * (1 + 0.5 + 0.25),
        ("nesterov", True): 0.5 * (1 + 0.5 * (1 + 0.5 + 0.25)),
        ("shifted", False): 1 + 0.5 + 0.25,
        ("shifted", True): 0.5 * (1 + 0.5 + 0.25),
    }
    for (kind, dampening), expected in after.items():
        config = config_with(
            momentum=0.5, momentum_kind=kind, dampening=dampening, learning_rate=0.1
        )
        tx = make_optimizer(config, make_delay_process(config, 1), steps_per_epoch=5)
        state = tx.init(grads)
        for _ in range(3):
            updates, state = tx.update(grads, state, grads)
        np.testing.assert_allclose(updates["kernel"], -0.1 * expected, rtol=1e-6, err_msg=kind)


def test_clipping_and_decay_act_on_the_server():
    config = config_with(clip_norm=1.0, weight_decay=0.5, weight_decay_on="kernels", delay=3)
    config.learning_rate = 1.0
    tx = make_optimizer(config, make_delay_process(config, 1), steps_per_epoch=5)
    params = {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}
    grads = {"kernel": jnp.array([3.0]), "bias": jnp.array([4.0])}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -(3 / 5 + 0.5 * 2), rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], -4 / 5, rtol=1e-6)
    assert kernel_mask({"conv": {"kernel": 0, "bias": 0, "scale": 0}}) == {
        "conv": {"kernel": True, "bias": False, "scale": False}
    }


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_adam_is_optax_adam(optimizer):
    config = config_with(optimizer=optimizer, learning_rate=0.1, weight_decay=0.01)
    tx = make_optimizer(config, make_delay_process(config, 1), steps_per_epoch=5)
    params = {"kernel": jnp.array([2.0, -1.0])}
    if optimizer == "adamw":
        reference = optax.adamw(0.1, weight_decay=0.01)
    else:
        reference = optax.chain(optax.add_decayed_weights(0.01), optax.adam(0.1))
    state, other = tx.init(params), reference.init(params)
    for scale in (1.0, -2.0, 0.5):
        grads = {"kernel": scale * jnp.array([1.0, 3.0])}
        updates, state = tx.update(grads, state, params)
        expected, other = reference.update(grads, other, params)
        np.testing.assert_allclose(updates["kernel"], expected["kernel"], rtol=1e-5)
