"""The app that publishers and workers of a soak share: groups by key, by shard, with a ledger, and with claims alone.

Each run leaves marks in the trace of its group; the name of a run begins with that of its worker.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celery import Celery

from celery_sharding import ShardGroup, Sharding, current_claim, deduplicate
from celery_sharding.testing import Trace
from soak import ledger
from soak.plan import HEARTBEAT_SECONDS

NAME = os.environ["SOAK_NAME"]
FOLDER = Path(os.environ["SOAK_FOLDER"])
WORKER = os.environ.get("SOAK_WORKER", "")
# The traces tell what ran; two lines a task more in the logs would hide what else they say, and cost time.
for _logger in ("celery.worker.strategy", "celery.app.trace"):
    logging.getLogger(_logger).setLevel(logging.CRITICAL)
# Some retries wait long enough that a shard changes hands, or a segment ends, meanwhile.
RETRY_SECONDS = (0.2, 0.2, 0.2, 3.0)

app = Celery("soak", broker=os.environ["SOAK_BROKER"], backend=os.environ["SOAK_BACKEND"])
app.conf.update(
    task_default_queue=f"{NAME}-plain",
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    sharding_heartbeat_seconds=HEARTBEAT_SECONDS,
    sharding_publish_timeout_seconds=5.0,
)
# A message that is hit by one fault after the other is no poison: none may become a dead letter here.
ATTEMPTS_MAX = 100
Sharding(
    app,
    groups=[
        ShardGroup(f"{NAME}-keys", shards=6, max_attempts=ATTEMPTS_MAX),
        ShardGroup(f"{NAME}-serial", shards=4, ordering="shard", max_attempts=ATTEMPTS_MAX),
        ShardGroup(f"{NAME}-ledger", shards=4, max_attempts=ATTEMPTS_MAX),
        ShardGroup(f"{NAME}-once", shards=4, max_attempts=ATTEMPTS_MAX),
    ],
)


@contextmanager
def leave_marks(group: str, key: str, number: int) -> Iterator[None]:
    """Mark the run in the trace of its group, as `Trace.run` does, and with the worker's name."""
    trace = Trace(FOLDER / f"{group}.trace")
    run = f"{WORKER}/{os.getpid()}-{time.monotonic_ns()}"
    trace.mark("start", key, number, run)
    yield
    trace.mark("end", key, number, run)


@app.task(bind=True, shard_group=f"{NAME}-keys", shard_key="key", max_retries=None)
def step(self, key, number, seconds, retries=0, fails=False):
    run("keys", self, key, number, seconds, retries=retries, fails=fails)


@app.task(bind=True, shard_group=f"{NAME}-serial", shard_key="key", max_retries=None)
def step_alone(self, key, number, seconds, retries=0, fails=False):
    run("serial", self, key, number, seconds, retries=retries, fails=fails)


def run(group: str, task: Any, key: str, number: int, seconds: float, *, retries: int, fails: bool) -> None:
    """Retry as often as told, then run for some seconds, then fail if told so."""
    if task.request.retries < retries:
        raise task.retry(countdown=RETRY_SECONDS[number % len(RETRY_SECONDS)])
    with leave_marks(group, key, number):
        time.sleep(seconds)
    if fails:
        raise ValueError(f"no luck with {number}")


@app.task(shard_group=f"{NAME}-ledger", shard_key="key")
@deduplicate(key="number", ttl_seconds=86_400, lease_seconds=10, scope=f"{NAME}-ledger")
def enter(key, number, seconds, **_):
    with (
        leave_marks("ledger", key, number),
        ledger.begin_session(FOLDER) as session,
        current_claim().transaction(session),
    ):
        ledger.enter(session, key, number)
        time.sleep(seconds)


@app.task(shard_group=f"{NAME}-once", shard_key="key")
@deduplicate(key="number", ttl_seconds=86_400, lease_seconds=10, scope=f"{NAME}-once")
def step_once(key, number, seconds, **_):
    with leave_marks("once", key, number):
        time.sleep(seconds)


TASKS = {"keys": step, "serial": step_alone, "ledger": enter, "once": step_once}
