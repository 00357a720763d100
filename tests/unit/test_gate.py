"""The gate of the embedded brokers. That a fork waits for a thread inside is shown on a real file, in `contract`."""

from __future__ import annotations

import dis
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from types import FrameType
from typing import Any

import pytest

from celery_sharding.brokers.embedded import gate as module
from celery_sharding.brokers.embedded.gate import gate

pytestmark = [
    pytest.mark.timeout(20),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


class Struck(BaseException):
    """What a signal handler raises."""


@contextmanager
def handling_alarms(handler: Callable[[int, FrameType | None], None]) -> Iterator[list[object]]:
    """Let `handler` take SIGALRM; yields the kinds of errors in hooks of forks, which Python only reports."""
    reported: list[object] = []
    hook, before = sys.unraisablehook, signal.signal(signal.SIGALRM, handler)
    sys.unraisablehook = lambda error: reported.append(error.exc_type)
    try:
        yield reported
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.unraisablehook = hook


def is_in_gate(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_globals is vars(module)


def fork() -> int:
    """Fork a child that enters and leaves; returns its exit code, 0 if it could."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(15)
        with gate:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def enter_elsewhere() -> None:
    """Enter and leave in another thread."""

    def enter() -> None:
        with gate:
            pass

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()


def test_a_thread_that_is_inside_forks_at_once_and_its_child_can_leave_and_enter() -> None:
    # Given a thread that is inside, twice
    with gate, gate:
        # When it forks
        child = os.fork()
    # Then it and its child leave, and enter again
    with gate:
        if not child:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_fork_waits_for_who_is_inside_though_a_signal_handler_raises() -> None:
    # Given a thread that is inside until a signal handler has raised
    entered, raised, left = threading.Event(), threading.Event(), threading.Event()

    def strike(number: int, frame: FrameType | None) -> None:
        if is_in_gate(frame) and not raised.is_set():
            raised.set()
            raise Struck

    def work() -> None:
        with gate:
            entered.set()
            raised.wait()
            left.set()

    thread = threading.Thread(target=work)
    thread.start()
    entered.wait()
    # When a fork waits for it meanwhile
    with handling_alarms(strike) as reported:
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        code = fork()
    # Then it has waited, the error is reported, and everybody may enter
    assert (code, left.is_set(), reported) == (0, True, [Struck])
    thread.join()
    enter_elsewhere()


@pytest.mark.parametrize("struck", ["shut", "open"])
def test_a_signal_handler_may_raise_anywhere_in_the_hooks_of_a_fork(struck: str) -> None:
    with ThreadPoolExecutor(1) as elsewhere:
        # Given each place where a handler may run
        for place in count():
            # When one raises there, then nobody else may enter while the gate is shut, and everybody afterwards
            shutting = call_as_a_fork_does(module._shut, place if struck == "shut" else None)
            assert not elsewhere.submit(gate.acquire, blocking=False).result(), place
            opening = call_as_a_fork_does(module._open, place if struck == "open" else None)
            assert elsewhere.submit(gate.acquire, blocking=False).result(), place
            elsewhere.submit(gate.release).result()
            if not (shutting or opening):
                break
    assert place > 3


def call_as_a_fork_does(hook: Callable[[], None], place: int | None) -> bool:
    """Call `hook` twice and raise once, at the `place`th point at which Python lets signal handlers run; False if none.

    They run when a function begins, and after a call.
    """
    passed, last, has_raised = 0, "", False

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal passed, last, has_raised
        if not is_in_gate(frame):
            return None
        frame.f_trace_opcodes = True
        may_run = event == "call"
        if event == "opcode":
            may_run, last = last.startswith("CALL"), dis.opname[frame.f_code.co_code[frame.f_lasti]]
        if may_run and passed == place:
            has_raised = True
            raise Struck
        passed += may_run
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for _ in range(2):
            with suppress(Struck):
                hook()
    finally:
        sys.settrace(before)
    return has_raised
