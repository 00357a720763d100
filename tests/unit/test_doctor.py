"""What the doctor makes of policies, of a Redis, and of an app's settings; no broker."""

from __future__ import annotations

import re
from typing import Any

import pytest
from celery import Celery

from celery_sharding import ShardGroup, Sharding, deduplicate
from celery_sharding.cli.doctor_app import examine_app, examine_redis
from celery_sharding.monitoring.doctor.policies import check_policies, read_policies
from celery_sharding.operations.export import GUARD_PRIORITY, plan_export, to_operator
from celery_sharding.operations.permissions import celery_names, permissions_for
from celery_sharding.topology import Names, queue_arguments
from support.commands import call_shards

NAMES = Names("orders")


def queue(name: str, kind: str = "quorum") -> dict[str, Any]:
    arguments = queue_arguments(ShardGroup("orders", 2, queue_type=kind)) if name.count(".") == 3 else {}
    return {"name": name, "type": kind, "arguments": arguments}


SHARD, CLASSIC = queue(NAMES.shard(1, 0)), queue(NAMES.shard(1, 0), "classic")
DEAD, MANIFEST, JOURNAL = queue(NAMES.dead), queue(NAMES.manifest, "stream"), queue(NAMES.journal, "stream")


def policy(definition: dict[str, Any], pattern: str = ".*", *, name: str = "all", priority: int = 0, to: str = "all"):
    return {"name": name, "pattern": pattern, "definition": definition, "priority": priority, "apply-to": to}


def judge(queues, policies=(), operator_policies=(), **options):
    found = [*read_policies(list(policies), operator=False), *read_policies(list(operator_policies), operator=True)]
    group = ShardGroup("orders", 2, **options)
    return list(check_policies(group, queues, found, consumer_timeout_seconds=1_800))


@pytest.mark.parametrize(
    ("where", "definition", "severity"),
    [
        (SHARD, {"message-ttl": 1}, "error"),
        (SHARD, {"expires": 1}, "error"),
        (SHARD, {"max-length": 10}, "warning"),  # it rejects
        (CLASSIC, {"max-length": 10}, "error"),  # it drops the oldest
        (CLASSIC, {"max-length": 10, "overflow": "reject-publish"}, "warning"),
        (DEAD, {"max-length-bytes": 10}, "error"),
        (SHARD, {"delivery-limit": 5}, "error"),
        (SHARD, {"delivery-limit": 100}, "warning"),
        (SHARD, {"delivery-limit": 1_000_000}, "ok"),
        (SHARD, {"consumer-timeout": 60_000}, "error"),
        (SHARD, {"federation-upstream-set": "all"}, "error"),
        (MANIFEST, {"max-age": "1D"}, "error"),
        (JOURNAL, {"max-age": "1h"}, "warning"),
        (MANIFEST, {"message-ttl": 1}, "ok"),  # does nothing to a stream
        (SHARD, {"ha-mode": "all"}, "ok"),
    ],
)
def test_a_policy_is_judged_by_what_it_does_to_each_kind_of_queue(where, definition, severity):
    to = {"quorum": "quorum_queues", "classic": "classic_queues", "stream": "streams"}[where["type"]]
    for policies in ([policy(definition, to="queues")], [policy(definition, to=to)]):
        assert [each.severity for each in judge([where], policies)] == [severity]
        assert [each.severity for each in judge([where], operator_policies=policies)] == [severity]


def test_only_the_policy_with_the_highest_priority_counts_and_the_operators_beside_it():
    (guard,) = plan_export(["orders"], virtual_host="/", users=()).guards
    guarding = policy(guard.definition, guard.pattern, name="guard", priority=GUARD_PRIORITY, to="queues")
    expiring = policy({"message-ttl": 1}, priority=GUARD_PRIORITY - 1)

    assert [each.severity for each in judge([SHARD], [expiring, guarding])] == ["ok"]
    assert [each.severity for each in judge([SHARD], [guarding], [expiring])] == ["error"]
    assert [each.severity for each in judge([SHARD], [expiring | {"priority": GUARD_PRIORITY}, guarding])] == ["error"]
    assert [each.severity for each in judge([SHARD], [policy({"message-ttl": 1}, r"^other\.")])] == ["ok"]


def test_queues_with_the_same_fault_are_one_finding():
    (found,) = judge([SHARD, queue(NAMES.shard(1, 1)), MANIFEST], [policy({"expires": 1})])

    assert NAMES.shard(1, 0) in found.text
    assert NAMES.shard(1, 1) in found.text
    assert "manifest" not in found.text


def test_an_alternate_exchange_by_policy_matters_only_where_none_is_an_argument():
    (found,) = judge([], [policy({"alternate-exchange": "bin"}, to="exchanges")])

    assert (found.severity, found.text.partition(":")[0]) == ("error", NAMES.unrouted)


