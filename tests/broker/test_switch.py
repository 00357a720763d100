"""First start and recovery, on a real broker: nothing lost, nothing doubled, order kept along the chain."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import amqp
import pika
import pytest
from kombu import Connection

from celery_sharding import topology
from celery_sharding.config import ShardGroup
from celery_sharding.errors import LockHeld, ShardingError, TopologyError, TopologyMismatch
from celery_sharding.layout.end_markers import end_marker
from celery_sharding.layout.ensure import ensure_fixed, ensure_group, find_fault
from celery_sharding.layout.events import RECOVER, RESHARD, Drained, StepBegun, SwitchBegun
from celery_sharding.layout.lock import GroupLock
from celery_sharding.layout.manifest import load, write
from celery_sharding.layout.model import Layout
from celery_sharding.layout.switch import FLIPS, STEPS, Steps, begin_recovery, begin_reshard, carry_on
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.rabbitmq.queues import count_ready
from celery_sharding.rabbitmq.streams import append, publish_confirmed, read_to_end
from celery_sharding.topology import Names
from celery_sharding.wire import END, control_of

RECOVERY_STEPS = range(1, len(STEPS["recover"]) + 1)
RESHARD_STEPS = range(1, len(STEPS["reshard"]) + 1)


@pytest.fixture
def group(group_name) -> ShardGroup:
    return ShardGroup(group_name, 4)


class Publisher:
    """Publishes numbered messages, one after the other, and knows which of them were confirmed."""

    def __init__(self, url: str, names: Names, key: str = "k") -> None:
        # pika would read the virtual host of "amqp://host//" as "", where kombu reads "/"
        self._parameters = pika.URLParameters(f"{url.rstrip('/')}/%2F")
        self._exchange, self.key = names.publish, key
        self._number = 0
        self.confirmed: list[int] = []
        self._progress = threading.Condition()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.connect()

    def connect(self) -> None:
        self._connection = pika.BlockingConnection(self._parameters)
        self._channel = self._connection.channel()
        self._channel.confirm_delivery()

    def publish(self, count: int = 1) -> None:
        for _ in range(count):
            number, self._number = self._number, self._number + 1
            try:
                self._channel.basic_publish(self._exchange, self.key, f"{self.key} {number}".encode(), mandatory=True)
            except pika.exceptions.UnroutableError:
                continue  # the publisher was told
            with self._progress:
                self.confirmed.append(number)
                self._progress.notify_all()

    def start(self) -> None:
        self._thread.start()

    def wait_for(self, more: int) -> None:
        """Wait until `more` messages were confirmed from now on."""
        with self._progress:
            goal = len(self.confirmed) + more
            assert self._progress.wait_for(lambda: len(self.confirmed) >= goal, 30)

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.ident:
            self._thread.join(30)
        if self._connection.is_open:
            self._connection.close()

    def _run(self) -> None:
        while not self._stopped.is_set():
            self.publish()


@pytest.fixture
def publisher(broker_url, names) -> Iterator[Callable[..., Publisher]]:
    made: list[Publisher] = []

    def make(key: str = "k") -> Publisher:
        made.append(Publisher(broker_url, names, key))
        return made[-1]

    yield make
    for each in made:
        each.stop()


def read_queue(connection: Connection, queue: str, until: amqp.Message | None = None) -> list[str]:
    """Return the bodies up to the queue's first end marker; put `until` there first, if it is given."""
    bodies: list[str] = []
    ended = False

    def take(message: amqp.Message) -> None:
        nonlocal ended
        if control_of(message.headers or {}) == END:
            ended = True
        elif not ended:
            bodies.append(bytes(message.body).decode())

    with brief_channel(connection) as channel:
        if until is not None:
            publish_confirmed(channel, until, queue, timeout_seconds=10)
        channel.basic_consume(queue, callback=take, no_ack=True)
        while not ended:
            connection.drain_events(timeout=20)
    return bodies


def read_chain(connection: Connection, names: Names, layout: Layout) -> dict[str, list[str]]:
    """Return the bodies of each queue, in the order of the chain; the last segment gets markers for this."""
    found: dict[str, list[str]] = {}
    for segment in layout.segments:
        until = end_marker(segment) if segment is layout.segments[-1] else None
        for queue in (queue for queue in segment.queues(names) if queue not in segment.drained):
            found[queue] = read_queue(connection, queue, until)
    return found


