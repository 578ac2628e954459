"""Runs benchmark items one after the other and keeps what each measured."""

import gc
import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import merge_item
from benchmarks.result import BenchOptions, Skipped, result_to_json
from experiments.claims import Claim, verdict

_MODULES = "benchmarks"
# An item is a module with `TITLE` and `run(options) -> Result`.
ITEMS: dict[str, str] = {
    name: f"{_MODULES}.{module}"
    for name, module in {
        "delay": "delay_cost",
        "pytorch": "pytorch",
        "sweeps": "sweeps",
        "rounds": "rounds",
        "compile": "compile_time",
        "streaming": "streaming",
        "growth": "growth",
        "calculator": "calculator",
        "cluster": "real_workers",
    }.items()
}


def item_names(text: str) -> list[str]:
    """Returns the items that `--only` asks for: names separated by commas, or all.

    Raises:
      ValueError: for an unknown item, listing those that are known.

    >>> item_names("growth,delay")
    ['delay', 'growth']
    """
    if text == "all":
        return list(ITEMS)
    asked = [name.strip() for name in text.split(",")]
    for name in asked:
        if name not in ITEMS:
            raise ValueError(f"unknown item {name!r}: use {', '.join(ITEMS)}, or all")
    return [name for name in ITEMS if name in asked]


def run_items(names: Sequence[str], out: Path, options: BenchOptions) -> dict[str, Any]:
    """Measures the items and merges each into `out`/bench.json and README.md as soon as it is done.

    Returns:
      The report.

    Raises:
      ValueError: for an unknown item, or a folder that cannot take these results.
      OSError: where `out` cannot be written to.
    """
    report: dict[str, Any] = {"items": {}}
    for name in item_names(",".join(names)):
        module = importlib.import_module(ITEMS[name])
        print(f"{name}: {module.TITLE}", flush=True)
        started = time.perf_counter()
        try:
            item = result_to_json(module.run(options))
        except Skipped as reason:
            item = {"status": "skipped", "reason": str(reason)}
            print(f"  skipped: {reason}", flush=True)
        gc.collect()  # the histories of one item are not to squeeze the next one
        item |= {"title": module.TITLE, "wall_time_s": round(time.perf_counter() - started, 1)}
        report = merge_item(out, name, item, quick=options.quick, order=list(ITEMS))
        for one in item.get("goals", []):
            fields = ("claim", "expected", "measured", "holds")
            print(f"  {verdict(Claim(*(one[field] for field in fields)))}")
        print(f"  {item['wall_time_s']} s", flush=True)
    return report
