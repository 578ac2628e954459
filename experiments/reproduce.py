"""Reproduces the paper's figures: records, a picture and checked claims, each in its own folder.

A figure is a module of `experiments.figures` with

* `CAPTION`: what the paper's caption claims, in our words;
* `PRESETS`: a configuration (NamedTuple or ConfigDict) for each preset that the figure has;
* `run(config)`: a list of flat dicts with equal keys, the rows of the table; figures that train
  have `run(config, work)` instead, and keep in the folder `work` what a killed run continues from;
* `plot(records)`: the matplotlib figure of that table, a pandas one;
* `claims(records)`: a list of `Claim`;
* `notes(records)`, where there is more to say in numbers: a dict for summary.json;
* `PROXY`, where the cpu preset stands in for something larger: what for, in a line;
* `WHY`, where a claim failed in the committed run: what we think why.

Given the records, `plot` and `claims` compute nothing new: whoever has the table can redo both.
"""

import importlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from asgd_jax.training.folder.provenance import environment, write_json
from asgd_jax.training.folder.table import Record, read_records, write_records
from experiments import style
from experiments.claims import Claim, count_held, verdict

_MODULES = "experiments.figures"
NUMERIC = ("4", "6", "7", "8", "10")
TRAINED = (
    *("1", "2", "3", "5", "9", "11", "12", "13"),
    *("async", "eos", "eos_adam", "mitigations", "noise", "pipeline", "stages"),
)
PRESETS = ("smoke", "cpu", "paper")
_WORK = ".work"


def folder_name(figure: str) -> str:
    """Returns what a figure's folder and its module are called.

    >>> folder_name("6"), folder_name("eos"), folder_name("async")
    ('fig06', 'eos', 'asynchrony')
    """
    if figure == "async":  # a word of Python's, which names no module
        return "asynchrony"
    return f"fig{int(figure):02d}" if figure.isdigit() else figure


FIGURES: dict[str, str] = {
    figure: f"{_MODULES}.{folder_name(figure)}"
    for figure in sorted(
        NUMERIC + TRAINED, key=lambda figure: (not figure.isdigit(), len(figure), figure)
    )
}


def figure_names(text: str) -> list[str]:
    """Returns the figures that `--figure` asks for: one, several with commas, or all.

    Raises:
      ValueError: for a figure that is not known, listing those that are.

    >>> figure_names("6"), figure_names("1,13"), len(figure_names("all")) == len(FIGURES)
    (['6'], ['1', '13'], True)
    """
    names = list(FIGURES) if text == "all" else text.split(",")
    for name in names:
        if name not in FIGURES:
            raise ValueError(f"unknown figure {name!r}: use one of {', '.join(FIGURES)}, or all")
    return names


def reproduce(figure: str, preset: str, out: Path) -> dict[str, Any]:
    """Runs a figure and writes `out`/figNN: records.csv, figNN.png and summary.json.

    The three files are complete before the first one replaces an older one, so that a run that
    fails leaves the last good results alone. Equal records give an equal records.csv, byte by byte.
    Finished training runs stay in `out`/.work until `clean_work`: a killed figure goes on there,
    and figures of the same runs share them.

    Args:
      figure: a key of `FIGURES`.
      preset: smoke (a quick look), cpu (minutes on a laptop) or paper (the paper's own size).
      out: folder of all results, made when missing.

    Returns:
      The content of summary.json.

    Raises:
      ValueError: for an unknown figure or preset, or where matplotlib is missing, before anything
        is run or written.
      OSError: where `out` cannot be written to.
    """
    (figure,) = figure_names(figure)
    module = importlib.import_module(FIGURES[figure])
    if preset not in module.PRESETS:
        known = ", ".join(each for each in PRESETS if each in module.PRESETS)
        raise ValueError(f"unknown preset {preset!r} of figure {figure}: use one of {known}")
    style.require_matplotlib()
    config = module.PRESETS[preset]
    out.mkdir(parents=True, exist_ok=True)
    start, made_by = time.perf_counter(), environment()  # the source may move on meanwhile
    work = out / _WORK / preset
    resumed = figure in TRAINED and work.exists()
    if figure in TRAINED:
        records = module.run(config, work)
    else:
        records = module.run(config)
    description = {
        "figure": figure,
        "preset": preset,
        **_words(module, preset),
        "config": config._asdict() if hasattr(config, "_asdict") else config.to_dict(),
        "wall_time_s": round(time.perf_counter() - start, 3),
        "found_runs": resumed,  # of an earlier command, whose time is not in wall_time_s
        **made_by,
    }
    return _write(figure, records, description, out)


def redraw(figure: str, out: Path) -> dict[str, Any]:
    """Draws a figure and checks its claims again, from the records that `out` has.

    Raises:
      ValueError: where there are none.
    """
    (figure,) = figure_names(figure)
    folder = out / folder_name(figure)
    try:
        description = json.loads((folder / "summary.json").read_text())
        records = read_records(folder / "records.csv")
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no records to draw: run the figure first") from error
    # As the module has them now; what ran, and when, stays.
    description |= _words(importlib.import_module(FIGURES[figure]), description["preset"])
    return _write(figure, records, description, out)


def _words(module: Any, preset: str) -> dict[str, Any]:
    """What a figure says of itself: its caption and what it stands in for."""
    proxy = getattr(module, "PROXY", None) if preset != "paper" else None
    return {"caption": module.CAPTION, "proxy": proxy}


def _write(
    figure: str, records: list[Record], description: dict[str, Any], out: Path
) -> dict[str, Any]:
    """Writes a figure's files, all or nothing; returns its summary."""
    name = folder_name(figure)
    module = importlib.import_module(FIGURES[figure])
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}-") as partial_name:
        partial = Path(partial_name)
        write_records(partial / "records.csv", records)
        # As they are in the file, so that pictures and claims are functions of what is kept.
        table = pd.DataFrame(read_records(partial / "records.csv"))
        summary = {**description, **judgement(module, table)}
        style.save(module.plot(table), partial / f"{name}.png")
        write_json(partial / "summary.json", summary)
        folder = out / name
        folder.mkdir(exist_ok=True)
        for file in (f"{name}.png", "records.csv", "summary.json"):
            (partial / file).replace(folder / file)
    return summary


def judgement(module: Any, table: pd.DataFrame) -> dict[str, Any]:
    """Returns what a summary says of a table: its claims, and notes of the figures that have any.

    It is a function of the records alone: `experiments.audit` computes it again.
    """
    found: dict[str, Any] = {"claims": [claim._asdict() for claim in module.claims(table)]}
    if hasattr(module, "notes") and (notes := module.notes(table)):
        found["notes"] = notes
    return found


def clean_work(out: Path) -> None:
    """Removes the training runs that figures kept, so that the next command runs them anew."""
    shutil.rmtree(out / _WORK, ignore_errors=True)


def describe(summary: Mapping[str, Any], out: Path) -> str:
    """Returns a summary as text: a line a claim, then where the files are."""
    claims = [Claim(**claim) for claim in summary["claims"]]
    lines = [
        f"figure {summary['figure']}: {summary['caption']}",
        *(verdict(claim, digits=6) for claim in claims),
        f"{count_held(claims)} claims hold; preset {summary['preset']}, "
        f"{summary['wall_time_s']:.3g} s; see {out / folder_name(summary['figure'])}",
    ]
    return "\n  ".join(lines)