def assert_kept(chain: dict[str, list[str]], *publishers: Publisher) -> None:
    """Each confirmed message stands in the chain once, behind those that were confirmed before it."""
    places = [(body, queue) for queue, bodies in chain.items() for body in bodies]
    assert [body for body, count in Counter(body for body, _ in places).items() if count > 1] == []
    for each in publishers:
        mine = [(int(body.split()[1]), queue) for body, queue in places if body.startswith(f"{each.key} ")]
        kept = [(number, queue) for number, queue in mine if number in set(each.confirmed)]
        assert [number for number, _ in kept] == each.confirmed, breaks(kept)


def breaks(kept: list[tuple[int, str]]) -> str:
    """Say where the numbers do not rise by one, and in which queues."""
    pairs = itertools.pairwise(kept)
    return "; ".join(f"{one} then {other}" for one, other in pairs if other[0] != one[0] + 1)


def segment_names(layout: Layout) -> list[str]:
    return [segment.name for segment in layout.segments]


def delete_exchange(connection: Connection, exchange: str) -> None:
    with brief_channel(connection) as channel:
        channel.exchange_delete(exchange)


def delete_queue(connection: Connection, queue: str) -> None:
    with brief_channel(connection) as channel:
        channel.queue_delete(queue)


# --- first start ------------------------------------------------------------------------------------------------------


def test_what_is_published_before_any_worker_waits_in_front_of_the_first_generation(
    connect, connection, group, names, publisher
):
    # Given messages published to a group that no worker ever consumed
    ensure_fixed(connect, group, owner="p")
    first = publisher()
    first.publish(20)
    # When the first worker starts, and more is published
    layout = ensure_group(connect, group, owner="w")
    first.publish(20)
    # Then the chain holds the first in limbo and the others in the shards
    chain = read_chain(connection, names, layout)
    limbo = chain[names.limbo(1)]
    assert (len(limbo), sum(map(len, chain.values()))) == (20, 40)
    assert_kept(chain, first)


def test_a_worker_may_start_before_any_publisher(connect, connection, group, names, publisher):
    layout = ensure_group(connect, group, owner="w")
    ensure_fixed(connect, group, owner="p")
    first = publisher()
    first.publish(5)

    assert (layout.generation, layout.shards, layout.limbo) == (1, 4, 2)
    assert_kept(read_chain(connection, names, layout), first)


def test_keys_go_to_one_shard_each_and_use_all_of_them(connect, connection, group, names, publisher):
    layout = ensure_group(connect, group, owner="w")
    each = [publisher(f"key{number}") for number in range(24)]
    for one in each:
        one.publish(2)

    live = layout.segments[-1]
    shards = [read_queue(connection, queue, end_marker(live)) for queue in live.queues(names)]
    assert all(shards)
    for one in each:
        assert len([True for bodies in shards if any(body.startswith(f"{one.key} ") for body in bodies)]) == 1


def test_nothing_is_written_when_all_is_well(connect, connection, group, names):
    layout = ensure_group(connect, group, owner="w")
    before = read_to_end(connection, names.manifest)

    assert ensure_group(connect, group, owner="w") == layout
    assert ensure_group(connect, group, owner="w", known=layout) == layout
    ensure_fixed(connect, group, owner="p")

    assert read_to_end(connection, names.manifest) == before


def test_the_number_of_shards_comes_from_the_manifest_once_there_is_one(connect, connection, group, names):
    ensure_group(connect, group, owner="w")
    delete_exchange(connection, names.ring(1))

    assert ensure_group(connect, ShardGroup(group.name, 9), owner="w").shards == 4


def test_workers_and_publishers_that_start_at_once_agree(connect, group, names, connection):
    # Given four workers and four publishers
    barrier, layouts, errors = threading.Barrier(8), [], []

    def run(act: Callable[[], Layout | None]) -> None:
        barrier.wait(10)
        try:
            layouts.append(act())
        except Exception as exc:
            errors.append(exc)

    acts = [lambda: ensure_group(connect, group, owner="w"), lambda: ensure_fixed(connect, group, owner="p")] * 4
    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    # When all start at once
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    # Then there is one generation, and all know it
    assert errors == []
    assert {layout for layout in layouts if layout is not None} == {load(connection, names)}
    assert segment_names(load(connection, names)) == ["limbo001", "g001"]


