"""Tables in Markdown, of results and of benchmarks."""

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import DataRow, TableFormat, tabulate

_ROW = DataRow("|", "|", "|")
_MARKDOWN = TableFormat(
    lineabove=None,
    linebelowheader=lambda widths, _: "|" + "---|" * len(widths),
    linebetweenrows=None,
    linebelow=None,
    headerrow=_ROW,
    datarow=_ROW,
    padding=1,
    with_header_hide=None,
)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    r"""Returns rows of equal keys as a Markdown table; numbers to four digits.

    >>> print(markdown_table([{"delay": 2, "ratio": 1.02345}, {"delay": 16000, "ratio": None}]))
    | delay | ratio |
    |---|---|
    | 2 | 1.023 |
    | 16,000 | - |
    """
    cells = [{head: _cell(value) for head, value in row.items()} for row in rows]
    as_they_are = {"disable_numparse": True, "stralign": None, "numalign": None}
    return tabulate(cells, headers="keys", tablefmt=_MARKDOWN, **as_they_are)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value).replace("|", "\\|")
