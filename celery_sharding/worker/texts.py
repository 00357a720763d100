"""Texts of what a task's code has made: asking for one runs that code, which may raise anything."""

from __future__ import annotations


def text_of(exc: BaseException) -> str:
    """Return the text of an exception, or say that it has none."""
    try:
        return str(exc)
    except BaseException:  # whatever its `__str__` raises, an exit included
        return f"<{type(exc).__name__}, whose text cannot be had>"


def describe(exc: BaseException) -> str:
    """Return an exception as a line for a log, or for a dead letter."""
    try:
        return repr(exc)
    except BaseException:
        return f"<{type(exc).__name__}, which cannot be shown>"