# --- the ring is lost -------------------------------------------------------------------------------------------------


def test_a_ring_that_is_lost_again_and_again_keeps_order_under_publishers(connect, connection, group, names, publisher):
    # Given three publishers that never stop
    layout = ensure_group(connect, group, owner="w")
    publishers = [publisher(key) for key in ("a", "b", "c")]
    for each in publishers:
        each.start()
    # When the ring is lost five times, and recovered each time
    for _ in range(5):
        for each in publishers:
            each.wait_for(20)
        delete_exchange(connection, names.ring(layout.generation))
        for each in publishers:
            each.wait_for(20)
        layout = ensure_group(connect, group, owner="w")
    for each in publishers:
        each.wait_for(20)
        each.stop()
    # Then every confirmed message is in the chain once, in order
    assert (layout.generation, layout.limbo, len(layout.segments)) == (6, 7, 12)
    assert_kept(read_chain(connection, names, layout), *publishers)


def test_a_restart_of_the_broker_keeps_order_whatever_becomes_of_the_ring(
    connect, broker_url, restart_broker, group, names, publisher
):
    # Given a group with messages of many keys
    ensure_group(connect, group, owner="w")
    publishers = [publisher(f"key{number}") for number in range(12)]
    for each in publishers:
        each.publish(3)
    # When the broker restarts three times, and messages come before and after a worker has looked
    for _ in range(3):
        restart_broker()
        for each in publishers:
            each.connect()
            each.publish(3)
        layout = ensure_group(connect, group, owner="w")
        for each in publishers:
            each.publish(3)
    # Then each of them is in the chain once, in order
    assert [len(each.confirmed) for each in publishers] == [21] * 12
    with Connection(broker_url) as connection:
        chain = read_chain(connection, names, layout)
    assert_kept(chain, *publishers)


@pytest.mark.parametrize("last_step", RECOVERY_STEPS)
@pytest.mark.parametrize(
    ("done", "lost_again"),
    [
        pytest.param(True, False, id="done"),
        pytest.param(False, False, id="only announced"),
        pytest.param(True, True, id="done, ring lost again"),
        pytest.param(False, True, id="only announced, ring lost again", marks=pytest.mark.slow),
    ],
)
def test_a_recovery_that_stops_at_any_step_is_carried_on_by_the_next(
    connect, connection, group, names, publisher, last_step, done, lost_again
):
    # Given a publisher that never stops, a ring that was lost, and a recovery that died at one of its steps
    ensure_group(connect, group, owner="w1")
    first = publisher()
    first.start()
    first.wait_for(5)
    delete_exchange(connection, names.ring(1))
    with GroupLock(connect, names, timeout_seconds=5) as lock, lock.operation() as mine:
        layout = begin_recovery(mine, group, load(mine, names), by="w1")
        if done or last_step > 1:
            layout = carry_on(mine, group, layout, by="w1", last_step=last_step if done else last_step - 1)
        if not done:
            write(mine, names, layout, StepBegun(2, last_step), by="w1")
    first.wait_for(5)
    if lost_again:
        delete_exchange(connection, names.ring(2))
        first.wait_for(5)
    # When another worker comes
    layout = ensure_group(connect, group, owner="w2")
    first.wait_for(5)
    first.stop()
    # Then the group is whole, and every message is in the chain once, in order
    assert find_fault(connection, names, layout) is None
    assert layout.unended == ()
    assert_kept(read_chain(connection, names, layout), first)


def test_a_recovery_that_died_before_the_end_markers_gets_them_from_the_next(connect, connection, group, names):
    ensure_fixed(connect, group, owner="p")
    with GroupLock(connect, names, timeout_seconds=5) as lock, lock.operation() as mine:
        layout = begin_recovery(mine, group, load(mine, names), by="w1")
        carry_on(mine, group, layout, by="w1")

    layout = ensure_group(connect, group, owner="w2")

    assert [segment.ended for segment in layout.segments] == [True, False]
    assert read_queue(connection, names.limbo(1)) == []


