"""README.md of a folder of results: what was run, how far from the paper, what held, pictures."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.claims import Claim, count_held, outcome
from experiments.distance import distance, in_words
from experiments.reproduce import FIGURES, folder_name
from experiments.tables import markdown_table

_HEAD = """# Results

Written by `scripts/reproduce.py` from the summaries beside it; each folder has the table
(`records.csv`), the picture and `summary.json`: configuration, seeds, versions, commit and every
claim with the expected and the measured number. `make figures` makes all of it again, `make audit`
computes every number again from the records.

A *proxy* is a smaller model or data set in the place of the paper's; what it shows is the effect,
not the paper's error rates. A claim that failed says so here and in its summary. Figures 13, 12 and
9 draw the runs of 1, 2 and 5. Times were taken with other work on the same two cores.
"""
_CLAIMS = """
An interval is that of the measured number: 90 % of a paired difference over seeds (its ends are
one-sided tests at 5 %, and a claim of sameness is both of them, TOST), 95 % of a slope or a ratio
that theory predicts: there a claim holds where the whole interval is as expected. Of the edge at
one delay it is the lowest and the highest rate between which the seeds' edges lie, and the claim
is about their mean. A dash is a number that has none, or a single seed.
"""
_DISTANCE = """
The paper's setting is that of the `paper` preset, which runs it with one command; what its runs
take is in [paper_plans.md](paper_plans.md).
"""
_UNKNOWN = "No reason found yet."


def write_page(out: Path) -> None:
    """Writes `out`/README.md from the summaries that are in `out`."""
    summaries = {}
    for figure in FIGURES:
        file = out / folder_name(figure) / "summary.json"
        if file.exists():
            summaries[figure] = json.loads(file.read_text())
    (out / "README.md").write_text(page(summaries))


def page(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the page as Markdown: figures, distances, what failed, claims, pictures."""
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
    lines += ["", "## How far from the paper", _DISTANCE, markdown_table(_distances(summaries))]
    lines += _failures(claims)
    lines += ["", "## Claims", _CLAIMS, markdown_table(_claim_rows(claims))]
    names = [folder_name(figure) for figure in summaries]
    pictures = [
        f'<a href="{name}/{name}.png"><img src="{name}/{name}.png" width="400" '
        f'alt="figure {figure}"></a>'
        for figure, name in zip(summaries, names, strict=True)
    ]
    return "\n".join([*lines, "", "## Pictures", "", *pictures]) + "\n"


def _distances(summaries: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for figure, summary in summaries.items():
        config = summary["config"]
        preset = importlib.import_module(FIGURES[figure]).PRESETS["paper"]
        paper = preset._asdict() if hasattr(preset, "_asdict") else preset.to_dict()
        apart = distance(config, paper)
        ours = "the same" if apart == "none" else in_words(config)
        rows.append(
            {"figure": figure, "the paper's": in_words(paper), "ours": ours, "distance": apart}
        )
    return rows


def _failures(claims: Mapping[str, list[Claim]]) -> list[str]:
    """What does not hold, by figure, and the reason that its module gives."""
    lines = []
    for figure, found in claims.items():
        failed = [f"* figure {figure}: {outcome(claim)}" for claim in found if not claim.holds]
        if failed:
            why = getattr(importlib.import_module(FIGURES[figure]), "WHY", _UNKNOWN)
            lines += [*failed, "", f"  Why, we think: {why}", ""]
    return ["", "## What does not hold here, and what we think why", "", *lines] if lines else []


def _claim_rows(claims: Mapping[str, list[Claim]]) -> list[dict[str, Any]]:
    return [
        {
            "figure": figure,
            "claim": claim.claim,
            "expected": claim.expected,
            "measured": claim.measured,
            "interval": claim.interval and " to ".join(f"{end:.4g}" for end in claim.interval),
            "holds": claim.holds,
        }
        for figure, found in claims.items()
        for claim in found
    ]
