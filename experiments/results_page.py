"""README.md of a folder of results: what was run, what held, and the pictures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.reproduce import FIGURES, folder_name

_HEAD = """# Results

Written by `scripts/reproduce.py` from the summaries beside it; each folder has the table
(`records.csv`), the picture and `summary.json`: configuration, seeds, versions, commit and every
claim with the expected and the measured number. `make figures` makes all of it again.

A *proxy* is a smaller model or data set in the place of the paper's; what it shows is the effect,
not the paper's error rates. A claim that failed says so here and in its summary. Figures 13, 12 and
9 draw the runs of 1, 2 and 5. Times were taken with other work on the same two cores.
"""


def write_page(out: Path) -> None:
    """Writes `out`/README.md from the summaries that are in `out`."""
    summaries = {}
    for figure in FIGURES:
        file = out / folder_name(figure) / "summary.json"
        if file.exists():
            summaries[figure] = json.loads(file.read_text())
    (out / "README.md").write_text(page(summaries))


def page(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the page as Markdown: a table of the figures, their failed claims, thumbnails."""
    lines = [
        _HEAD,
        "| figure | what it claims | claims that hold | preset | proxy | time |",
        "|---|---|---|---|---|---|",
    ]
    for figure, summary in summaries.items():
        held = sum(claim["holds"] for claim in summary["claims"])
        name = folder_name(figure)
        lines.append(
            f"| [{figure}]({name}/summary.json) | {summary['caption']} "
            f"| {held} of {len(summary['claims'])} | {summary['preset']} "
            f"| {summary.get('proxy') or 'no'} | {summary['wall_time_s']:.0f} s"
            f"{' and earlier runs' if summary.get('found_runs') else ''} |"
        )
    missing = [figure for figure in FIGURES if figure not in summaries]
    if missing:
        lines.append(f"\nNot in this folder: {', '.join(missing)}.")
    lines += ["", *_failures(summaries), *_pictures(summaries)]
    return "\n".join(lines) + "\n"


def _failures(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for figure, summary in summaries.items():
        for claim in summary["claims"]:
            if not claim["holds"]:
                measured = claim["measured"]
                number = "not a number" if measured is None else f"{measured:.4g}"
                lines.append(
                    f"* figure {figure}: {claim['claim']}: {number}, expected {claim['expected']}"
                )
    return ["## What does not hold here", "", *lines, ""] if lines else []


def _pictures(summaries: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    lines = ["## Pictures", ""]
    for figure in summaries:
        name = folder_name(figure)
        lines.append(
            f'<a href="{name}/{name}.png"><img src="{name}/{name}.png" width="400" '
            f'alt="figure {figure}"></a>'
        )
    return lines
