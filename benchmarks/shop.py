"""The app that the workers of the benchmarks run: the same tasks, sharded or stock, as the environment says.

Each task ends by appending the time (8 bytes, monotonic clock, the same in all processes) to one file: nothing cheaper
tells from outside how many have ended, and when the first and the last one did.
"""

from __future__ import annotations

import os
import struct
import time

from celery import Celery
from kombu import Queue

from benchmarks import BRIEF_SECONDS, COUNTDOWN_SECONDS, RATE_LIMIT

SIDE = os.environ["BENCH_SIDE"]
NAME = os.environ["BENCH_NAME"]
ENDS = os.environ["BENCH_ENDS"]

app = Celery("shop", broker=os.environ["BENCH_BROKER"], backend=os.environ.get("BENCH_BACKEND"))
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    broker_transport_options={"confirm_publish": True},
    broker_connection_retry_on_startup=True,
    worker_prefetch_multiplier=int(os.environ.get("BENCH_PREFETCH_MULTIPLIER", "4")),
    task_queues=[Queue(f"{NAME}-stock", queue_arguments={"x-queue-type": "quorum"})],
    task_default_queue=f"{NAME}-stock",
)
options = {}
if SIDE == "sharded":
    # Only here: the memory of a stock worker is that of one without the library.
    from celery_sharding import ShardGroup, Sharding, deduplicate

    Sharding(app, groups=[ShardGroup(NAME, shards=int(os.environ["BENCH_SHARDS"]))])
    options = {"shard_group": NAME, "shard_key": "key"}

_ends: list[int] = []


def note_end(value: float | None = None) -> None:
    """Append the time, or another value, to the file of ends."""
    if not _ends:
        _ends.append(os.open(ENDS, os.O_WRONLY | os.O_APPEND | os.O_CREAT))
    os.write(_ends[0], struct.pack("d", time.monotonic() if value is None else value))


@app.task(**options)
def empty(key, number):
    note_end()


@app.task(**options)
def brief(key, number):
    time.sleep(BRIEF_SECONDS)
    note_end()


@app.task(**options, rate_limit=f"{RATE_LIMIT}/s")
def limited(key, number):
    note_end()


@app.task(bind=True, **options)
def late(self, key, number, due_at=None):
    """Note how much later than it asked for its retry begins, in seconds."""
    if due_at is None:
        due_at = time.monotonic() + COUNTDOWN_SECONDS
        raise self.retry(kwargs={"due_at": due_at}, countdown=COUNTDOWN_SECONDS)
    note_end(time.monotonic() - due_at)


if SIDE == "sharded":

    @app.task(**options)
    @deduplicate(key="number", ttl_seconds=3_600)
    def once(key, number):
        note_end()
