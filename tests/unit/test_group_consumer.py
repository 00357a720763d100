"""One group in a worker: it consumes what the manifest says, gives up what it must, and leaves newer groups alone."""

from __future__ import annotations

import pytest

from celery_sharding import ShardGroup
from celery_sharding.keys import key_digest
from celery_sharding.layout.events import Finished
from celery_sharding.layout.model import Layout, Segment
from celery_sharding.topology import Names
from celery_sharding.worker.consume.group import GroupConsumer
from support.stand_ins import Connection, Services

ORDERS = Names("orders")
Q0, Q1 = ORDERS.shard(1, 0), ORDERS.shard(1, 1)
LAYOUT = Layout(segments=(Segment("ring", 1, shards=2),), generation=1, shards=2, through=3, offset=3)
PAUSE = {"event": "pause", "shard": 1, "base": 3}
RESUME = {"event": "resume", "shard": 1, "base": 4}


class Worker:
    """A worker that consumes a group of two shards."""

    def __init__(self, layout: Layout = LAYOUT) -> None:
        self.services, self.connection = Services(), Connection()
        self.repairs = self.released = 0
        self.group = GroupConsumer(ShardGroup("orders", 2), None, host=self, services=self.services.values)
        self.group.open(self.connection, layout)

    def repair_soon(self) -> None:
        self.repairs += 1

    def kill_orphans(self) -> None:
        self.released += 1

    def tell(self, event: dict[str, object], offset: int) -> None:
        """Let the group read a record of its manifest, and what follows from it happen."""
        self.services.log.tails[ORDERS.manifest].tell(event, offset)
        self.services.calls.deliver()

    def tick(self, now: float = 1000.0) -> None:
        self.group.tick(now)
        self.services.calls.deliver()

    def told(self, event: str) -> list[dict[str, object]]:
        """Return what was written to the journal."""
        return [written for written in self.services.log.to(ORDERS.journal) if written["event"] == event]


@pytest.fixture
def worker() -> Worker:
    return Worker()


def test_all_queues_of_the_open_segments_are_consumed(worker: Worker) -> None:
    assert worker.connection.consumed == ["g001.000", "g001.001"]
    assert worker.group.is_complete
    assert worker.group.roles() == {Q0: "standby", Q1: "standby"}


def test_whoever_is_delivered_something_is_the_owner_and_says_so(worker: Worker) -> None:
    worker.connection.channels[Q0].deliver_task("a", "key")
    assert worker.group.roles() == {Q0: "owner", Q1: "standby"}
    assert [(event["queue"], event["change"]) for event in worker.told("handover")] == [(Q0, "taken")]


def test_a_paused_shard_is_given_up_when_its_run_has_ended_and_consumed_again(worker: Worker) -> None:
    # Given an owner with a run
    worker.connection.channels[Q1].deliver_task("a", "key")
    # When the manifest says that its shard is paused
    worker.tell(PAUSE, 4)
    # Then it is leaving until the run has ended
    assert worker.group.roles()[Q1] == "leaving"
    worker.services.finish()
    worker.services.calls.fire()
    worker.services.calls.deliver()
    assert worker.connection.consumed == ["g001.000"]
    assert worker.group.roles()[Q1] == "paused"
    # And consumed again when it is resumed
    worker.tell(RESUME, 5)
    assert worker.connection.consumed == ["g001.000", "g001.001"]


def test_the_next_segment_is_consumed_beside_what_is_left_and_keys_wait_for_that() -> None:
    # Given a generation of which one key is left in one queue, when the next one is there
    unfinished = frozenset({(Q0, key_digest("unfinished"))})
    ended = {"ended": True, "drained": frozenset({Q1}), "reached": frozenset({Q0})}
    left = Segment("ring", 1, 2, unfinished=unfinished, **ended)
    both = Layout(segments=(left, Segment("ring", 2, 1)), generation=2, shards=1, through=9, offset=9)
    worker = Worker(both)
    channel = worker.connection.channels[ORDERS.shard(2, 0)]
    # Then other keys of it start, and that one waits
    channel.deliver_task("waits", "unfinished")
    channel.deliver_task("runs", "another")
    assert worker.services.begun == ["runs"]
    # Until the manifest says that it is finished
    worker.tell(Finished("g001", Q0, key_digest("unfinished"), by="w").as_dict(), 10)
    assert worker.services.begun == ["runs", "waits"]


