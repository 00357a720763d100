"""The gate of the embedded brokers. That a fork waits for a thread inside is shown on a real file, in `contract`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import FrameType

import pytest

from celery_sharding.embedded import gate as module
from celery_sharding.embedded.gate import gate

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
        signal.alarm(5)
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


def test_a_signal_handler_may_raise_anywhere_while_the_gate_is_shut_and_opened() -> None:
    # Given a signal handler that raises once in each hook, which are called twice, as a fork does
    may_strike = False

    def strike(number: int, frame: FrameType | None) -> None:
        nonlocal may_strike
        if may_strike and is_in_gate(frame):
            may_strike = False
            raise Struck

    def run_under_fire(hook: Callable[[], None]) -> bool:
        nonlocal may_strike
        may_strike = True
        for _ in range(2):
            with suppress(Struck):
                hook()
        struck, may_strike = not may_strike, False
        return struck

    struck_shutting = struck_opening = 0
    with handling_alarms(strike), ThreadPoolExecutor(1) as elsewhere:
        signal.setitimer(signal.ITIMER_REAL, 0.00001, 0.00001)
        while min(struck_shutting, struck_opening) < 100:
            # When it is shut and opened under a storm of signals
            struck_shutting += run_under_fire(module._shut)
            # Then nobody else may enter meanwhile, and everybody afterwards
            assert not elsewhere.submit(gate.acquire, blocking=False).result()
            struck_opening += run_under_fire(module._open)
            assert elsewhere.submit(gate.acquire, blocking=False).result()
            elsewhere.submit(gate.release).result()
