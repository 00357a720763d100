"""Text for a terminal."""

from __future__ import annotations


def printable(text: object) -> str:
    """Return `text` with a space for each line break and control character.

    What stands on the broker anybody may have written: keys, names of tasks and workers, texts of errors. A terminal
    would obey what is in them.
    """
    return "".join(part if part.isprintable() else " " for part in str(text))
