"""What a worker writes with that must survive it: a `LogWriter`, or on the embedded broker what stands in for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something can never be stored as it is, however often it is sent.

    Attributes:
        headers_bytes_max: How much room its headers would have had, if they were too large for a frame.
    """

    why: str
    headers_bytes_max: int | None = None


Refused = Callable[[Refusal], None]
Record = tuple[str, dict[str, Any], Callable[[], None]]


class Log(Protocol):
    """Writes in the background, each stream in the order of the calls; `then` is called when the broker has it.

    What is optional may be dropped when too much waits. What can never be stored as it is is set aside: `refused` is
    called, in place of `then`.
    """

    def append(
        self,
        stream: str,
        event: dict[str, Any],
        then: Callable[[], None] | None = None,
        *,
        optional: bool = False,
        refused: Refused | None = None,
    ) -> None: ...

    def append_all(self, records: list[Record]) -> None: ...

    def put(
        self,
        queue: str,
        body: bytes,
        then: Callable[[], None] | None = None,
        *,
        optional: bool = False,
        refused: Refused | None = None,
        **properties: Any,
    ) -> None: ...

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until all is written; False if it took too long."""

    def stop(self) -> None:
        """Write what waits, briefly, and write no more."""
