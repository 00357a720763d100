"""What the worker's core asks of the world around it, as narrow protocols: whoever stands in for one needs no broker.

The log has a file of its own (`log`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Calls(Protocol):
    """Where and when the calls of a worker run; `calls` says what each of these promises."""

    def post(self, call: Callable[[], None]) -> None: ...

    def call_main(self, call: Callable[[], None]) -> None: ...

    def call_soon(self, call: Callable[[], None]) -> None: ...

    def call_after(self, seconds: float, call: Callable[[], None]) -> Any: ...
