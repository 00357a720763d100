"""A shard whose channel does not answer before a fact is written: it is consumed anew, and nothing is written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from kombu import Connection

from celery_sharding import ShardGroup
from celery_sharding.layout.ensure import ensure_group
from celery_sharding.rabbitmq.connect import open_connection
from celery_sharding.testing import Direction, FaultProxy
from celery_sharding.topology import Names
from celery_sharding.worker.executor import Runs
from celery_sharding.worker.log_writer import LogWriter
from celery_sharding.worker.redelivery.attempts import Attempts
from celery_sharding.worker.run.state_writer import StateWriter
from celery_sharding.worker.shard.shard import Shard

pytestmark = pytest.mark.timeout(60)


def run_now(call) -> None:
    call()


def test_a_shard_that_is_not_answered_before_a_fact_is_written_is_consumed_anew(
    group_name: str, broker_url: str
) -> None:
    # Given a shard on a connection whose waits have a limit
    group, names = ShardGroup(group_name, 1), Names(group_name)
    ensure_group(lambda: Connection(broker_url), group, owner="test")
    log = LogWriter(SimpleNamespace(connect=lambda: Connection(broker_url)), SimpleNamespace(post=run_now))
    runs = Runs(
        submit=lambda request: None,
        call_after=lambda seconds, call: None,
        call_soon=None,
        bucket_for=lambda name: None,
        is_alive=lambda: True,
        slots=lambda: 1,
        log=log,
        node="test",
        states=StateWriter(lambda: None, post=run_now),
    )
    given_up: list[Shard] = []
    with FaultProxy(broker_url) as proxy:
        connection = open_connection(Connection(proxy.url), answer_seconds=1.0)
        shard = Shard(
            group,
            "g001",
            0,
            f"{names.ring(1)}.000",
            runs=runs,
            log=log,
            attempts=Attempts(names.attempts, log),
            receive=lambda delivery: None,
            on_cancel=given_up.append,
            on_protocol=lambda protocol: None,
            call_soon=run_now,
            node="test",
        )
        shard.open(connection, 10)
        # When the broker answers, then what was acknowledged is safe, and the shard stays
        assert shard.confirm_acknowledged()
        assert given_up == []
        # When its answer does not come in time, then the fact must not be written, and the shard is given up
        proxy.stall(Direction.TO_CLIENT)
        assert not shard.confirm_acknowledged()
        assert given_up == [shard]
        proxy.heal()
        connection.collect()
    log.stop()
