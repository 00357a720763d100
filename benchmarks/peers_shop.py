"""The app of `benchmarks.peers`: one task that writes a row, under the protection that the environment names."""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery import Celery
from kombu import Queue
from sqlalchemy import Column, Integer, MetaData, String, Table, create_engine, event
from sqlalchemy.orm import Session

from celery_sharding import deduplicate
from celery_sharding.dedup import claim_metadata, current_claim

SIDE = os.environ["BENCH_SIDE"]
HALF_SECONDS = 0.005

engine = create_engine(f"sqlite:///{Path(os.environ['BENCH_FOLDER']) / 'effects.db'}", connect_args={"timeout": 60})
metadata = MetaData()
effects = Table("effects", metadata, Column("id", Integer, primary_key=True), Column("key", String, nullable=False))

app = Celery("peers", broker=os.environ["BENCH_BROKER"], backend=os.environ["BENCH_BACKEND"])
app.conf.update(
    task_acks_late=os.environ["BENCH_ACKS"] == "late",
    task_reject_on_worker_lost=os.environ["BENCH_ACKS"] == "late",
    broker_transport_options={"confirm_publish": True},
    broker_connection_retry_on_startup=True,
    task_queues=[Queue(os.environ["BENCH_QUEUE"], queue_arguments={"x-queue-type": "quorum"})],
    task_default_queue=os.environ["BENCH_QUEUE"],
)
app.conf.singleton_backend_url = app.conf.result_backend
app.conf.ONCE = {"backend": "celery_once.backends.Redis", "settings": {"url": app.conf.result_backend}}


@event.listens_for(engine, "connect")
def _wait_for_nobody_who_reads(connection, record):
    connection.execute("PRAGMA journal_mode=WAL")


def make_tables() -> None:
    """Make the tables of all sides."""
    metadata.create_all(engine)
    claim_metadata.create_all(engine)


def pay(key):
    time.sleep(HALF_SECONDS)
    with Session(engine) as session:
        session.execute(effects.insert().values(key=key))
        session.commit()
    time.sleep(HALF_SECONDS)


if SIDE == "celery-singleton":
    from celery_singleton import Singleton

    pay = app.task(base=Singleton, name="pay")(pay)
elif SIDE == "celery-once":
    from celery_once import QueueOnce

    pay = app.task(base=QueueOnce, once={"graceful": True}, name="pay")(pay)
elif SIDE == "@deduplicate":

    @app.task(name="pay")
    @deduplicate(key="key", ttl_seconds=3_600, lease_seconds=5)
    def pay(key):
        time.sleep(HALF_SECONDS)
        with Session(engine) as session, current_claim().transaction(session):
            session.execute(effects.insert().values(key=key))
        time.sleep(HALF_SECONDS)

else:
    pay = app.task(name="pay")(pay)
