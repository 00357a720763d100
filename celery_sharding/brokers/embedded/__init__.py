"""The same groups without a server: on `memory://` and `sqla+sqlite:///FILE`, for tests, demos and small installs.

    shards.orders         x-consistent-hash exchange of ours ─▶ shards.orders.g001.000 … .007
    shards.orders.dead    dead letters

Tasks of one key run one at a time, in the order they were published, retries and dead letters included. A warm stop and
the next start keep that order and lose nothing. All of it rests on the lanes of ONE worker per group: a second one is
refused while the first lives. There are no standbys, no live resharding, no manifest and no journal.

A killed worker (SIGKILL, power):

    memory://   the queues live in the process and die with it.
    sqlite      a message is a row until it is acknowledged, so nothing is lost and the order stays. What the worker
                held is redelivered; what it was running runs again (`@deduplicate` prevents that). Retries and attempts
                made so far are forgotten: they are counted within one life of a worker.

kombu's own consumers lose or reorder messages. Its SQL transport marks what it hands out as invisible, never looks at
it again after a kill, and returns messages at a close behind all others, in reverse order; its memory transport drops
them. So channels of ours read the shards (`memory`, `sql`).

The number of shards is fixed while messages wait: another number is refused until they have run. If none wait and no
worker runs, it is taken over at once.
"""

from celery_sharding.brokers.embedded.backing import EmbeddedBacking

__all__ = ["EmbeddedBacking"]
