"""The timer: what is due is called in its order, at its moment, and nothing else is."""

from __future__ import annotations

import threading

from celery_sharding.worker.timer import Alarm, Alarms, Timer


class Now:
    """Makes a call at once, in the timer's thread."""

    def post(self, call):
        call()


def test_what_is_due_is_called_in_the_order_of_its_moments_then_of_the_calls():
    # Given calls for two moments
    alarms, called = Alarms(), []
    for due_at, name in ((0.2, "late"), (0.1, "first"), (0.1, "second")):
        alarms.add(due_at, Alarm(lambda name=name: called.append(name)))
    assert alarms.next_at == 0.1
    # When the first moment is there
    assert alarms.take_due(0.09) == []
    for alarm in alarms.take_due(0.1):
        alarm.ring()
    # Then those of it are called
    assert called == ["first", "second"]
    # and the other at its own
    for alarm in alarms.take_due(5.0):
        alarm.ring()
    assert called == ["first", "second", "late"]
    assert alarms.next_at is None


def test_a_sooner_call_does_not_wait_for_a_later_one():
    # Given a timer that sleeps until a call that is far away
    sooner = threading.Event()
    timer = Timer(Now())
    timer.call_after(3_600, lambda: None)
    # When one is to come sooner
    timer.call_after(0.0, sooner.set)
    # Then it comes
    assert sooner.wait(30)
    timer.stop()


def test_a_call_that_raises_does_not_stop_the_others():
    # Given a timer that makes its calls itself
    timer, called = Timer(Now()), threading.Event()
    # When one raises
    timer.call_after(0.0, lambda: 1 / 0)
    timer.call_after(0.0, called.set)
    # Then the next is made
    assert called.wait(30)
    timer.stop()


def test_nothing_is_called_after_the_end():
    # Given a timer with a call
    called: list[int] = []
    timer = Timer(Now())
    timer.call_after(3_600, lambda: called.append(1))
    # When it is stopped
    timer.stop()
    # Then the call is gone, and no other is taken
    asked = threading.Event()
    timer.call_after(0.0, asked.set)
    assert not asked.wait(0.1)
    assert called == []
