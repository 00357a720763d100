"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from celery_sharding.texts import printable


def align(headings: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: set[int]) -> list[str]:
    """Return the lines of a table; the columns in `numeric` stand to the right."""
    lines = [headings, *([printable(text) for text in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]

    def place(column: int, text: str) -> str:
        fit: Callable[[int], str] = text.rjust if column in numeric else text.ljust
        return fit(widths[column])

    return ["  ".join(place(column, text) for column, text in enumerate(line)).rstrip() for line in lines]


def shorten(text: str, width: int) -> str:
    """Return `text` in at most `width` characters, without its middle: names differ at their ends."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"
