"""The driver: files, equal bytes, nothing half-written, one-line errors."""

import csv
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from asgd_jax.training.command import Preempted
from experiments import reproduce as driver
from experiments.figures import fig05, fig06
from experiments.results_page import page

ROOT = Path(__file__).parents[2]


def read_table(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize("figure", driver.FIGURES)
def test_every_figure_keeps_the_scheme(figure):
    module = importlib.import_module(driver.FIGURES[figure])
    assert isinstance(module.CAPTION, str)
    assert set(module.PRESETS) <= set(driver.PRESETS)
    assert {"cpu", "paper"} <= set(module.PRESETS)
    assert all(callable(getattr(module, name)) for name in ("run", "plot", "claims"))


def test_a_figure_writes_three_files_and_the_same_table_again(tmp_path):
    summary = driver.reproduce("6", "smoke", tmp_path)
    folder = tmp_path / "fig06"
    assert sorted(os.listdir(folder)) == ["fig06.png", "records.csv", "summary.json"]
    assert os.listdir(tmp_path) == ["fig06"]
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert set(summary) == {
        *("figure", "caption", "preset", "proxy", "config", "claims", "wall_time_s", "found_runs"),
        *("versions", "device", "commit"),
    }
    assert summary["config"] == {"max_delay": 64, "stride": 8}
    assert all(
        set(claim) == {"claim", "expected", "measured", "holds", "interval"}
        for claim in summary["claims"]
    )
    assert [int(row["delay"]) for row in read_table(folder / "records.csv")] == [*range(0, 65, 8)]
    before = [(folder / name).read_bytes() for name in ("records.csv", "fig06.png")]
    driver.reproduce("6", "smoke", tmp_path)
    assert before == [(folder / name).read_bytes() for name in ("records.csv", "fig06.png")]


@pytest.mark.parametrize("broken", ["run", "claims", "plot"])
def test_a_failure_leaves_the_last_results_alone(tmp_path, monkeypatch, broken):
    def fail(_):
        raise ValueError("broken")

    driver.reproduce("6", "smoke", tmp_path)
    before = {file.name: file.read_bytes() for file in (tmp_path / "fig06").iterdir()}
    monkeypatch.setattr(fig06, broken, fail)
    with pytest.raises(ValueError, match="broken"):
        driver.reproduce("6", "smoke", tmp_path)
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "fig06").iterdir()}
    with pytest.raises(ValueError, match="broken"):
        driver.reproduce("6", "smoke", tmp_path / "new")
    assert os.listdir(tmp_path / "new") == []