@pytest.mark.parametrize(
    ("facts", "severities"),
    [
        ({"maxmemory": "0", "maxmemory-policy": "allkeys-lru", "aof_enabled": 1}, ["ok"]),
        ({"maxmemory": "100", "maxmemory-policy": "noeviction", "aof_enabled": 1}, ["ok"]),
        ({"maxmemory": "100", "maxmemory-policy": "volatile-lru", "aof_enabled": 1}, ["error"]),
        ({"maxmemory": "0", "aof_enabled": 0, "save": "3600 1"}, ["warning"]),
        ({"maxmemory": "0", "aof_enabled": 0, "save": ""}, ["warning"]),
        ({"aof_enabled": 1, "connected_slaves": 1, "min-replicas-to-write": "0"}, ["note", "ok"]),
        ({"aof_enabled": 1, "connected_slaves": 1, "min-replicas-to-write": "1"}, ["ok"]),
    ],
)
def test_a_redis_is_judged_by_what_it_forgets(facts, severities):
    assert [each.severity for each in examine_redis(facts)] == severities


def findings(**settings: Any) -> dict[tuple[str, str], str]:
    broker = settings.pop("broker", "amqp://")
    app = Celery("doctor", broker=broker, set_as_current=False, **settings.pop("options", {}))
    app.conf.update(settings)
    Sharding(app, groups=[ShardGroup("orders", 2)])

    @app.task(name="pay", shared=False, shard_group="orders", shard_key="key", time_limit=settings.get("limit"))
    @deduplicate(key="key")
    def pay(key):
        pass

    return {(each.check, each.severity): f"{each.text} {each.fix}" for each in examine_app(app.sharding)}


def test_a_backend_that_keeps_no_claims_is_an_error_that_lists_what_serves():
    for backend in ("rpc://", "cache+memory://", None):
        assert "PostgreSQL" in findings(result_backend=backend)["claims", "error"]
    assert ("claims", "error") not in findings(result_backend="cache+memory://", worker_pool="threads")


def test_settings_that_break_a_promise_are_named(tmp_path):
    backend = f"file://{tmp_path}"
    fine = findings(result_backend=backend)
    assert {severity for _, severity in fine} == {"ok", "note"}
    assert ("settings", "note") not in fine

    assert "task_always_eager" in findings(result_backend=backend, task_always_eager=True)["settings", "error"]
    assert "busy host" in findings(result_backend=backend, broker_heartbeat=2)["heartbeat", "warning"]
    nodes = {"broker": "amqp://a;amqp://b", "result_backend": backend}
    assert "control_queue_exclusive=False" in findings(**nodes)["settings", "note"]
    assert ("settings", "note") not in findings(**nodes, control_queue_exclusive=False, control_queue_durable=True)
    assert "pay may run for 1801 s" in findings(result_backend=backend, limit=1_801)["consumer time-out", "warning"]


def test_permissions_fit_the_names_they_are_for_and_no_others():
    celery = celery_names(
        queues=["celery", "a.b"],
        control_exchange="celery",
        event_exchange="celeryev",
        event_queue_prefix="celeryev",
        delays=False,
    )
    worker = permissions_for("worker", ["orders", "my-group"], celery_names=celery)
    for expression in (worker.configure, worker.write, worker.read):
        for name in ("shards.orders", "shards.my-group.g001.000", "celery", "a.b", "w@h.celery.pidbox", "celeryev.1"):
            assert re.search(expression, name), (expression, name)
        for name in ("shards.orders2", "shards.other", "celery2", "axb", "my.celery.pidbox.x", "x.shards.orders"):
            assert not re.search(expression, name), (expression, name)
    assert re.search(worker.write, "amq.default")
    assert not re.search(worker.read, "amq.default")
    operator = permissions_for("operator", ["orders"])
    assert not re.search(operator.configure, "shards.orders2")
    assert not re.search(operator.write, "shards.orders.g001.000")
    assert not re.search(operator.read, "shards.orders.g001.000")


def test_the_export_for_the_operator_has_names_that_kubernetes_takes_and_no_queue():
    users = [("Shop_Worker", permissions_for("worker", ["a_b"]))]
    text = to_operator(plan_export(["a_b"], virtual_host="/", users=users), cluster="rabbit")

    documents = text.split("---\n")[1:]
    names = [re.search(r'metadata:\n  name: "(.*)"', document)[1] for document in documents]
    assert [re.search('kind: "(.*)"', document)[1] for document in documents] == (
        ["Exchange"] * 3 + ["Policy", "User", "Permission"]
    )
    assert all(re.fullmatch("[a-z0-9]([a-z0-9-]*[a-z0-9])?", name) for name in names), names
    assert all('rabbitmqClusterReference:\n    name: "rabbit"' in document for document in documents)


@pytest.mark.parametrize(
    ("user", "text"),
    [("worker", "ROLE=NAME"), ("worker=", "ROLE=NAME"), ("workers=shop", "did you mean 'worker'")],
)
def test_an_export_for_an_unknown_role_is_refused_in_one_line(user, text):
    app = Celery("export", broker="amqp://", set_as_current=False)
    Sharding(app, groups=[ShardGroup("orders", 2)])

    done = call_shards(app, "export", "--format", "definitions", "--user", user)

    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert text in line
