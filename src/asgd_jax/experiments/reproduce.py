"""Reproduces the paper's figures: records, a picture and checked claims, each in its own folder.

A figure is a module of `asgd_jax.experiments.figures` with

* `CAPTION`: what the paper's caption claims, in our words;
* `PRESETS`: a configuration (NamedTuple or ConfigDict) for each preset that the figure has;
* `run(config)`: a list of flat dicts with equal keys, the rows of the table;
* `plot(records)`: the matplotlib figure;
* `claims(records)`: a list of `Claim`.

Given the records, `plot` and `claims` compute nothing new: whoever has the table can redo both.
"""

import csv
import importlib
import importlib.util
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asgd_jax.experiments import style
from asgd_jax.training.report import environment, write_json

_MODULES = "asgd_jax.experiments.figures"
FIGURES: dict[int, str] = {number: f"{_MODULES}.fig{number:02d}" for number in (4, 6, 7, 8, 10)}
PRESETS = ("smoke", "cpu", "paper")

Cell = float | int | str


def figure_numbers(text: str) -> list[int]:
    """Returns the figures that `--figure` asks for: one number, or all.

    Raises:
      ValueError: for a figure that is not known, listing those that are.

    >>> figure_numbers("6"), len(figure_numbers("all")) == len(FIGURES)
    ([6], True)
    """
    if text == "all":
        return sorted(FIGURES)
    if not (text.isascii() and text.isdigit() and int(text) in FIGURES):
        known = ", ".join(map(str, sorted(FIGURES)))
        raise ValueError(f"unknown figure {text!r}: use one of {known}, or all")
    return [int(text)]


def reproduce(number: int, preset: str, out: Path) -> dict[str, Any]:
    """Runs a figure and writes `out`/figNN: records.csv, figNN.png and summary.json.

    The three files are complete before the first one replaces an older one, so that a run that
    fails leaves the last good results alone. Equal records give an equal records.csv, byte by byte.

    Args:
      number: of the figure, a key of `FIGURES`.
      preset: smoke (a quick look), cpu (minutes on a laptop) or paper (the paper's own size).
      out: folder of all results, made when missing.

    Returns:
      The content of summary.json.

    Raises:
      ValueError: for an unknown figure or preset, or where matplotlib is missing, before anything
        is run or written.
      OSError: where `out` cannot be written to.
    """
    name = f"fig{figure_numbers(str(number))[0]:02d}"
    module = importlib.import_module(FIGURES[number])
    if preset not in module.PRESETS:
        known = ", ".join(each for each in PRESETS if each in module.PRESETS)
        raise ValueError(f"unknown preset {preset!r} of figure {number}: use one of {known}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the picture needs matplotlib: pip install matplotlib")
    config = module.PRESETS[preset]
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}-") as partial_name:
        partial = Path(partial_name)
        start = time.perf_counter()
        records = module.run(config)
        summary = {
            "figure": number,
            "caption": module.CAPTION,
            "preset": preset,
            "config": config._asdict() if hasattr(config, "_asdict") else config.to_dict(),
            "claims": [claim._asdict() for claim in module.claims(records)],
            "wall_time_s": round(time.perf_counter() - start, 3),
            **environment(),
        }
        write_records(partial / "records.csv", records)
        style.save(module.plot(records), partial / f"{name}.png")
        write_json(partial / "summary.json", summary)
        folder = out / name
        folder.mkdir(exist_ok=True)
        for file in (f"{name}.png", "records.csv", "summary.json"):
            (partial / file).replace(folder / file)
    return summary


def write_records(file: Path, records: Sequence[Mapping[str, Cell]]) -> None:
    """Writes the rows as CSV; numbers with nine significant digits.

    Nine digits identify a float32, and hide the last bits in which two machines may differ.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_records(Path(folder) / "r.csv", [{"delay": 2, "h": 2 / 3}])
    ...     print((Path(folder) / "r.csv").read_text())
    delay,h
    2,0.666666667
    """
    with file.open("w", newline="") as lines:
        table = csv.DictWriter(lines, list(records[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(
            {
                key: f"{cell:.9g}" if isinstance(cell, float) else cell
                for key, cell in record.items()
            }
            for record in records
        )


def describe(summary: Mapping[str, Any], out: Path) -> str:
    """Returns a summary as text: a line a claim, then where the files are."""
    claims = summary["claims"]
    lines = [f"figure {summary['figure']}: {summary['caption']}"]
    for claim in claims:
        verdict = "holds" if claim["holds"] else "FAILS"
        numbers = f"{claim['measured']:.6g}, expected {claim['expected']}"
        lines.append(f"  {verdict}  {claim['claim']}: {numbers}")
    held = sum(claim["holds"] for claim in claims)
    lines.append(
        f"  {held} of {len(claims)} claims hold; preset {summary['preset']}, "
        f"{summary['wall_time_s']:.3g} s; see {out / 'fig'}{summary['figure']:02d}"
    )
    return "\n".join(lines)
