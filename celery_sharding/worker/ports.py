"""What the worker's core needs of the world around it: Celery's pool and loop, a clock, and the shard of a message.

The core is `executor`, `redelivery` and `run`. It knows these protocols and `log.Log`, and nothing of Celery's worker
or of a connection, so it runs on stand-ins, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from celery_sharding.journal.attempts import Attempt
from celery_sharding.worker.log import Poster
from celery_sharding.worker.place import Place
from celery_sharding.worker.tally import Tally


class Clock(Protocol):
    """Calls a function after some seconds, where lanes may be moved."""

    def call_after(self, seconds: float, call: Callable[[], None]) -> object: ...


class Calls(Clock, Poster, Protocol):
    """Where and when the calls of a worker run; `calls` says what each of these promises."""

    def call_main(self, call: Callable[[], None]) -> None: ...

    def call_soon(self, call: Callable[[], None]) -> None: ...


class Pool(Protocol):
    """Where runs begin: Celery's pool, and what may speak against a run of it.

    Attributes:
        is_green: Its runs are greenlets. One that has just ended has its slot until it is done, and would wait for it
            for ever if it started the next: that is started in a greenlet of its own, by `spawn`.
    """

    @property
    def is_green(self) -> bool: ...

    def slots(self) -> int:
        """Return how many runs it takes at once."""

    def submit(self, request: Any) -> object: ...

    def spawn(self, call: Callable[..., object], *args: Any) -> object: ...

    def bucket_for(self, task_name: str) -> Any:
        """Return the rate-limit bucket of a task, or None; any thread may ask."""

    def hears_broker(self) -> bool:
        """Say whether the broker has shown life lately; nothing starts while it has not."""


class Children(Protocol):
    """The child processes of a pool."""

    def kill(self, pid: int) -> None:
        """Kill a child and the run in it."""


class Loop(Protocol):
    """The turns of the worker's event loop, of a pool that has one.

    Attributes:
        reads_first: The pool runs the task in the loop's own thread, so it reads before each run.
    """

    @property
    def reads_first(self) -> bool: ...

    def call_next(self, call: Callable[[], None]) -> object:
        """Call when the loop comes round."""

    def read(self) -> bool:
        """Read what has come, and say whether that was anything."""


class EarlierAttempts(Protocol):
    """What earlier owners of a group's shards have recorded of its messages."""

    def get(self, message_id: str) -> Attempt | None: ...

    def when_complete(self, call: Callable[[], None]) -> None:
        """Call now, or when everything is read that was written before the shard was taken."""


class Gate(Protocol):
    """What the messages of a segment wait for in earlier ones."""

    def is_open_for(self, delivery: Any) -> bool:
        """Say whether a message may start now."""


class Source(Protocol):
    """The shard that a message came from, as far as the message and its runs need it."""

    @property
    def place(self) -> Place: ...

    @property
    def tally(self) -> Tally: ...

    @property
    def gate(self) -> Gate | None:
        """What its messages wait for; None: nothing."""

    @property
    def attempts(self) -> EarlierAttempts: ...

    def __hash__(self) -> int: ...

    def catch_up(self) -> bool:
        """Read what earlier owners have written of attempts; say whether all of it is known."""

    def note_unnamed(self, message_id: str) -> bool:
        """Take note of a redelivered message that has no id of its own; say whether an equal one came before."""

    def holds(self, delivery: Any) -> bool:
        """Say whether a message is neither acknowledged nor the broker's again."""

    def acknowledge(self, delivery: Any, *, gather: bool) -> None:
        """Tell the broker that a message is done, now or, gathered with others, by `tell_done`.

        Without effect if its channel is gone.
        """

    def tell_done(self) -> None: ...
