"""What a benchmark item returns: tables of measurements, goals met or missed, and why."""

from typing import Any, NamedTuple

from experiments.claims import Claim

TableRow = dict[str, Any]


class BenchOptions(NamedTuple):
    """How to run the items.

    Attributes:
      quick: the tiniest sizes, seconds an item: to see that it works; the numbers mean nothing.
      torch_python: interpreter of the PyTorch worker.
    """

    quick: bool = False
    torch_python: str = "python"


class Skipped(Exception):
    """An item cannot be measured here; the message is the reason and the remedy, in one line."""


class Goal(NamedTuple):
    """A claim that the project wants to hold, and the reason found where it does not."""

    claim: str
    expected: str
    measured: float
    holds: bool
    reason: str


class Table(NamedTuple):
    """Rows of equal keys under a caption; the keys are the column heads, units in brackets."""

    caption: str
    rows: list[TableRow]


class Result(NamedTuple):
    """Measurements of an item.

    Attributes:
      tables: what was measured.
      goals: what should hold.
      notes: sentences on how it was measured.
    """

    tables: list[Table]
    goals: list[Goal]
    notes: list[str]


def goal(claim: Claim, reason: str = "") -> Goal:
    """Returns a claim as a goal; `reason` is kept only where the claim misses.

    >>> from experiments.claims import at_most
    >>> goal(at_most("steps", 2.0, 1.0), "one too many").reason
    'one too many'
    >>> goal(at_most("steps", 1.0, 1.0), "one too many").reason
    ''
    """
    return Goal(*claim[:4], reason="" if claim.holds else reason or "no reason found yet")


def result_to_json(result: Result) -> dict[str, Any]:
    """Returns the result as plain dicts and lists."""
    return {
        "status": "measured",
        "tables": [table._asdict() for table in result.tables],
        "goals": [one._asdict() for one in result.goals],
        "notes": result.notes,
    }
