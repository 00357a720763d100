"""Text that others wrote, made fit to store and show: it can be encoded, and is not too long.

A message's headers must fit one frame of the protocol, 128 kB by default; error texts and representations have no
limit, and may contain half a surrogate pair, which UTF-8 cannot encode. An exception's `__str__` is code of the task,
which may raise anything.
"""

from __future__ import annotations

from typing import Any

TEXT_CHARACTERS_MAX = 4_000
ID_CHARACTERS_MAX = 255


def plain_text(value: Any) -> str:
    """Return `value` as text that can be encoded; bytes that are no UTF-8, and half surrogate pairs, are escaped."""
    if isinstance(value, bytes | memoryview):
        return bytes(value).decode(errors="backslashreplace")
    text = value if isinstance(value, str) else str(value)
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def cut(value: Any, characters_max: int = TEXT_CHARACTERS_MAX) -> str:
    """Return the beginning of `value` as text that can be encoded, with a note if it was cut."""
    # Escapes make it longer, so it is cut before and after.
    text = value if isinstance(value, str) else plain_text(value)
    length = len(text)
    shown = plain_text(text[:characters_max])
    if length <= characters_max and len(shown) <= characters_max:
        return shown
    return f"{shown[:characters_max]}… (cut, {length:,} characters)"


def printable(text: object) -> str:
    """Return `text` with a space for each line break and control character.

    Anybody may have written what is on the broker: keys, names of tasks and workers, texts of errors. A terminal would
    obey the control characters in it.
    """
    return "".join(part if part.isprintable() else " " for part in str(text))


def text_of(exc: BaseException) -> str:
    """Return the text of an exception, or a note that it has none."""
    try:
        return str(exc)
    except BaseException:  # whatever its `__str__` raises, an exit included
        return f"<{type(exc).__name__}, whose text cannot be read>"


def describe(exc: BaseException) -> str:
    """Return an exception as a line for a log, or for a dead letter."""
    try:
        return repr(exc)
    except BaseException:
        return f"<{type(exc).__name__}, which cannot be shown>"