def test_unknown_figures_and_presets_write_nothing(tmp_path):
    with pytest.raises(ValueError, match="unknown figure '99': use one of 1, 2"):
        driver.reproduce("99", "smoke", tmp_path / "a")
    with pytest.raises(ValueError, match="unknown preset 'tiny' of figure 6: use one of smoke"):
        driver.reproduce("6", "tiny", tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_a_missing_matplotlib_is_told_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        driver.reproduce("6", "smoke", tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", ["", "six", "-6", "6.0", "٦", "6,", "06", "ALL"])
def test_bad_figure_texts(text):
    with pytest.raises(ValueError, match="unknown figure"):
        driver.figure_names(text)


def test_describe_says_which_claims_fail():
    claim = {"claim": "c", "expected": "at most 1", "measured": 2.0, "holds": False}
    summary = {"figure": "6", "caption": "k", "preset": "smoke", "wall_time_s": 1.0}
    text = driver.describe({**summary, "claims": [claim]}, Path("out"))
    assert "FAILS  c: 2, expected at most 1" in text
    assert "0 of 1 claims hold" in text
    assert "out/fig06" in text


@pytest.mark.parametrize("figure", driver.NUMERIC)
def test_committed_tables_are_what_the_code_gives(figure, tmp_path):
    committed = ROOT / "results" / driver.folder_name(figure)
    summary = driver.reproduce(figure, "paper", tmp_path)
    fresh = tmp_path / committed.name
    assert all(claim["holds"] for claim in summary["claims"])
    assert (
        json.loads((committed / "summary.json").read_text())["config"]
        == json.loads((fresh / "summary.json").read_text())["config"]
    )
    pairs = zip(
        read_table(committed / "records.csv"), read_table(fresh / "records.csv"), strict=True
    )
    for old, new in pairs:
        assert list(old) == list(new)
        for name, cell in old.items():
            try:
                value = float(cell)
            except ValueError:
                assert cell == new[name]
            else:
                assert float(new[name]) == pytest.approx(value, rel=1e-8)


def load_script():
    spec = importlib.util.spec_from_file_location("script", ROOT / "scripts" / "reproduce.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture
def run_script(monkeypatch, capsys, tmp_path):
    """The script's main in this process, its environment as it was afterwards."""
    monkeypatch.chdir(tmp_path)
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))
    monkeypatch.setattr(sys, "argv", ["reproduce.py"])

    def run(*arguments):
        try:
            code = load_script().main(arguments)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_the_script_reproduces(tmp_path, run_script):
    # A real process, as in a terminal of a notebook whose backend is not installed here.
    backend = "module://matplotlib_inline.backend_inline"
    arguments = ("--figure=4,6", "--preset=smoke", "--out=r")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "reproduce.py", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"MPLBACKEND": backend},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("claims hold") == 2
    assert sorted(os.listdir(tmp_path / "r")) == ["README.md", "fig04", "fig06"]
    page = (tmp_path / "r" / "README.md").read_text()
    assert page.count("\n| [") == 2
    assert "Not in this folder: 1, 2, 3, 5, 7" in page
    table = tmp_path / "r" / "fig06" / "records.csv"
    before = table.read_bytes(), (tmp_path / "r" / "fig06" / "fig06.png").read_bytes()
    code, _, errors = run_script("--figure=6", "--redraw", "--out=r")
    assert (code, errors) == (0, "")
    assert before == (table.read_bytes(), (tmp_path / "r" / "fig06" / "fig06.png").read_bytes())
    code, _, errors = run_script("--figure=8", "--redraw", "--out=r")
    assert code == 2
    assert "fig08 has no records to draw" in errors


def test_a_page_names_what_does_not_hold_why_and_how_far_it_is():
    claim = {"claim": "c", "expected": "at most 1", "measured": None, "holds": False}
    held = claim | {"measured": 0.5, "holds": True, "interval": [0.25, 0.75]}
    config = importlib.import_module(driver.FIGURES["5"]).PRESETS["cpu"].to_dict()
    summary = {"caption": "k", "preset": "cpu", "wall_time_s": 60.0, "proxy": "a small one"}
    text = page({"5": {**summary, "config": config, "claims": [claim, held]}})
    assert "| [5](fig05/summary.json) | k | 1 of 2 | cpu | a small one | 60 s |" in text
    assert "* figure 5: c: not a number, expected at most 1" in text
    assert f"Why, we think: {fig05.WHY}" in text
    assert "| 5 | c | at most 1 | 0.5 | 0.25 to 0.75 | yes |" in text
    assert "cifar10, 5,000 images for imagenet2012, 1,281,167 images" in text
    assert "15 epochs for 90 epochs" in text
    assert "5 seeds for 1 seed" in text
    assert 'src="fig05/fig05.png"' in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--figure=99"], "unknown figure '99'"),
        (["--figure=6", "--preset=huge"], "unknown preset 'huge' of figure 6"),
        (["--figure=6", "--preset=smoke", "--out=file"], "file"),
        ([], "--figure"),
        (["--figure=6", "--colour"], "--colour"),
    ],
)
def test_the_script_complains_in_one_line(tmp_path, run_script, arguments, message):
    (tmp_path / "file").write_text("")
    code, output, errors = run_script(*arguments)
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("reproduce.py: ")
    assert message in errors
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (Preempted(40), 75, "stopped at step 40, which is saved: run the same command to resume"),
        (KeyboardInterrupt(), 130, "interrupted; what is finished is kept"),
    ],
)
def test_the_script_says_in_one_line_that_it_was_stopped(
    tmp_path, monkeypatch, run_script, raised, code, line
):
    def stop(*_):
        raise raised

    monkeypatch.setattr(driver, "reproduce", stop)
    assert run_script("--figure=6", f"--out={tmp_path}") == (code, "", f"reproduce.py: {line}\n")
