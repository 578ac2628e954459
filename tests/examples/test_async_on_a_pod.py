"""The example says what it is there to show."""

import re
import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "async_on_a_pod.py"


def test_the_example_shows_that_rounds_are_exact(capsys):
    runpy.run_path(str(EXAMPLE))["main"]()
    said = capsys.readouterr().out
    assert "8 workers in turn, on 8 cpu devices" in said
    differences = re.findall(r"one update after another: (\S+)", said)
    assert len(differences) == 2
    assert all(float(difference) < 1e-5 for difference in differences)
    losses = re.findall(r"loss (\S+) -> (\S+)", said)
    assert all(float(last) < 0.5 * float(first) for first, last in losses)
