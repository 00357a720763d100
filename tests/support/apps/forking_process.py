"""Forks while a thread is in the middle of a transaction on the broker's file; the child publishes.

Prints for each thing that such a thread may do how the child ended: 0 if it has published.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

import sqlalchemy as sa

from celery_sharding.brokers.embedded.backing import ShardConnection
from celery_sharding.brokers.embedded.ring import shard_of
from celery_sharding.brokers.embedded.sql import SqlShardChannel
from celery_sharding.topology import Names
from embedded_shop import GROUP, app, plain, step

CHILD_SECONDS_MAX = 20
in_transaction, forking = threading.Event(), threading.Event()


@sa.event.listens_for(sa.Engine, "commit")
def wait_for_the_fork(connection: sa.Connection) -> None:
    if threading.current_thread().name == "busy":
        in_transaction.set()
        forking.wait()


def fork_beside(work: Callable[[], object]) -> int:
    """Return the exit code of a child that was forked when `work`, in a thread, was about to commit."""
    in_transaction.clear()
    forking.clear()
    busy = threading.Thread(target=work, name="busy")
    busy.start()
    in_transaction.wait()
    child = os.fork()
    if not child:
        signal.alarm(CHILD_SECONDS_MAX)
        step.delay("child", 0)
        os._exit(0)
    busy.join()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


step.delay("a", 0)
os.register_at_fork(before=forking.set)  # what is registered last is called first
with app.connection_for_read() as reader:
    reader.connect()
    channel = ShardConnection(reader, SqlShardChannel).channel()
    channel.basic_consume(Names(GROUP).shard(1, shard_of("a", 4)), False, lambda message: message.ack(), "reader")
    codes = [
        fork_beside(lambda: step.delay("a", 1)),
        fork_beside(lambda: plain.delay(1)),
        fork_beside(lambda: channel.queue_declare("another")),
        fork_beside(lambda: reader.drain_events(timeout=5)),
    ]
sys.stdout.write(f"{codes}\n")
