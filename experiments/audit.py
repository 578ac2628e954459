"""Whether the committed results say what their records say: `make audit`.

From every figure's records.csv and configuration it computes again

* all claims and notes of summary.json, with their intervals: as numbers, not as text;
* what the records say of theory: thresholds from the eigenvalues of companion matrices, which the
  library's closed forms and Levinson recursions don't use;
* that the records are those of the configuration: its delays, seeds and rates.

A difference is a line that names figure and number; there is none in a sound folder.
"""

import importlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from asgd_jax.training.folder.table import read_records
from experiments.reduced import REDUCED_RUNS, make_claim
from experiments.reproduce import FIGURES, folder_name, judgement

_SAME = 1e-9  # relative: sums in another order
_STORED = 2e-8  # relative: records have nine digits
_AT_EDGE = 1e-6  # how far from 1 the largest root of a stored threshold may lie


def audit(out: Path) -> list[str]:
    """Returns every difference found in a folder of results, a line each.

    Raises:
      ValueError: where the folder has no results at all.
    """
    found: list[str] = []
    seen = 0
    for figure in FIGURES:
        folder = out / folder_name(figure)
        if (folder / "summary.json").exists():
            seen += 1
            found += [f"figure {figure}: {line}" for line in audit_figure(figure, folder)]
    reduced = out / "reduced"
    if (reduced / "summary.json").exists():
        seen += 1
        found += [f"reduced: {line}" for line in audit_reduced(reduced)]
    if not seen:
        raise ValueError(f"{out} has no results to audit: run scripts/reproduce.py first")
    return found


def audit_figure(figure: str, folder: Path) -> Iterator[str]:
    """Yields the differences of a figure's folder."""
    summary = json.loads((folder / "summary.json").read_text())
    records = pd.DataFrame(read_records(folder / "records.csv"))
    try:
        computed = _plain(judgement(importlib.import_module(FIGURES[figure]), records))
    except ValueError as error:
        yield f"the records cannot be judged: {error}"
        return
    for name in ("claims", "notes"):
        yield from differences(summary.get(name), computed.get(name), name)
    yield from _configured(summary["config"], records)
    yield from _thresholds(records)


def audit_reduced(folder: Path) -> Iterator[str]:
    """Yields the differences of the reduced runs' folder."""
    summary = json.loads((folder / "summary.json").read_text())
    records = {str(record["run"]): record for record in read_records(folder / "records.csv")}
    yield from differences(summary["runs"], _plain(records), "runs", _STORED)
    claims = [make_claim(REDUCED_RUNS[name], record) for name, record in records.items()]
    computed = [claim._asdict() for claim in claims]
    yield from differences(summary["claims"], _plain(computed), "claims", _STORED)
    total = sum(float(record["wall_time_s"]) for record in records.values())
    yield from differences(summary["wall_time_s"], total, "wall_time_s", 1e-6)


def differences(stated: Any, computed: Any, where: str, relative: float = _SAME) -> Iterator[str]:
    """Yields a line for every leaf in which two JSON values differ; numbers to `relative`.

    >>> list(differences({"a": [1.0, 2.0]}, {"a": [1.0, 3.0]}, "x"))
    ['x.a[1] is 2.0, the records give 3.0']
    >>> list(differences(1.0, 1.0 + 1e-12, "x"))
    []
    """
    if isinstance(stated, Mapping) and isinstance(computed, Mapping):
        for key in [*stated, *(key for key in computed if key not in stated)]:
            yield from differences(stated.get(key), computed.get(key), f"{where}.{key}", relative)
    elif isinstance(stated, list) and isinstance(computed, list) and len(stated) == len(computed):
        for number, pair in enumerate(zip(stated, computed, strict=True)):
            yield from differences(*pair, f"{where}[{number}]", relative)
    elif not _equal(stated, computed, relative):
        yield f"{where} is {_short(stated)}, the records give {_short(computed)}"


