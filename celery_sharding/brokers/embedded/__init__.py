"""The same groups without a server: on `memory://` and `sqla+sqlite:///FILE`, for tests, demos and small installs.

    shards.orders         x-consistent-hash exchange of ours ─▶ shards.orders.g001.000 … .007
    shards.orders.dead    dead letters

What holds: tasks of one key run in the order they were published, one at a time, retries and dead letters included; a
warm stop and the next start keep that order and lose nothing. It rests on the lanes of ONE worker a group: a second one
is refused while the first lives. What does not exist here: standbys, live resharding, the manifest and the journal.

A killed worker (SIGKILL, power):

    memory://   the queues live in the process and die with it.
    sqlite      a message is a row until it is acknowledged, so nothing is lost and the order stays. What the worker
                held is delivered again, as redelivered; what it was running is run again (`@deduplicate` removes that).
                Retries and attempts made so far are forgotten: they are counted within one life of a worker.

kombu's own consumers would not do: its SQL transport marks what it hands out as invisible and never looks at it again
after a kill, and puts what it returns at a close behind everything else, last one first; its memory transport drops
that. So shards are read by channels of ours (`memory`, `sql`).

The number of shards is fixed while messages wait: another number is refused until they are run, or taken over at once
if none wait and no worker runs.
"""

from celery_sharding.brokers.embedded.backing import EmbeddedBacking

__all__ = ["EmbeddedBacking"]
