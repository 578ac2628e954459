"""The command line on pipelines, mitigations and Adam, against the functions it stands for."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asgd_jax
from asgd_jax import compensate, delays
from asgd_jax.stability import __main__ as command_line
from asgd_jax.stability import (
    lyapunov_max_learning_rate,
    max_learning_rate,
    stages_max_learning_rate,
)
from asgd_jax.stability.mitigations import (
    MITIGATIONS,
    method_rows,
    mitigated_max_learning_rate,
    mitigation,
    pipeline_rows,
)


def answer(capsys, *arguments):
    assert command_line.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["largest stable learning rate"]


def test_a_pipeline_of_one_sharp_direction(capsys):
    found = answer(capsys, "--stages", "4", "--momentum", "0.9", "--sharpness", "20")
    even = np.full((4, 4), 5.0)
    expected = stages_max_learning_rate(even, [3, 2, 1, 0], momentum=0.9)
    assert found["spread evenly over the stages"] == pytest.approx(expected)
    assert found["all of it in the first stage"] == pytest.approx(
        max_learning_rate(3, momentum=0.9, sharpness=20.0)
    )
    # It is the threshold of the mean under delays drawn from those of the stages.
    assert pipeline_rows(4, "1f1b", sharpness=1.0, momentum=0.0, dampening=True)[0][1] == (
        pytest.approx(max_learning_rate([0.25] * 4), rel=1e-6)
    )


def test_every_method_at_once(capsys):
    found = answer(capsys, "--delay", "3", "--momentum", "0.9", "--method", "all")
    assert set(found) == {"no mitigation", "prediction", *MITIGATIONS}
    plain = max_learning_rate(3, momentum=0.9)
    assert found["no mitigation"] == pytest.approx(plain)
    assert found["staleness-scaling"] == pytest.approx(3 * plain, rel=1e-6)
    assert found["delay-adaptive"] == pytest.approx(plain, rel=1e-6)  # as many workers as delays
    for second_order in ("dc-asgd", "gap-aware"):
        assert found[second_order] == pytest.approx(plain, rel=1e-4)
    assert found["prediction"] > 1.2 * plain

    # Half of the curvature at live parameters: (z - 1)(z - m) z^3 + (1 - m) h z (z^3 + 1) / 2.
    def largest_root(step):
        ball = np.polymul(np.polymul([1.0, -1.0], [1.0, -0.9]), [1.0, 0.0, 0.0, 0.0])
        pulled = 0.1 * step / 2.0 * np.array([1.0, 0.0, 0.0, 1.0, 0.0])
        return max(abs(np.roots(np.polyadd(ball, pulled))))

    assert largest_root(0.999 * found["dc-ema"]) < 1.0 < largest_root(1.001 * found["dc-ema"])


def test_random_delays_by_every_criterion(capsys):
    found = answer(capsys, "--uniform", "1", "4", "--momentum", "0.5", "--method", "delay-adaptive")
    assert list(found) == ["no mitigation", "delay-adaptive"]
    plain, adapted = found.values()
    process = delays.uniform(1, 4)
    for criterion in ("mean", "mean_square"):
        expected = max_learning_rate(process, criterion=criterion, momentum=0.5)
        assert plain[criterion] == expected
    typical = lyapunov_max_learning_rate(process, momentum=0.5)
    assert plain["lyapunov"] == typical.value
    assert (plain["mean_factor"], plain["gain"]) == (1.0, 1.0)
    # The mean delay is 2.5, rounded 2: gradients older than 3 are scaled by 3/4.
    assert adapted["mean_factor"] == pytest.approx(0.25 * (3 + 3 / 4))
    gain = adapted["mean_square"] * adapted["mean_factor"] / plain["mean_square"]
    assert adapted["gain"] == pytest.approx(gain)
    for criterion in ("mean", "mean_square", "lyapunov"):
        assert adapted[criterion] > plain[criterion]


def test_dropping_from_a_trace_keeps_its_order(capsys):
    line = ["--workers", "4", "--schedule", "random", "--updates", "20000", "--method", "drop"]
    found = answer(capsys, *line)
    trace = delays.simulate_workers(4, 20_000, schedule="random")
    assert list(found) == ["no mitigation", "drop from 3", "drop from 6"]  # the mean is below 3
    for limit in (3, 6):
        row = found[f"drop from {limit}"]
        left = trace[trace < limit]
        expected = lyapunov_max_learning_rate(delays.from_trace(left)).value
        assert row["lyapunov"] == expected
        pmf = np.bincount(left) / left.size
        assert row["mean_square"] == max_learning_rate(pmf, criterion="mean_square")
        assert row["mean_factor"] == pytest.approx(left.size / trace.size)
    assert set(answer(capsys, *line, "--drop-stale", "5")) == {"no mitigation", "drop from 5"}
    assert command_line.main(line) == 0
    text = capsys.readouterr().out
    assert "delay      4 workers, random schedule" in text
    assert "Act on the mean square" in text


def test_adam_is_a_damped_heavy_ball(capsys):
    arguments = ["--delay", "0", "--optimizer", "adam", "--sharpness", "38"]
    assert command_line.main([*arguments, "--learning-rate", "0.9"]) == 0
    out = capsys.readouterr().out
    marked = next(line for line in out.splitlines() if line.startswith("*"))
    assert "damped" in marked
    assert " 1 " in f"{marked} " or marked.rstrip().endswith("1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "0"], "num_stages must be >= 1"),
        (["--stages", "4", "--method", "power"], "--method needs one delay of all leaves"),
        (["--stages", "4", "--schedule", "zigzag"], "unknown schedule 'zigzag'"),
        (["--uniform", "1", "4", "--method", "prediction"], "prediction needs --delay"),
        (
            ["--uniform", "2", "4", "--method", "drop", "--drop-stale", "2"],
            "limit=2 leaves nothing",
        ),
        (["--uniform", "1", "4", "--method", "magic"], "unknown method 'magic': use staleness-sc"),
        (["--delay", "4", "--method", "drop"], "drop needs random delays"),
        (["--delay", "4", "--drop-stale", "2"], "--drop-stale=2 needs --method drop"),
        (["--delay", "4", "--method", "magic"], "unknown method 'magic': use staleness-scaling"),
        (["--delay", "4", "--method", "prediction"], "prediction needs --momentum above 0"),
        (["--delay", "4", "--method", "power", "--kind", "shifted"], "know heavy ball only"),
        (["--delay", "4", "--optimizer", "adam", "--kind", "shifted"], "damped heavy ball"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_methods_are_those_of_the_table():
    rows = dict(method_rows(["dc-asgd"], 2, sharpness=4.0, momentum=0.0, dampening=True))
    assert rows["no mitigation"] == max_learning_rate(2, sharpness=4.0)


@pytest.mark.optimised
@pytest.mark.parametrize(
    "name", ["staleness-scaling", "delay-adaptive", "power", "dc-asgd", "dc-ema"]
)
def test_in_time_one_percent_decides_for_every_linear_method(name):
    """The transform itself on x^2 / 2 in float64, from where its corrections are small."""
    delay = 4
    heavy_ball = {"sharpness": 1.0, "momentum": 0.0, "dampening": True}
    threshold = mitigated_max_learning_rate(name, delay, **heavy_ball)

    def run(rate):
        # A mean that never moves is a held one.
        before = mitigation(name, rate, delay)
        before = compensate.dc_ema(decay=1.0 - 1e-15) if name == "dc-ema" else before
        tx = asgd_jax.delayed(optax.chain(before, optax.sgd(rate)), delay)
        params = jnp.array(1e-6, jnp.float64)
        state = tx.init(params)
        if name == "dc-ema":
            state = optax.tree.set(state, square_mean=jnp.array(0.5, jnp.float64))

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(asgd_jax.stale_params(state, params), state, params)
            return (optax.apply_updates(params, updates), state), params

        return jax.lax.scan(step, (params, state), length=3000)[1]

    with jax.enable_x64(True):
        for factor, grows in ((0.99, False), (1.01, True)):
            path = np.abs(jax.jit(run)(factor * threshold))
            assert (path[-100:].max() > path[500:600].max()) == grows


def test_the_preconditioned_sharpness_is_adam_s(capsys):
    arguments = "--delay", "4", "--optimizer", "adam"
    assert command_line.main([*arguments, "--preconditioned-sharpness", "100"]) == 0
    named = capsys.readouterr().out
    assert command_line.main([*arguments, "--sharpness", "100"]) == 0
    assert named == capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["--delay", "4", "--preconditioned-sharpness", "100"])
    assert "is for --optimizer=adam" in capsys.readouterr().err
