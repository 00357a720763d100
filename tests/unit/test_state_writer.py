"""What the main process says of runs is told in order, again after an error of the backend, and missed by nobody."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace

import pytest
from celery import Celery

from celery_sharding.worker.run import state_writer
from celery_sharding.worker.run.state_writer import StateWriter
from support.stand_ins import Mailbox


class Told:
    """What was told, and whether it was."""

    def __init__(self, count: int) -> None:
        self.told: list[tuple[str, bool]] = []
        self._count = count
        self._all = threading.Event()

    def then(self, name: str):
        def note(is_told: bool) -> None:
            self.told.append((name, is_told))
            if len(self.told) == self._count:
                self._all.set()

        return note

    def wait(self) -> list[tuple[str, bool]]:
        assert self._all.wait(20), self.told
        return self.told


@pytest.mark.parametrize("is_green", [False, True])
def test_calls_are_made_in_order_and_an_error_of_one_ends_no_other(is_green: bool) -> None:
    # Given a writer, and calls of which one fails and one exits
    told = Told(3)
    writer = StateWriter(None, Mailbox(), is_green=is_green)

    def exits() -> None:
        raise SystemExit

    # When they are told
    writer.tell("first", lambda: 1 / 0, told.then("first"))
    writer.tell("second", exits, told.then("second"))
    writer.tell("third", lambda: None, told.then("third"))
    # Then each ends, in order, and says whether it was done
    assert told.wait() == [("first", False), ("second", False), ("third", True)]
    writer.stop(10)


def test_an_error_of_the_backend_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a backend that fails once
    monkeypatch.setattr(state_writer, "_PAUSES_SECONDS", (0.0, 0.0))
    app = Celery("t", backend="cache+memory://", set_as_current=False)
    stock, errors = app.backend.set, [OSError("away")]

    def fails_once(*arguments, **options):
        if errors:
            raise errors.pop()
        return stock(*arguments, **options)

    app.backend.set = fails_once
    backend = app.backend
    # When a state is told
    told = Told(1)
    writer = StateWriter(SimpleNamespace(backend=backend), Mailbox())
    writer.tell("FAILURE", lambda: writer.app.backend.mark_as_failure("id", ValueError("why")), told.then("one"))
    # Then it is stored
    assert told.wait() == [("one", True)]
    assert app.AsyncResult("id").state == "FAILURE"
    writer.stop(10)


def test_what_is_not_told_when_the_worker_ends_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    # Given a backend that does not answer, and two calls
    answers = threading.Event()
    writer = StateWriter(None, Mailbox())
    writer.tell("FAILURE of one", answers.wait)
    writer.tell("FAILURE of two", lambda: None)
    # When the worker ends
    with caplog.at_level(logging.ERROR):
        writer.stop(0.1)
    # Then it says what it did not tell
    assert "FAILURE of one; FAILURE of two" in caplog.text
    answers.set()
