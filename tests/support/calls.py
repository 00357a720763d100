"""Notes which functions of the package are called, in their order, as ARCHITECTURE.md names them."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import celery_sharding

PACKAGE = f"{Path(celery_sharding.__file__).parent}{os.sep}"


class Calls:
    """What is called in the `with` block, by this thread and by those that it starts.

    Attributes:
        here: The calls of this thread.
        elsewhere: Those of all others.
    """

    def __init__(self) -> None:
        self.here: list[str] = []
        self.elsewhere: list[str] = []
        self._thread = threading.get_ident()

    def __enter__(self) -> Self:
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def forget(self) -> None:
        """Begin anew."""
        self.here.clear()
        self.elsewhere.clear()

    def _note(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            calls = self.here if threading.get_ident() == self._thread else self.elsewhere
            calls.append(f"{code.co_filename.removeprefix(PACKAGE)}::{code.co_qualname}")


def find_missing(steps: Iterable[str], calls: Iterable[str]) -> list[str]:
    """Return the first step that is not among the calls behind those before it, and all that follow; [] if none is."""
    left = list(steps)
    for call in calls:
        if left and call == left[0]:
            del left[0]
    return left
