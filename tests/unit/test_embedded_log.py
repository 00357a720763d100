"""The log of a worker on an embedded broker: it keeps letters, no events, and says so."""

from __future__ import annotations

import uuid

import pytest
from celery import Celery

from celery_sharding import ShardGroup, Sharding
from celery_sharding.errors import UnsupportedBroker
from celery_sharding.topology import Names
from support.confirming import Told


@pytest.fixture
def sharding() -> Sharding:
    group = f"t{uuid.uuid4().hex[:12]}"
    app = Celery(group, broker="memory://", set_as_current=False)
    return Sharding(app, groups=[ShardGroup(group, shards=2)])


def test_events_are_dropped_and_whoever_waits_for_them_goes_on(sharding):
    # Given a log
    told = Told()
    log = sharding.backing().open_log(told, inline=None)
    # Then it says that events cannot be read again
    assert not log.keeps_events
    # When an event is appended, then its writer goes on at once
    log.append("stream", {"event": "test"}, lambda: told.stored.append("test"))
    assert told.stored == ["test"]
    # And who follows the stream reads nothing
    log.tail(None, "stream", "first", told).close()
    log.stop()


def test_letters_are_stored_and_optional_messages_are_not(sharding):
    # Given a group and a log
    (group,) = sharding.settings.groups.values()
    sharding.backing().ensure(group, owner="test")
    told = Told()
    log = sharding.backing().open_log(told, inline=None)
    dead = Names(group.name).dead
    # When something optional and a letter are written
    log.put(dead, b"optional", optional=True)
    log.write([told.write(dead, "letter")])
    log.stop()
    # Then the letter is there, alone
    assert told.stored == [dead]
    with sharding.connect() as connection:
        assert connection.default_channel.basic_get(dead, no_ack=True).body == b"letter"
        assert connection.default_channel.basic_get(dead, no_ack=True) is None


def test_what_needs_the_logs_is_refused_by_name(sharding):
    with pytest.raises(UnsupportedBroker, match="`shards pause` needs RabbitMQ"):
        sharding.backing().require_logs("`shards pause`")
