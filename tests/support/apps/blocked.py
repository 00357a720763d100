"""The shop, with tasks that show as long as they run, and a command that blocks the main process of a worker."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from uuid import uuid4

from celery.worker.control import control_command

from shop import app, sharded, trace

__all__ = ["app"]


@app.task(**sharded)
def ticking(key, number):
    """Leave a mark every few milliseconds, until a file says that it is enough."""
    _tick(key, number)


@app.task(**sharded, time_limit=2)
def limited(key, number):
    _tick(key, number)


@app.task(**sharded)
def step(key, number):
    with trace.run(key, number):
        pass
    return number


@app.task(**sharded)
def dies(key, number):
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="plain.ticking")
def plain(number):
    _tick("plain", number)


@control_command(args=[("seconds", float)])
def doze(state, seconds):
    """Block the thread that sends the heartbeats."""
    trace.mark("dozes", "main", 0)
    time.sleep(seconds)


def _tick(key, number):
    run = uuid4().hex
    trace.mark("start", key, number, run)
    enough = Path(f"{trace.path}.enough")
    while not enough.exists():
        trace.mark("tick", key, number, run)
        time.sleep(0.02)
    trace.mark("end", key, number, run)
