"""A shard whose channel does not answer before a fact is written: it is consumed anew, and nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from kombu import Connection

from celery_sharding import ShardGroup
from celery_sharding.layout.ensure import ensure_group
from celery_sharding.rabbitmq.connect import open_connection
from celery_sharding.testing import Direction, FaultProxy
from celery_sharding.topology import Names
from celery_sharding.worker.executor import Executor
from celery_sharding.worker.log_writer import LogWriter
from celery_sharding.worker.place import Place
from celery_sharding.worker.redelivery.attempts import Attempts
from celery_sharding.worker.run.state_writer import StateWriter
from celery_sharding.worker.services import WorkerServices
from celery_sharding.worker.shard.shard import Shard
from support.stand_ins import Calls, Clock, Mailbox, Pool

pytestmark = pytest.mark.timeout(60)


@dataclass(slots=True)
class Host:
    """The group of the shard, of which it needs little here."""

    attempts: Attempts
    lost: list[Shard]

    def note_lost(self, shard: Shard) -> None:
        self.lost.append(shard)


def test_a_shard_that_is_not_answered_before_a_fact_is_written_is_consumed_anew(
    group_name: str, broker_url: str
) -> None:
    # Given a shard on a connection whose waits have a limit
    group, names = ShardGroup(group_name, 1), Names(group_name)
    ensure_group(lambda: Connection(broker_url), group, owner="test")
    log = LogWriter(SimpleNamespace(connect=lambda: Connection(broker_url)), Mailbox())
    executor = Executor(Pool(), Clock(), log, StateWriter(None, Mailbox()), node="test")
    with FaultProxy(broker_url) as proxy:
        connection = open_connection(Connection(proxy.url), answer_seconds=1.0)
        host = Host(Attempts(names.attempts, log), [])
        services = WorkerServices(
            node="test", log=log, calls=Calls(), executor=executor, receiver=host, hold_seconds=900.0
        )
        shard = Shard(Place(group, "g001", 0, f"{names.ring(1)}.000"), host=host, services=services)
        shard.open(connection, 10)
        # When the broker answers, then what was acknowledged is safe, and the shard stays
        assert shard.confirm_acknowledged()
        assert host.lost == []
        # When its answer does not come in time, then the fact must not be written, and the shard is given up
        proxy.stall(Direction.TO_CLIENT)
        assert not shard.confirm_acknowledged()
        assert host.lost == [shard]
        proxy.heal()
        connection.collect()
    log.stop()
