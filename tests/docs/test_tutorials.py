"""Tutorials are programs that assert their own numbers; here they run, as `make docs` runs them."""

import ast
import io
import runpy
from contextlib import redirect_stdout
from pathlib import Path

import jupytext
import pytest

TUTORIALS = sorted((Path(__file__).parents[2] / "docs" / "tutorials").glob("*.py"))
# The others take longer to compile than to run.
RUNS = [
    pytest.param(path, marks=[pytest.mark.optimised] if path.stem == "actor_learner" else [])
    for path in TUTORIALS
]


@pytest.mark.slow
@pytest.mark.parametrize("tutorial", RUNS, ids=lambda path: path.stem)
def test_a_tutorial_runs_and_its_numbers_hold(tutorial):
    said = io.StringIO()
    with redirect_stdout(said):
        runpy.run_path(str(tutorial), run_name="__main__")
    assert said.getvalue().strip()


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_a_notebook_with_text_and_assertions(tutorial):
    notebook = jupytext.read(tutorial)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    assert kinds.count("markdown") >= 4
    asserted = [
        node
        for node in ast.walk(ast.parse(tutorial.read_text()))
        if isinstance(node, ast.Assert)
        or (isinstance(node, ast.Attribute) and node.attr == "assert_allclose")
    ]
    assert len(asserted) >= 2


def test_there_are_the_four_that_the_site_names():
    assert [path.stem for path in TUTORIALS] == [
        "actor_learner",
        "pipeline_stages",
        "stable_learning_rate",
        "three_frameworks",
    ]
