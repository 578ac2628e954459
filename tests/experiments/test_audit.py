"""The committed results are their records'; a changed number, record or setting is found."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from asgd_jax import stability
from experiments import audit

RESULTS = Path(__file__).parents[2] / "results"


def copy_of(name, tmp_path):
    return Path(shutil.copytree(RESULTS / name, tmp_path / name))


def change_summary(folder, change):
    file = folder / "summary.json"
    summary = json.loads(file.read_text())
    change(summary)
    file.write_text(json.dumps(summary))


def change_records(folder, change):
    file = folder / "records.csv"
    table = pd.read_csv(file, keep_default_na=False, na_values=["nan"])
    change(table).to_csv(file, index=False, float_format="%.9g", na_rep="nan")


def test_the_committed_results_are_sound():
    assert audit.audit(RESULTS) == []


def wrong_number(summary):
    summary["claims"][2]["measured"] *= 1.0 + 1e-6


def wrong_verdict(summary):
    summary["claims"][0]["holds"] = not summary["claims"][0]["holds"]


def wrong_end(summary):
    summary["claims"][6]["interval"][1] -= 1e-6


def wrong_note(summary):
    summary["notes"]["readings"]["rule_before"]["slope"] += 1e-3


def fewer_claims(summary):
    del summary["claims"][-1]


def other_seeds(summary):
    summary["config"]["seeds"] = [0, 1, 2]


def other_delays(summary):
    summary["config"]["delays"].append(64)


def other_start(summary):
    summary["config"]["start"]["learning_rate"] = 0.2


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (wrong_number, "claims[2].measured is"),
        (wrong_verdict, "claims[0].holds is False"),
        (wrong_end, "claims[6].interval[1] is"),
        (wrong_note, "notes.readings.rule_before.slope is"),
        (fewer_claims, "claims is"),
        (other_seeds, "config: seeds [0, 1, 2]; records: [2, 3, 4, 5, 6]"),
        (other_delays, "config: delays [1, 2, 4, 8, 16, 32, 64]; records: [1, 2, 4, 8, 16, 32]"),
        (other_start, "start_learning_rate is not the config's, 0.2"),
    ],
)
def test_a_changed_summary_is_found(tmp_path, change, line):
    change_summary(copy_of("fig02", tmp_path), change)
    (found,) = audit.audit(tmp_path)
    assert found.startswith("figure 2: ")
    assert line in found


def test_a_changed_record_is_found(tmp_path):
    def stay(table):
        """A catapult at delay 8 that has never been."""
        leapt = (table.delay == 8) & (table.seed == 2) & (table["index"] == -60)
        table.loc[leapt, ["train_error", "full_train_loss"]] = 0.0, 0.1
        return table

    change_records(copy_of("fig02", tmp_path), stay)
    found = audit.audit(tmp_path)
    assert any("readings.rule.edge_over_predicted.8 is" in line for line in found)
    assert any("notes.catapults is 27, the records give 26" in line for line in found)


def test_records_that_cannot_be_judged_are_a_line(tmp_path):
    change_records(copy_of("fig02", tmp_path), lambda table: table[table.delay != 8].iloc[:50])
    (line,) = audit.audit(tmp_path)
    assert "figure 2: the records cannot be judged: delay 1, seed 2: no edge among" in line


@pytest.mark.parametrize(
    ("name", "column"),
    [("fig02", "predicted"), ("fig04", "threshold"), ("fig10", "threshold"), ("eos", "edge")],
)
def test_a_wrong_threshold_is_found(tmp_path, name, column):
    """By companion matrices: the claims of fig. 2, which compute their own, do not see it."""

    def shift(table):
        table[column] *= 1.0 + 1e-4
        return table

    change_records(copy_of(name, tmp_path), shift)
    assert any("the largest root at step" in line for line in audit.audit(tmp_path))


def test_a_changed_reduced_run_is_found(tmp_path):
    def improve(table):
        table.loc[0, "validation_error"] = 0.5
        return table

    change_records(copy_of("reduced", tmp_path), improve)
    found = audit.audit(tmp_path)
    assert any(line.startswith("reduced: runs.") for line in found)
    assert any("claims[0].measured" in line for line in found)


def test_an_empty_folder_is_no_sound_one(tmp_path):
    with pytest.raises(ValueError, match="has no results to audit"):
        audit.audit(tmp_path)


@pytest.mark.parametrize("delay", [0, 1, 5])
@pytest.mark.parametrize(
    "method",
    [(0.0, "heavy_ball", True), (0.9, "heavy_ball", False), (0.5, "shifted", True)],
)
def test_companion_radius(delay, method):
    momentum, kind, dampening = method
    options = {"momentum": momentum, "kind": kind, "dampening": dampening}
    edge = stability.max_learning_rate(delay, **options)
    assert audit.companion_radius(delay, edge, *method) == pytest.approx(1.0, abs=1e-7)
    assert audit.companion_radius(delay, 1.1 * edge, *method) > 1.001