def test_a_shard_queue_that_someone_deleted_makes_a_new_generation_at_once(
    connect, connection, group, names, publisher
):
    # Given a group with messages, of which one shard queue is deleted
    ensure_group(connect, group, owner="w")
    first = publisher("a")
    first.publish(3)
    victim = next(index for index in range(4) if count_ready(connection, names.shard(1, index)) == 0)
    delete_queue(connection, names.shard(1, victim))
    # When a worker looks
    layout = ensure_group(connect, group, owner="w")
    first.publish(3)
    # Then the stream goes on in a new generation, and nobody waits for the queue that is gone
    assert segment_names(layout) == ["limbo001", "g001", "limbo002", "g002"]
    old = layout.segments[1]
    assert old.drained == {names.shard(1, victim)}
    rest = [read_queue(connection, queue) for queue in old.queues(names) if queue not in old.drained]
    new = [read_queue(connection, queue, end_marker(layout.segments[3])) for queue in layout.segments[3].queues(names)]
    assert [body for bodies in (*rest, *new) for body in bodies] == [f"a {number}" for number in range(6)]


def test_exchanges_that_someone_deleted_come_back_and_order_goes_on(connect, connection, group, names, publisher):
    # Given a group with messages, of which the exchanges are deleted
    ensure_group(connect, group, owner="w")
    first = publisher()
    first.publish(3)
    for exchange in (names.publish, names.next, names.unrouted):
        delete_exchange(connection, exchange)
    # When a publisher comes first, and then a worker
    ensure_fixed(connect, group, owner="p")
    first.publish(3)
    layout = ensure_group(connect, group, owner="w")
    first.publish(3)
    # Then the old ring, which is still there but bound to nothing, is followed by a new one
    assert segment_names(layout) == ["limbo001", "g001", "limbo002", "g002"]
    assert_kept(read_chain(connection, names, layout), first)


def test_a_limbo_that_someone_deleted_is_replaced(connect, connection, group, names, publisher):
    ensure_group(connect, group, owner="w")
    delete_queue(connection, names.limbo(2))

    layout = ensure_group(connect, group, owner="w")
    delete_exchange(connection, names.ring(layout.generation))
    first = publisher()
    first.publish(3)
    layout = ensure_group(connect, group, owner="w")

    assert_kept(read_chain(connection, names, layout), first)
    assert len(first.confirmed) == 3


# --- a manifest that forgot -------------------------------------------------------------------------------------------


def forget(connection: Connection, names: Names, *, keep: int) -> None:
    """Leave only the first `keep` events in the manifest, as a broker may that lost power."""
    events = [event for _, event in read_to_end(connection, names.manifest)][:keep]
    delete_queue(connection, names.manifest)
    with brief_channel(connection) as channel:
        topology.declare_logs(channel, names.group)
        for offset, event in enumerate(events):
            append(channel, names.manifest, {**event, "base": offset - 1})


@pytest.mark.parametrize("ring_lost", [False, True], ids=["ring kept", "ring lost"])
@pytest.mark.parametrize("keep", [0, 1, 10, 14, 16])
def test_generations_that_the_manifest_forgot_are_taken_into_the_chain(
    connect, connection, group, names, publisher, keep, ring_lost
):
    # Given two generations with messages, of which the manifest forgot the end, or all
    ensure_fixed(connect, group, owner="p")
    first = publisher()
    first.publish(3)
    ensure_group(connect, group, owner="w")
    first.publish(3)
    delete_exchange(connection, names.ring(1))
    first.publish(3)
    ensure_group(connect, group, owner="w")
    first.publish(3)
    forget(connection, names, keep=keep)
    first.start()
    first.wait_for(5)
    if ring_lost:
        delete_exchange(connection, names.ring(2))
        first.wait_for(5)
    # When a worker comes, while the publisher goes on
    layout = ensure_group(connect, group, owner="w")
    first.wait_for(5)
    first.stop()
    # Then nothing is lost or doubled, order is kept, and the group is as large as it was
    assert segment_names(layout)[:4] == ["limbo001", "g001", "limbo002", "g002"]
    assert layout.shards == 4
    assert find_fault(connection, names, layout) is None
    assert_kept(read_chain(connection, names, layout), first)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_group_made_with_another_queue_type_is_a_mismatch_that_names_both(connect, group):
    ensure_group(connect, group, owner="w")

    with pytest.raises(TopologyMismatch, match="quorum queues on the broker, but classic is configured"):
        ensure_group(connect, ShardGroup(group.name, 4, queue_type="classic"), owner="w")


