"""Computes every number of the committed summaries again from their records: scripts/audit.py."""

import sys
from pathlib import Path

# The laboratory is no part of the installed library.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> int:
    """Audits a folder of results; returns the exit code: 1 where anything differs."""
    from asgd_jax.command_line import OneLineParser

    parser = OneLineParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", default="results", help="folder of results (default: results)")
    out = Path(parser.parse_args().out)

    from experiments.audit import audit

    try:
        found = audit(out)
    except (ValueError, OSError) as error:
        print(f"audit.py: {error}", file=sys.stderr)
        return 2
    for line in found:
        print(line)
    print(f"{len(found)} differences in {out}" if found else f"{out}: every number is its records'")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
