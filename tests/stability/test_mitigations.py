"""The command line on pipelines, mitigations and Adam, against the functions it stands for."""

import json

import numpy as np
import pytest

from asgd_jax.stability import __main__ as command_line
from asgd_jax.stability import max_learning_rate, stages_max_learning_rate
from asgd_jax.stability.mitigations import MITIGATIONS, method_rows, pipeline_rows


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
        (["--stages", "4", "--method", "power"], "--method needs --delay"),
        (["--stages", "4", "--schedule", "zigzag"], "unknown schedule 'zigzag'"),
        (["--uniform", "1", "4", "--method", "power"], "--method needs --delay"),
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