def test_a_foreign_exchange_of_the_group_s_name_is_a_mismatch(connect, connection, group, names):
    with brief_channel(connection) as channel:
        channel.exchange_declare(names.publish, "topic", durable=True, auto_delete=False)

    with pytest.raises(TopologyMismatch, match=names.publish):
        ensure_group(connect, group, owner="w")


@pytest.mark.parametrize("queue", ["g001.000", "limbo001", "limbo002"])
def test_a_foreign_queue_of_the_group_s_names_is_a_mismatch(connect, connection, group, names, queue):
    with brief_channel(connection) as channel:
        channel.queue_declare(f"{names.publish}.{queue}", durable=True, auto_delete=False)

    with pytest.raises(TopologyMismatch, match=queue):
        ensure_group(connect, group, owner="w")


def test_classic_groups_start_and_recover_too(connect, connection, group_name, names, publisher):
    group = ShardGroup(group_name, 3, queue_type="classic")
    ensure_group(connect, group, owner="w")
    first = publisher()
    first.publish(3)
    delete_exchange(connection, names.ring(1))
    first.publish(3)
    layout = ensure_group(connect, group, owner="w")
    first.publish(3)

    assert_kept(read_chain(connection, names, layout), first)


def test_a_switch_of_a_newer_version_is_left_alone(connect, connection, group, names):
    layout = ensure_group(connect, group, owner="w")
    with GroupLock(connect, names, timeout_seconds=5) as lock, lock.operation() as mine:
        write(mine, names, layout, SwitchBegun("teleport", generation=2, shards=4), by="w9")

    with pytest.raises(TopologyError, match="teleport"):
        ensure_group(connect, group, owner="w")


def test_a_lock_that_is_never_given_up_is_an_error_in_time(connect, group, names):
    with GroupLock(connect, names, timeout_seconds=5), pytest.raises(LockHeld, match=names.admin):
        ensure_group(connect, group, owner="w", wait_seconds=0.3)


# --- the chain is consumed --------------------------------------------------------------------------------------------


def test_what_owners_report_as_drained_moves_every_worker_on(connect, connection, group, names):
    ensure_group(connect, group, owner="w")
    delete_exchange(connection, names.ring(1))
    layout = ensure_group(connect, group, owner="w")

    consumed: list[str] = []
    while layout.open_segments != layout.segments[-1:]:
        (current,) = layout.open_segments
        consumed.append(current.name)
        with brief_channel(connection) as channel:
            for queue in current.queues(names):
                append(channel, names.manifest, Drained(current.name, queue, by="w").as_dict())
        layout = load(connection, names, since=layout)

    assert consumed == ["limbo001", "g001", "limbo002"]
    assert segment_names(layout)[-1:] == ["g002"]


# --- another number of shards -----------------------------------------------------------------------------------------


def reshard(connect, group, names, *, shards):
    with GroupLock(connect, names, timeout_seconds=5) as lock, lock.operation() as mine:
        carry_on(mine, group, begin_reshard(mine, group, load(mine, names), shards=shards, by="op"), by="op")


@pytest.mark.parametrize("last_step", RESHARD_STEPS)
@pytest.mark.parametrize(
    ("done", "lost"),
    [
        (True, ""),
        (True, "old"),
        (True, "new"),
        (False, ""),
        (False, "both"),
        pytest.param(True, "both", marks=pytest.mark.slow),
        pytest.param(False, "old", marks=pytest.mark.slow),
    ],
)
def test_a_reshard_that_stops_at_any_step_is_carried_on_by_the_next(
    connect, connection, group, names, publisher, last_step, done, lost
):
    # Given a publisher that never stops, and a reshard that died at one of its steps
    ensure_group(connect, group, owner="w1")
    first = publisher()
    first.start()
    first.wait_for(5)
    with GroupLock(connect, names, timeout_seconds=5) as lock, lock.operation() as mine:
        layout = begin_reshard(mine, group, load(mine, names), shards=7, by="op")
        if done or last_step > 1:
            layout = carry_on(mine, group, layout, by="op", last_step=last_step if done else last_step - 1)
        if not done:
            write(mine, names, layout, StepBegun(2, last_step), by="op")
    first.wait_for(5)
    for ring in {"": [], "old": [1], "new": [2], "both": [1, 2]}[lost]:
        delete_exchange(connection, names.ring(ring))
    first.wait_for(5)
    # When a worker comes
    layout = ensure_group(connect, group, owner="w2")
    first.wait_for(5)
    first.stop()
    # Then the group is whole with its new number of shards, and every message is in the chain once, in order
    assert find_fault(connection, names, layout) is None
    assert layout.shards == 7
    assert_kept(read_chain(connection, names, layout), first)


