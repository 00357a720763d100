"""Names, arguments, and the broker's refusals in words."""

from __future__ import annotations

import pytest
from amqp import exceptions as amqp_errors

from celery_sharding.config import ShardGroup
from celery_sharding.errors import OutOfReach, PluginMissing, TopologyError, TopologyMismatch
from celery_sharding.rabbitmq.refusals import explain, explained
from celery_sharding.topology import Names, queue_arguments


def test_the_names_of_a_group():
    names = Names("orders")

    assert [names.publish, names.next, names.unrouted, names.admin, names.dead, names.dead_admin] == [
        "shards.orders",
        "shards.orders.next",
        "shards.orders.unrouted",
        "shards.orders.admin",
        "shards.orders.dead",
        "shards.orders.dead.admin",
    ]
    assert [names.manifest, names.journal, names.attempts] == [
        "shards.orders.manifest",
        "shards.orders.journal",
        "shards.orders.attempts",
    ]
    assert [names.ring(1), names.shard(1, 3), names.limbo(12)] == [
        "shards.orders.g001",
        "shards.orders.g001.003",
        "shards.orders.limbo012",
    ]


def test_quorum_queues_never_drop_and_never_run_beside_each_other():
    arguments = queue_arguments(ShardGroup("orders", 8))

    assert arguments["x-single-active-consumer"] is True
    assert arguments["x-delivery-limit"] >= 1_000_000
    assert arguments["x-overflow"] == "reject-publish"
    assert arguments["x-dead-letter-routing-key"] == "shards.orders.dead"
    assert arguments["x-dead-letter-strategy"] == "at-least-once"


def test_classic_queues_get_no_argument_they_do_not_know():
    arguments = queue_arguments(ShardGroup("orders", 8, queue_type="classic"))

    assert set(arguments) == {
        "x-queue-type",
        "x-single-active-consumer",
        "x-dead-letter-exchange",
        "x-dead-letter-routing-key",
    }


@pytest.mark.parametrize("code", [503, 406])
def test_an_unknown_exchange_type_names_the_plugin_on_every_version(code):
    # 3.x closes the connection with 503, 4.x the channel with 406
    refusal = amqp_errors.AMQPError(f"X - unknown exchange type 'x-consistent-hash' {code}", reply_code=code)
    error = explain(refusal, "orders", "shards.orders.g001")

    assert isinstance(error, PluginMissing)
    assert "rabbitmq-plugins enable rabbitmq_consistent_hash_exchange" in str(error)


def test_other_arguments_name_the_entity_and_the_way_out():
    with pytest.raises(TopologyMismatch) as caught, explained("orders", "shards.orders.next"):
        raise amqp_errors.PreconditionFailed("inequivalent arg")

    assert "'shards.orders.next'" in str(caught.value)
    assert "begin with shards.orders" in str(caught.value)


def test_a_refused_permission_names_the_pattern_to_grant():
    with pytest.raises(TopologyError) as caught, explained("orders", "shards.orders"):
        raise amqp_errors.AccessRefused("access refused")

    assert r"^shards\.orders(\.|$)" in str(caught.value)


def test_another_failure_passes_through():
    with pytest.raises(amqp_errors.ConnectionForced), explained("orders", "shards.orders"):
        raise amqp_errors.ConnectionForced("the node goes down")


@pytest.mark.parametrize(
    "refusal",
    [
        amqp_errors.NotFound("home node 'a@b' of durable queue 'shards.orders.manifest' is down or inaccessible"),
        amqp_errors.PreconditionFailed("queue 'shards.orders.manifest' does not have a replica on the local node"),
    ],
)
def test_a_queue_whose_node_is_not_up_yet_is_out_of_reach_and_neither_gone_nor_another(refusal: Exception):
    assert isinstance(explain(refusal, "orders", "shards.orders.manifest"), OutOfReach)
