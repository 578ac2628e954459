"""A griffe extension: doctests and their output stand in docstrings as code, not as text."""

from typing import Any

import griffe


class FenceDoctests(griffe.Extension):
    """Fences every block that begins with a prompt and ends with an empty line."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fence(obj.docstring.value)


def fence(text: str) -> str:
    """Returns the docstring with its doctests in fences."""
    lines, inside = [], ""
    for line in text.splitlines():
        if not inside and line.lstrip().startswith(">>> "):
            inside = line[: len(line) - len(line.lstrip())] or "-"
            # A doctest at the margin ends the section above it, which would else swallow it.
            lines.append(f"{inside.strip('-')}```pycon")
        if inside and not line.strip():
            lines.append(f"{inside.strip('-')}```")
            inside = ""
        lines.append(line)
    if inside:
        lines.append(f"{inside.strip('-')}```")
    return "\n".join(lines)
