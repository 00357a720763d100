"""The shop's app with deduplicated tasks, which need a store for their claims."""

from __future__ import annotations

import os
import time

import sqlalchemy
import sqlalchemy.orm

from celery_sharding import current_claim, deduplicate
from shop import app, sharded, trace


@app.task(**sharded)
@deduplicate(key="event", lease_seconds=10)
def once(key, number, event, seconds=0.005):
    """Runs once for each event, and marks how often its body really ran."""
    with trace.run(key, number):
        time.sleep(seconds)
    return f"{event} by {number}"


@app.task(bind=True, **sharded, max_retries=3)
@deduplicate(key="event", lease_seconds=10)
def once_again(self, key, number, event):
    trace.mark("begin", key, number)
    if self.request.retries < 2:
        raise self.retry(countdown=0.2)
    with trace.run(key, number):
        pass
    return self.request.retries


@app.task(bind=True, **sharded, max_retries=3)
@deduplicate(key="event", lease_seconds=300)
def twice(self, key, number, event):
    """Holds its claim for minutes, should nobody end it: its first run leaves it parked for a retry."""
    trace.mark("begin", key, number)
    if not self.request.retries:
        raise self.retry(countdown=1)
    with trace.run(key, number):
        pass
    return f"{event} by {number}"


@app.task(bind=True, **sharded, max_retries=1)
@deduplicate(key="event", lease_seconds=300, on_running="retry")
def coming_again(self, key, number, event):
    """Leaves its claim parked for minutes by its first run; a duplicate comes again."""
    if not self.request.retries:
        trace.mark("parked", key, number)
        raise self.retry(countdown=3)
    with trace.run(key, number):
        pass
    return f"{event} by {number}"


@app.task(**sharded)
@deduplicate(key="event", on_store_error="fail")
def strict(key, number, event):
    with trace.run(key, number):
        pass


@app.task(**sharded, ignore_result=True)
@deduplicate(key="event", on_store_error="fail")
def strict_ignored(key, number, event):
    with trace.run(key, number):
        pass


@app.task(**sharded)
@deduplicate(key="event", lease_seconds=10, on_running="skip")
def skipping(key, number, event, seconds=0.005):
    with trace.run(key, number):
        time.sleep(seconds)
    return f"{event} by {number}"


@app.task(name="plain.after")
def after(value):
    return f"after {value}"


@app.task(name="plain.after_all")
def after_all(values):
    return f"after {' and '.join(values)}"


@app.task(name="plain.early", acks_late=False)
@deduplicate(key="event", lease_seconds=2)
def early(event, number):
    with trace.run(event, number):
        pass
    return f"{event} by {number}"


@app.task(name="plain.ignored", acks_late=False, ignore_result=True)
@deduplicate(key="event", lease_seconds=2)
def ignored(event, number):
    with trace.run(event, number):
        pass
    return f"{event} by {number}"


@app.task(name="plain.late", acks_late=True)
@deduplicate(key="event", lease_seconds=2)
def late(event, number, seconds=0.005):
    with trace.run(event, number):
        time.sleep(seconds)
    return f"{event} by {number}"


@app.task(**sharded)
@deduplicate(key="event", lease_seconds=10)
def pay(key, number, event, seconds=0.01):
    """Writes one row for each event, in one transaction with its claim; `Shop.make_ledger` has made the tables."""
    engine = sqlalchemy.create_engine(os.environ["SHOP_LEDGER"], connect_args={"timeout": 30})
    with sqlalchemy.orm.Session(engine) as session, current_claim().transaction(session):
        session.execute(
            sqlalchemy.text("INSERT INTO ledger VALUES (:event, :number)"), {"event": event, "number": number}
        )
        time.sleep(seconds)
    trace.mark("end", key, number)
    engine.dispose()
