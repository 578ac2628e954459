"""The files of a benchmark: bench.json, merged item by item, and README.md, generated from it."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asgd_jax.training.folder.provenance import environment, write_json
from experiments.tables import markdown_table

JSON_NAME = "bench.json"
README_NAME = "README.md"


def machine() -> dict[str, Any]:
    """Returns the CPU's model, the cores this process may use, and the memory in GiB.

    >>> sorted(machine())
    ['cores', 'cpu', 'memory_gib']
    """
    return {"cpu": _cpu_model(), "cores": num_cores(), "memory_gib": _memory_gib()}


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (OSError, ValueError):
        return None


def read_report(folder: Path) -> dict[str, Any]:
    """Returns the content of bench.json, or an empty report.

    Raises:
      ValueError: for a file that is not a report.
    """
    file = folder / JSON_NAME
    if not file.exists():
        return {"items": {}}
    try:
        report = json.loads(file.read_text())
        report["items"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no benchmark report ({error!r}): move it away") from error
    return report


def merge_item(
    folder: Path, name: str, item: Mapping[str, Any], *, quick: bool, order: Sequence[str]
) -> dict[str, Any]:
    """Puts one item into the folder's report, leaving the others, and writes both files.

    Every item carries the machine, versions and commit that it was measured with.

    Args:
      folder: made when missing.
      name: of the item; an older measurement of it is replaced.
      item: as `result_to_json` gives it.
      quick: whether this is a quick run; it never replaces or joins measurements.
      order: names of all items, as the report lists them.

    Returns:
      The report.

    Raises:
      ValueError: for a folder that holds a report of the other kind, or another file of that name.
      OSError: where the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = read_report(folder)
    if report["items"] and report.get("quick") != quick:
        kind = "a quick run" if quick else "measurements"
        raise ValueError(f"{folder} holds a report that {kind} must not join: choose another --out")
    items = report["items"] | {name: {**item, "machine": machine(), **environment()}}
    report = {"quick": quick, "items": {key: items[key] for key in order if key in items}}
    write_json(folder / JSON_NAME, report)
    # From the file, in which what is no number is null.
    (folder / README_NAME).write_text(format_readme(read_report(folder)))
    return report


def format_readme(report: Mapping[str, Any]) -> str:
    """Returns the report as Markdown: machine, goals, then the tables of every item."""
    items = report["items"]
    lines = ["# Benchmarks", "", *_provenance(items), ""]
    if report.get("quick"):
        lines += [
            "**A quick run: it shows that the benchmark works. The numbers mean nothing.**",
            "",
        ]
    lines += [
        "Medians of interleaved repetitions; a ratio compares two times of the same round. "
        "Absolute times are only a note: they are this machine's, on that day.",
        "",
        "## Goals",
        "",
        *_goals(items),
    ]
    for name, item in items.items():
        lines += ["", f"## {name}: {item['title']}", ""]
        if item["status"] == "skipped":
            lines += [f"Skipped: {item['reason']}"]
            continue
        for table in item["tables"]:
            lines += [f"{table['caption']}:", "", markdown_table(table["rows"]), ""]
        lines += [f"* {note}" for note in item["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def _provenance(items: Mapping[str, Any]) -> list[str]:
    """One sentence for every machine, commit and set of versions among the items."""
    groups: dict[str, list[str]] = {}
    for name, item in items.items():
        where, versions = item["machine"], item["versions"]
        packages = ", ".join(
            f"{package} {versions[package]}"
            for package in ("python", "jax", "jaxlib", "optax", "flax")
            if package in versions
        )
        text = (
            f"{where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB; {packages}; "
            f"commit {item['commit'] or 'unknown'}"
        )
        groups.setdefault(text, []).append(name)
    if len(groups) == 1:
        return [f"{next(iter(groups))}. Made by `make bench`."]
    return ["Made by `make bench`.", ""] + [
        f"* {', '.join(names)}: {text}" for text, names in groups.items()
    ]


def _goals(items: Mapping[str, Any]) -> list[str]:
    rows = [
        {
            "item": name,
            "goal": one["claim"],
            "expected": one["expected"],
            "measured": one["measured"],
            "holds": "yes" if one["holds"] else "**no**",
        }
        for name, item in items.items()
        for one in item.get("goals", [])
    ]
    if not rows:
        return ["None measured."]
    held = sum(row["holds"] == "yes" for row in rows)
    lines = [f"{held} of {len(rows)} hold.", "", markdown_table(rows)]
    missed = [
        f"* {name}, {one['claim']}: {one['reason']}"
        for name, item in items.items()
        for one in item.get("goals", [])
        if not one["holds"]
    ]
    return lines + (["", "Missed, and why:", "", *missed] if missed else [])
