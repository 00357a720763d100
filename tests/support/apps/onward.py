"""A shop whose tasks hand on work when they end: a test says when that is."""

from __future__ import annotations

import time
from pathlib import Path

from shop import app, sharded, step, trace

__all__ = ["app", "step"]


def wait_for(gate: str) -> None:
    trace.mark("held", "plain", time.time_ns())
    while not Path(gate).exists():
        time.sleep(0.01)


@app.task(name="plain.hold")
def hold(gate):
    wait_for(gate)


@app.task(name="plain.hold_and_fail")
def hold_and_fail(gate):
    wait_for(gate)
    raise ValueError("as it should")


@app.task(bind=True, name="plain.hold_and_replace")
def hold_and_replace(self, gate, key, number):
    wait_for(gate)
    raise self.replace(step.si(key=key, number=number))


@app.task(name="plain.hold_and_call")
def hold_and_call(gate, key, number):
    wait_for(gate)
    step.delay(key=key, number=number)


@app.task(**sharded)
def hold_sharded(gate, key):
    wait_for(gate)


@app.task(shard_group=sharded["shard_group"], shard_key="task_id")
def note_failure(task_id):
    with trace.run("noted", 0):
        pass
