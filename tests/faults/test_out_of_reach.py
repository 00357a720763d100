"""A broker that takes connections before its streams are up: on a node that no other test uses.

Brokers of 3.x answer for a moment after a restart as if the group's streams did not exist: what is sent to them is
returned. Taken for an empty manifest, that would begin the group anew beside its own queues. The moment is too short to
meet by chance, so the test makes it: it hides the queue's record, as the broker does while it starts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from kombu import Connection

from celery_sharding.config import ShardGroup
from celery_sharding.errors import OutOfReach
from celery_sharding.layout.ensure import ensure_group
from celery_sharding.layout.manifest import load
from celery_sharding.testing import RabbitNode
from celery_sharding.topology import Names

GROUP = ShardGroup("orders", 2)
NAMES = Names("orders")
_QUEUE = f'rabbit_misc:r(<<"/">>, queue, <<"{NAMES.manifest}">>)'
HIDE = f"mnesia:dirty_delete(rabbit_queue, {_QUEUE})."
SHOW = f"[Q] = mnesia:dirty_read(rabbit_durable_queue, {_QUEUE}), mnesia:dirty_write(rabbit_queue, Q)."


@pytest.fixture
def node() -> Iterator[RabbitNode]:
    with RabbitNode() as started:
        yield started


def test_a_manifest_that_is_not_up_yet_is_waited_for_and_never_taken_for_an_empty_one(node: RabbitNode) -> None:
    # Given a group whose manifest is not up yet
    with Connection(node.url) as connection:
        before = ensure_group(lambda: Connection(node.url), GROUP, owner="w1")
        node.ctl("eval", HIDE)
        # When it is read, then it is not taken for an empty one
        with pytest.raises(OutOfReach, match="still starting"):
            load(connection, NAMES)
        # When a worker looks while it comes up
        showing = threading.Timer(1.5, node.ctl, ("eval", SHOW))
        showing.start()
        after = ensure_group(lambda: Connection(node.url), GROUP, owner="w2")
        showing.join()
        # Then the worker waits, and finds what was there
        assert after == before
        node.ctl("eval", HIDE)
        with pytest.raises(OutOfReach):
            ensure_group(lambda: Connection(node.url), GROUP, owner="w3", wait_seconds=0.5)
