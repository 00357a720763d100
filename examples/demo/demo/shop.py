"""What a user writes: one task on a shard group with a claim, and the same task as stock Celery has it.

Worker processes import this module; the demo tells them by the environment where broker and databases are.
"""

from __future__ import annotations

import os
import time
import zlib
from pathlib import Path

from celery import Celery, Task
from celery.signals import task_postrun
from celery.worker.consumer import Consumer
from kombu import Queue
from sqlalchemy.orm import Session

from celery_sharding import ShardGroup, Sharding, current_claim, deduplicate
from demo.effects import Effect, open_effects

FOLDER = Path(os.environ["DEMO_FOLDER"])
BROKER_URL = os.environ["DEMO_BROKER_URL"]
NAME = os.environ["DEMO_NAME"]
SHARDS = 8
WORK_SECONDS_MAX = 0.008

# --- celery-sharding ------------------------------------------------------------------------------------------------

sharded = Celery("sharded", broker=BROKER_URL, backend=f"db+sqlite:///{FOLDER / 'claims.db'}")
Sharding(sharded, groups=[ShardGroup(NAME, shards=SHARDS)])


@sharded.task(name="demo.apply_event", shard_group=NAME, shard_key="account", ignore_result=True)
@deduplicate(key="event")
def apply_event(account: str, event: str, position: int, copy: int) -> None:
    work(event)
    # The effect and the claim are committed together, or neither is.
    with Session(open_effects(FOLDER / "sharded.db")) as session, current_claim().transaction(session):
        session.add(Effect(account=account, event=event, position=position, copy=copy))


# --- stock Celery ---------------------------------------------------------------------------------------------------


class StockConsumer(Consumer):
    """Celery's consumer without its queues for delayed delivery: nothing is delayed, and they would stay behind."""

    class Blueprint(Consumer.Blueprint):
        default_steps = tuple(step for step in Consumer.Blueprint.default_steps if "delayed_delivery" not in step)


stock = Celery("stock", broker=BROKER_URL)
stock.conf.update(
    task_queues=[Queue(f"{NAME}-stock", queue_arguments={"x-queue-type": "quorum"})],
    task_default_queue=f"{NAME}-stock",
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_consumer="demo.shop:StockConsumer",
    broker_transport_options={"confirm_publish": True} if BROKER_URL.startswith("amqp") else {},
)


@stock.task(name="demo.apply_event_anywhere", ignore_result=True)
def apply_event_anywhere(account: str, event: str, position: int, copy: int) -> None:
    work(event)
    with Session(open_effects(FOLDER / "stock.db")) as session, session.begin():
        session.add(Effect(account=account, event=event, position=position, copy=copy))


# --- both -----------------------------------------------------------------------------------------------------------


def work(event: str) -> None:
    """Take as long as this event takes: 0 to 8 ms, the same in both runs."""
    time.sleep(zlib.crc32(event.encode()) % 1000 / 1000 * WORK_SECONDS_MAX)


@task_postrun.connect
def note_run(task: Task, args: tuple[object, ...], **_: object) -> None:
    """Note that this message was run, duplicate or not, and by whom: so the demo knows when all of them were."""
    app = os.environ["DEMO_APP"]
    log = os.open(FOLDER / f"{app}.runs", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        # One short write in append mode: lines of several processes do not mix.
        os.write(log, f"{args[2]} {args[3]} {task.request.hostname}\n".encode())
    finally:
        os.close(log)