def _equal(stated: Any, computed: Any, relative: float) -> bool:
    numbers = all(
        isinstance(value, int | float) and not isinstance(value, bool)
        for value in (stated, computed)
    )
    if numbers:
        return math.isclose(stated, computed, rel_tol=relative, abs_tol=1e-12)
    return type(stated) is type(computed) and bool(stated == computed)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value: Any) -> Any:
    """As JSON gives it back; a number that is not finite is None there."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _configured(config: Mapping[str, Any], records: pd.DataFrame) -> Iterator[str]:
    """Whether the records are of the seeds, delays and number of epochs that were asked for."""
    rows = records[records.series == "mini-batch"] if "start" in config else records
    if "digits" in config and "panel" in rows:  # fig. 11's (a), a configuration within another
        yield from _configured(config["digits"], rows[rows.panel == "a"])
        rows = records = rows[rows.panel == "b"]
    if "series" in rows:
        rows = rows[rows.series != "pilot"]  # whose seed is beside those that are reported
    for name, column in (("seeds", "seed"), ("delays", "delay")):
        if name in config and column in rows:
            asked, found = set(config[name]), set(rows[column].unique().tolist())
            if name == "delays":
                found -= {0}  # S-SGD
            if asked != found:
                yield f"config: {name} {sorted(asked)}; records: {sorted(found)}"
    epochs = config.get("train", {}).get("epochs")
    if epochs is not None and "epoch" in rows and rows.epoch.max() != epochs:
        yield f"the config asks for {epochs} epochs, the records end at {rows.epoch.max()}"
    if "start" in config:
        rate = config["start"]["learning_rate"]
        if set(rows.start_learning_rate.unique()) != {rate}:
            yield f"the records' start_learning_rate is not the config's, {rate}"


def _thresholds(records: pd.DataFrame) -> Iterator[str]:
    """Whether the thresholds of constant delays put a root of the companion matrix on the circle.

    Columns: predicted with sharpness (figs. 2, 12), edge with learning_rate (eos), threshold (figs.
    4, 6 and 10, whose method the series names).
    """
    columns = set(records.columns)
    if {"predicted", "sharpness", "delay"} <= columns:
        cases = records.drop_duplicates(["delay", "sharpness"])
        steps, method = cases.predicted * cases.sharpness, [(0.0, "heavy_ball", True)] * len(cases)
    elif {"edge", "learning_rate", "kind"} <= columns:
        cases = records[records.delays == "constant"]
        cases = cases.drop_duplicates(["delay", "momentum", "kind", "learning_rate"])
        steps = cases.edge * cases.learning_rate
        method = [(m, kind, True) for m, kind in zip(cases.momentum, cases.kind, strict=True)]
    elif {"threshold", "mean_delay", "momentum"} <= columns:
        cases = records[records.mean_delay <= 64].rename(columns={"mean_delay": "delay"})
        steps = cases.threshold
        damped = "damping" in columns
        method = [
            (row.momentum, "heavy_ball", row.damping == "damped")
            if damped
            else (row.momentum, "shifted", True)
            for row in cases.itertuples()
        ]
    else:
        return
    for delay, step, which in zip(cases.delay, steps, method, strict=True):
        radius = companion_radius(int(delay), float(step), *which)
        if abs(radius - 1.0) > _AT_EDGE:
            yield f"tau = {delay:g}, {which}: the largest root at step {step:.6g} is {radius:.8f}"


def companion_radius(delay: int, step: float, momentum: float, kind: str, dampening: bool) -> float:
    """Largest eigenvalue of the update of (x_n, ..., x_{n-tau-1}), written from the update rule.

    >>> companion_radius(0, 2.0, 0.0, "heavy_ball", True)
    1.0
    """
    matrix = np.eye(delay + 2, k=-1)
    late = delay if kind == "shifted" else 0
    matrix[0, 0] = 1.0
    matrix[0, late] += momentum
    matrix[0, late + 1] -= momentum
    matrix[0, delay] -= step * (1.0 - momentum if dampening else 1.0)
    return float(np.abs(np.linalg.eigvals(matrix)).max())