def test_a_queue_that_is_gone_is_consumed_when_it_is_there_again() -> None:
    # Given a layout with a queue that somebody deleted
    worker = Worker(Layout())
    worker.connection.missing = {Q1}
    worker.group.open(worker.connection, LAYOUT)
    assert not worker.group.is_complete
    # When it is declared anew, then the next tick consumes it
    worker.connection.missing = set()
    worker.tick()
    assert worker.group.is_complete


def test_a_consumer_that_the_broker_has_ended_is_forgotten_and_opened_anew(worker: Worker) -> None:
    # Given a shard whose consumer the broker ends
    lost = worker.connection.channels[Q0]
    lost.cancel()
    # Then the group is to be repaired, its channel is closed, and runs without a message are ended
    assert (worker.repairs, worker.group.is_complete) == (1, False)
    worker.services.calls.deliver()
    assert (lost.is_open, worker.released) == (False, 1)
    # And the next tick opens it anew
    worker.tick()
    assert worker.group.is_complete
    assert worker.connection.channels[Q0] is not lost


def test_a_group_of_a_newer_protocol_is_given_up_and_left_alone(worker: Worker) -> None:
    # Given an owner with a run
    worker.connection.channels[Q0].deliver_task("a", "key")
    # When the manifest asks for a protocol that is not known here
    worker.tell({"event": "requires", "protocol": 99, "base": 3}, 4)
    # Then it gives the shards up in order, stops reading, and writes no vitals any more
    assert worker.connection.consumed == ["g001.000"]
    worker.services.finish()
    worker.services.calls.fire()
    worker.services.calls.deliver()
    assert worker.connection.consumed == []
    assert not any(tail.is_open for tail in worker.services.log.tails.values())
    worker.tick()
    assert worker.told("vitals") == []
    assert worker.group.roles()[Q0] == "bystander, needs protocol 99"


def test_a_control_message_of_a_newer_protocol_is_not_acknowledged(worker: Worker) -> None:
    worker.connection.channels[Q0].deliver({"shard_control": "end", "protocol": 99})
    assert worker.group.is_bystander
    assert worker.connection.channels[Q0].acknowledged == []


def test_records_that_are_gone_unread_are_made_up_for_by_a_layout_read_anew(worker: Worker) -> None:
    # Given a group whose next record is far behind what it has read
    worker.tell({"event": "pause", "shard": 0, "base": 98}, 99)
    # Then it asks for a repair, and acts on nothing
    assert (worker.repairs, worker.group.is_behind) == (1, True)
    assert worker.connection.consumed == ["g001.000", "g001.001"]
    # When the repair has read the layout, then it goes on from that
    old = worker.services.log.tails[ORDERS.manifest]
    worker.group.relearn(Layout(segments=LAYOUT.segments, generation=1, shards=2, paused=frozenset({1}), through=99))
    worker.services.calls.deliver()
    assert (old.is_open, worker.group.is_behind) == (False, False)
    assert worker.connection.consumed == ["g001.000"]


def test_a_worker_that_stops_gives_back_what_has_not_run(worker: Worker) -> None:
    # Given an owner of two messages of a key, one of which runs
    channel = worker.connection.channels[Q0]
    channel.deliver_task("a", "key")
    channel.deliver_task("b", "key")
    # When the worker stops, and the run ends
    worker.group.freeze()
    worker.services.finish()
    worker.group.close()
    # Then what it did is acknowledged, the rest is the broker's again, and the journal says what was counted
    assert (channel.acknowledged, channel.is_open) == ([1], False)
    released = worker.told("handover")[-1]
    assert (released["change"], released["counters"]) == ("released", {"delivered": 2, "done": 1})


def test_what_was_deselected_is_given_up_and_what_is_selected_consumed(worker: Worker) -> None:
    worker.group.select(frozenset({1}))
    worker.services.calls.deliver()
    assert worker.connection.consumed == ["g001.001"]
    worker.group.select(None)
    worker.services.calls.deliver()
    assert worker.connection.consumed == ["g001.000", "g001.001"]