def test_a_reshard_of_a_ring_that_is_gone_leaves_what_waits_in_limbo_its_place(
    connect, connection, group, names, publisher
):
    # Given a group that was resharded before, so that an older ring is still there, and has lost its live ring
    ensure_group(connect, group, owner="w")
    first = publisher()
    first.publish(3)
    reshard(connect, group, names, shards=7)
    first.publish(3)
    delete_exchange(connection, names.ring(2))
    first.publish(3)
    # When it is resharded before a worker looks
    reshard(connect, group, names, shards=5)
    first.publish(3)
    layout = ensure_group(connect, group, owner="w")
    first.publish(3)
    # Then every message is in the chain once, in order
    assert layout.shards == 5
    assert find_fault(connection, names, layout) is None
    assert_kept(read_chain(connection, names, layout), first)


@pytest.mark.parametrize("dies_again", [False, True])
def test_a_ring_lost_in_the_middle_of_a_reshard_puts_what_went_to_limbo_before_the_new_ring(
    connect, connection, group, names, publisher, dies_again
):
    # Given a reshard whose ring was lost before the new one stood behind it, and which then died
    ensure_group(connect, group, owner="w1")
    first = publisher()
    first.publish(20)
    with GroupLock(connect, names, timeout_seconds=5) as lock, lock.operation() as mine:
        layout = begin_reshard(mine, group, load(mine, names), shards=7, by="op")
        layout = carry_on(mine, group, layout, by="op", last_step=1)
        delete_exchange(connection, names.ring(1))
        first.publish(20)
        layout = write(mine, names, layout, StepBegun(2, 2), by="op")
        with brief_channel(mine) as channel:
            STEPS[RESHARD][1](Steps(channel, group, layout, layout.switch))
    first.publish(20)
    if dies_again:
        with GroupLock(connect, names, timeout_seconds=5) as lock, lock.operation() as mine:
            carry_on(mine, group, load(mine, names), by="w1", last_step=FLIPS[RECOVER])
        first.publish(20)
    # When a worker comes
    layout = ensure_group(connect, group, owner="w2")
    first.publish(20)
    # Then what waits in limbo is consumed before what the new ring took
    assert segment_names(layout) == ["limbo001", "g001", "limbo002", "g002"]
    assert (layout.shards, layout.limbo) == (7, 3)
    assert find_fault(connection, names, layout) is None
    assert_kept(read_chain(connection, names, layout), first)
    # And limbo is the way out, once more
    delete_exchange(connection, names.ring(2))
    first.publish(3)
    layout = ensure_group(connect, group, owner="w2")
    assert segment_names(layout)[-2:] == ["limbo003", "g003"]


def test_a_group_is_resharded_up_and_down_under_publishers(connect, connection, group, names, publisher):
    # Given three publishers that never stop
    ensure_group(connect, group, owner="w")
    publishers = [publisher(key) for key in ("a", "b", "c")]
    for each in publishers:
        each.start()
    # When the group is given more and fewer shards
    for shards in (8, 3, 1, 5):
        for each in publishers:
            each.wait_for(20)
        reshard(connect, group, names, shards=shards)
        layout = ensure_group(connect, group, owner="w")
    for each in publishers:
        each.wait_for(20)
        each.stop()
    # Then nothing went to limbo, and every confirmed message is in the chain once, in order
    assert segment_names(layout) == ["limbo001", "g001", "g002", "g003", "g004", "g005"]
    assert [segment.ended for segment in layout.segments] == [True] * 5 + [False]
    assert_kept(read_chain(connection, names, layout), *publishers)


@pytest.mark.parametrize("shards", [4, 0, 1000])
def test_a_number_of_shards_that_cannot_be_is_refused(connect, connection, group, names, shards):
    layout = ensure_group(connect, group, owner="w")
    with pytest.raises(ShardingError, match="shards"):
        begin_reshard(connection, group, layout, shards=shards, by="op")
    assert load(connection, names) == layout
