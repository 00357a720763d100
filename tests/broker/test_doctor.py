"""`shards doctor` on real brokers: content with a healthy group, and aware of what somebody did to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from kombu import Connection

from celery_sharding import ShardGroup, Sharding, deduplicate
from celery_sharding.layout.ensure import ensure_group
from celery_sharding.operations.export import plan_export, to_definitions
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.rabbitmq.streams import append
from celery_sharding.testing.processes import wait_until
from celery_sharding.topology import Names
from support.commands import call_shards
from support.shops import Shop
from support.virtual_hosts import PASSWORD, VirtualHost

pytestmark = pytest.mark.timeout(150)


def make_app(url: str, *groups: ShardGroup, **settings: Any) -> Celery:
    app = Celery("doctor", broker=url, set_as_current=False)
    app.conf.update(settings)
    Sharding(app, groups=groups)
    return app


def examine(app: Celery) -> tuple[int, dict[str, dict[str, list[dict[str, str]]]]]:
    """Return the exit code, and check → severity → findings of the only group."""
    done = call_shards(app, "doctor", "--json")
    found: dict[str, dict[str, list[dict[str, str]]]] = {}
    (group,) = json.loads(done.stdout)["groups"]
    for each in group["findings"]:
        assert each["fix"] or each["severity"] in ("ok", "note"), each
        found.setdefault(each["check"], {}).setdefault(each["severity"], []).append(each)
    return done.exit_code, found


@pytest.fixture
def shop(virtual_host: VirtualHost, tmp_path) -> Iterator[Shop]:
    with Shop("orders", virtual_host.url(), tmp_path) as shop:
        yield shop


def test_the_doctor_is_content_with_a_healthy_group_and_finds_what_was_done_to_it(shop, virtual_host, management_url):
    # Given a group with an owner and a standby for each shard
    app = make_app(virtual_host.url(), ShardGroup("orders", 4), sharding_management_url=management_url)
    workers = [shop.worker("-c", "2", wait_seconds=0) for _ in range(2)]
    for worker in workers:
        worker.wait_for(" ready.")
    seen: list[Any] = []

    def is_content() -> bool:
        seen.append(examine(app))
        return seen[-1][0] == 0 and all("warning" not in severities for severities in seen[-1][1].values())

    assert wait_until(is_content, timeout_seconds=40), seen[-1]
    # Then all that is promised was looked at
    found = seen[-1][1]
    fine = {check for check, severities in found.items() if "ok" in severities}
    assert fine - {"version"} == {
        "plugin", "configuration", "layout", "arguments", "workers", "backlog", "clocks", "nodes", "bindings",
        "policies",
    }  # fmt: skip
    # When the workers are gone, somebody taps an exchange, cuts another, sets a policy, and letters are dead
    shop.kill_workers()
    names = Names("orders")
    virtual_host.set_policy("all-expire", ".*", {"message-ttl": 60_000})
    with Connection(shop.broker_url) as connection, brief_channel(connection) as channel:
        channel.queue_declare("tap")
        channel.queue_bind("tap", names.publish, "")
        channel.queue_unbind(names.shard(1, 2), names.ring(1), "1")
        append(channel, names.dead, {"event": "x"})
    # Then each is an error, or a warning, that names the place and the fix
    wanted = [
        ("workers", "error", "no worker"),
        ("bindings", "error", "to tap"),
        ("bindings", "error", names.shard(1, 2)),
        ("policies", "error", "'all-expire' sets message-ttl"),
        ("dead letters", "warning", "1 wait"),
    ]

    def finds_all() -> bool:  # the broker takes a moment to see that workers are gone, and to count
        seen.append(examine(app))
        return all(any(text in f["text"] for f in seen[-1][1].get(c, {}).get(s, ())) for c, s, text in wanted)

    assert wait_until(finds_all, timeout_seconds=40), seen[-1]
    assert seen[-1][0] == 1
    # And the policy that `export` writes keeps the other away from the group
    (guard,) = json.loads(to_definitions(plan_export(["orders"], virtual_host=virtual_host.name, users=())))["policies"]
    facts = {key: guard[key] for key in ("pattern", "definition", "priority", "apply-to")}
    virtual_host.call("PUT", f"/api/policies/{virtual_host.name}/{guard['name']}", facts)
    assert "error" not in examine(app)[1]["policies"]


def test_a_configuration_that_does_not_fit_what_stands_is_found_by_plain_amqp(virtual_host):
    # Given a group of classic queues, one of which somebody declared otherwise
    url, names = virtual_host.url(), Names("orders")
    ensure_group(lambda: Connection(url), ShardGroup("orders", 3, queue_type="classic"), owner="test")
    with Connection(url) as connection, brief_channel(connection) as channel:
        channel.queue_delete(names.shard(1, 1))
        channel.queue_declare(names.shard(1, 1), durable=True, auto_delete=False)
    # When it is looked at as it is configured, and as it is not
    _, as_made = examine(make_app(url, ShardGroup("orders", 3, queue_type="classic")))
    code, other = examine(make_app(url, ShardGroup("orders", 5)))
    # Then
    assert names.shard(1, 1) in as_made["arguments"]["error"][0]["text"]
    assert "ok" in as_made["configuration"]
    assert "set shards=3" in other["configuration"]["warning"][0]["fix"]
    assert "set queue_type='classic'" in other["configuration"]["error"][0]["fix"]
    assert "sharding_management_url" in other["management"]["note"][0]["fix"]
    assert code == 1


@pytest.mark.parametrize("wrong", ["password", "port"])
def test_a_management_api_that_does_not_answer_is_a_warning_and_the_rest_is_still_found(
    virtual_host, management_url, wrong
):
    host = management_url.partition("//")[2]
    url = f"http://guest:{PASSWORD}@{host}" if wrong == "password" else "http://127.0.0.1:1"
    app = make_app(virtual_host.url(), ShardGroup("orders", 2), sharding_management_url=url)
    call_shards(app, "declare")

    _, found = examine(app)

    assert url.rpartition("@")[2].rpartition("/")[2] in found["management"]["warning"][0]["text"]
    assert "ok" in found["layout"]
    assert PASSWORD not in json.dumps(found)


def test_a_group_that_was_never_declared_is_an_error_and_the_doctor_declares_nothing(virtual_host):
    before = [virtual_host.names(kind) for kind in ("exchanges", "queues")]

    code, found = examine(make_app(virtual_host.url(), ShardGroup("orders", 2)))

    assert code == 1
    assert "not declared" in found["layout"]["error"][0]["text"]
    assert [virtual_host.names(kind) for kind in ("exchanges", "queues")] == before


def test_a_dry_run_of_declare_says_what_would_be_done_and_does_nothing(virtual_host):
    app, names = make_app(virtual_host.url(), ShardGroup("orders", 2)), Names("orders")

    assert call_shards(app, "declare", "--dry-run").stdout == (
        "orders: its exchanges do not exist; generation 1 would be declared, 2 shards\n"
    )
    assert virtual_host.names("queues") == []
    call_shards(app, "declare")
    assert call_shards(app, "declare", "--dry-run").stdout == (
        "orders: in place, generation 1, 2 shards; nothing to do\n"
    )
    with Connection(virtual_host.url()) as connection, brief_channel(connection) as channel:
        channel.exchange_delete(names.ring(1))
    assert "the ring g001 is gone; it would be put right" in call_shards(app, "declare", "--dry-run").stdout
    assert names.ring(2) not in virtual_host.names("exchanges")


def test_the_redis_of_the_claims_is_looked_at(virtual_host, redis_url):
    # Given a task that is deduplicated, on a Redis that keeps nothing on disk
    def pay(payment_id):
        pass

    app = make_app(virtual_host.url(), ShardGroup("orders", 2), result_backend=redis_url)
    app.task(name="pay", shared=False)(deduplicate(key="payment_id")(pay))
    # When
    found = json.loads(call_shards(app, "doctor", "--json").stdout)["app"]
    # Then
    texts = {(each["check"], each["severity"]): each["text"] for each in found}
    assert "Redis keeps the claims of 1 tasks" in texts["claims", "ok"]
    assert "nothing to disk" in texts["Redis", "warning"]
