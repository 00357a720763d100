"""The shop, with tasks whose ends are as hostile as a task, its classes and receivers can make them."""

from __future__ import annotations

import os

from celery import Task, signals
from celery.exceptions import Reject, WorkerShutdown
from celery.worker.request import Request

from shop import app, sharded, trace

__all__ = ["app"]


@app.task(**sharded)
def step(key, number):
    with trace.run(key, number):
        pass
    return number


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


class Exiting(Exception):
    def __str__(self):
        raise SystemExit("from a text")

    __repr__ = __str__


class Unpicklable(Exception):
    def __init__(self, text):
        super().__init__(text)
        self.made_here = lambda: None

    def __reduce__(self):
        raise TypeError("cannot be pickled")


class NoException(BaseException):
    pass


ERRORS = {
    "unprintable": Unprintable,
    "exiting text": Exiting,
    "unpicklable": Unpicklable,
    "no exception": NoException,
    "system exit": SystemExit,
    "keyboard": KeyboardInterrupt,
    "generator exit": GeneratorExit,
    "shutdown": WorkerShutdown,
    "memory": MemoryError,
}


@app.task(**sharded)
def raises(key, number, what):
    raise ERRORS[what]("hostile")


@app.task(bind=True, **sharded, max_retries=2)
def retries(self, key, number, what):
    raise self.retry(countdown=what, exc=Unprintable())


class Hooks(Task):
    """Its hooks raise what the run was told."""

    def on_success(self, retval, task_id, args, kwargs):
        _raise(kwargs, "on_success")

    def on_failure(self, exc, task_id, args, kwargs, einfo):
        _raise(kwargs, "on_failure")

    def on_retry(self, exc, task_id, args, kwargs, einfo):
        _raise(kwargs, "on_retry")

    def after_return(self, status, retval, task_id, args, kwargs, einfo):
        _raise(kwargs, "after_return")


HOOK_ERRORS = {"error": ValueError, "reject": Reject, "memory": MemoryError, "exit": SystemExit}


def _raise(kwargs, place):
    if kwargs.get("place") == place:
        raise HOOK_ERRORS[kwargs["what"]](f"in {place}")


@app.task(bind=True, **sharded, base=Hooks, max_retries=1)
def hooked(self, key, number, place, what):
    if place == "on_retry":
        raise self.retry(countdown=0)
    if place == "on_failure":
        raise ValueError("to be told")


@app.task(bind=True, **sharded, max_retries=1)
def received(self, key, number, place, what):
    if place == "task_retry":
        raise self.retry(countdown=0)
    if place == "task_failure":
        raise ValueError("to be told")
    if place == "task_rejected":
        raise Reject("not wanted", requeue=False)


def _receive(place):
    def receiver(sender=None, **_):
        # The body's arguments are those of the run that is on top of the stack.
        kwargs = getattr(getattr(sender, "request", None), "kwargs", None) or {}
        if getattr(sender, "name", "") == "hostile.received":
            _raise(kwargs, place)

    getattr(signals, place).connect(receiver, weak=False)


for place in ("task_prerun", "task_postrun", "task_success", "task_failure", "task_retry"):
    _receive(place)


class Hostile(Request):
    """Raises in the callbacks of the pool, as the message says."""

    def _raise(self, place):
        _, kwargs, _ = self.message.payload
        _raise(kwargs, place)

    def on_accepted(self, pid, time_accepted):
        self._raise("on_accepted")
        super().on_accepted(pid, time_accepted)

    def on_failure(self, *args, **kwargs):
        self._raise("on_failure")
        super().on_failure(*args, **kwargs)

    def on_retry(self, exc_info):
        self._raise("on_retry")
        super().on_retry(exc_info)

    def send_event(self, type, **fields):  # noqa: A002
        self._raise("send_event")
        super().send_event(type, **fields)


@app.task(bind=True, **sharded, Request=Hostile, max_retries=1)
def requested(self, key, number, place, what):
    trace.mark("begin", key, number)
    if place == "on_retry":
        raise self.retry(countdown=0)
    if place == "on_failure":
        raise ValueError("to be told")


@app.task(**sharded)
def dies(key, number):
    trace.mark("begin", key, number)
    os._exit(3)


@app.task(**sharded)
def returns(key, number):
    return lambda: None
