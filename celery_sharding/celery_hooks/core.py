"""What a request of Celery's needs of its message and of the worker's core, which its endings are reported to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Place(Protocol):
    """The shard that a message came from.

    Attributes:
        label: Its name for people: `orders/3`.
    """

    @property
    def queue(self) -> str: ...
    @property
    def label(self) -> str: ...


class Delivery(Protocol):
    """A message as its shard delivered it.

    Attributes:
        untold_runs: Runs of which nothing says how they ended, since the result backend failed them.
    """

    untold_runs: int

    @property
    def place(self) -> Place: ...
    @property
    def is_orphan(self) -> bool:
        """Whether the broker has the message again while it runs."""

    @property
    def keeps_failures(self) -> bool:
        """Whether its group keeps what has failed as a dead letter."""

    @property
    def is_in_lane(self) -> bool:
        """Whether a lane waits for its end."""


class States(Protocol):
    """Tells the result backend what became of runs."""

    def tell(self, what: str, call: Callable[[], object], then: Callable[[bool], None] | None = None) -> None: ...


class Failures(Protocol):
    """What becomes of messages that do not run again."""

    @property
    def states(self) -> States: ...
    def note(self, request: Any, exc: BaseException) -> None: ...
    def bury(self, request: Any, reason: str, error: str | None = None) -> None: ...
    def give_up(self, request: Any, reason: str, error: str) -> None: ...


class Settling(Protocol):
    """Acknowledges messages."""

    def leave_orphan(self, delivery: Any) -> bool: ...


class Executor(Protocol):
    """Takes the reports of how runs ended; `worker.executor` says what each means."""

    @property
    def failures(self) -> Failures: ...
    @property
    def settling(self) -> Settling: ...
    def finish(self, request: Any) -> None: ...
    def finish_when_gone(self, request: Any) -> None: ...
    def leave(self, request: Any) -> None: ...
    def retry(self, request: Any, retry: Any) -> None: ...
    def wait(self, request: Any, wait: Any) -> None: ...
    def lose(self, request: Any, error: str) -> None: ...
    def abandon(self, request: Any) -> None: ...
    def await_state(self, request: Any, end: Callable[[bool], None]) -> None: ...
