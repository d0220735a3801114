"""Markdown of values that others wrote, for cards.

In: any value. Out: text that can be nothing but text where it stands.
"""

from collections.abc import Sequence

_ESCAPED = str.maketrans({"<": "&lt;", ">": "&gt;", "|": "&#124;", "[": "&#91;", "`": "&#96;", "*": "&#42;"})


def clean(value: object) -> str:
    """A value that somebody else wrote, as one line of Markdown that is nothing but text."""
    return " ".join(str(value).split()).replace("&", "&amp;").translate(_ESCAPED)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; cells from elsewhere have gone through `clean`."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
