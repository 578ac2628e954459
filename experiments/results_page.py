"""README.md of a folder of results: what was run, what held, and the pictures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.claims import Claim, count_held, outcome
from experiments.reproduce import FIGURES, folder_name
from experiments.tables import markdown_table

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
    claims = {
        figure: [Claim(**claim) for claim in summary["claims"]]
        for figure, summary in summaries.items()
    }
    rows = [
        {
            "figure": f"[{figure}]({folder_name(figure)}/summary.json)",
            "what it claims": summary["caption"],
            "claims that hold": count_held(claims[figure]),
            "preset": summary["preset"],
            "proxy": summary.get("proxy") or "no",
            "time": f"{summary['wall_time_s']:.0f} s"
            + (" and earlier runs" if summary.get("found_runs") else ""),
        }
        for figure, summary in summaries.items()
    ]
    lines = [_HEAD, markdown_table(rows)]
    missing = [figure for figure in FIGURES if figure not in summaries]
    if missing:
        lines.append(f"\nNot in this folder: {', '.join(missing)}.")
    failed = [
        f"* figure {figure}: {outcome(claim)}"
        for figure, found in claims.items()
        for claim in found
        if not claim.holds
    ]
    if failed:
        lines += ["", "## What does not hold here", "", *failed]
    names = [folder_name(figure) for figure in summaries]
    pictures = [
        f'<a href="{name}/{name}.png"><img src="{name}/{name}.png" width="400" '
        f'alt="figure {figure}"></a>'
        for figure, name in zip(summaries, names, strict=True)
    ]
    return "\n".join([*lines, "", "## Pictures", "", *pictures]) + "\n"
