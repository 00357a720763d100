"""Checks by the broker's management API: bindings, policies, alarms, nodes and replicas.

Plain AMQP shows none of it. The requests are cheap: a page of queues, four exchanges, the nodes. Other users of the
broker may do anything to the group's queues and exchanges, so nothing is taken for granted here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from celery_sharding import topology
from celery_sharding.monitoring.doctor.finding import Finding, Patient
from celery_sharding.monitoring.doctor.policies import check_policies, read_policies
from celery_sharding.monitoring.health import name_some
from celery_sharding.monitoring.management import Management
from celery_sharding.rabbitmq.pipelining import Look, all_exist
from celery_sharding.topology import RING_WEIGHT, Names

_TAP = (
    "unbind it: what reaches it counts as routed, so messages that no shard takes are lost silently. To watch a group, "
    "read the journal"
)


def check_broker(patient: Patient, api: Management, *, consumer_timeout_seconds: float) -> Iterator[Finding]:
    """Yield what the management API tells of a group.

    Args:
        consumer_timeout_seconds: What the app takes the broker's own for.

    Raises:
        ManagementUnavailable: It could not be asked.
    """
    vhost = api.virtual_host
    nodes = [node for node in api.get("/api/nodes") if isinstance(node, Mapping)]
    queues = api.list_queues(patient.names)
    yield from _check_nodes(nodes)
    yield from _check_bindings(patient, api, vhost)
    policies = [*read_policies(api.get(f"/api/policies/{vhost}"), operator=False)]
    policies += read_policies(api.get(f"/api/operator-policies/{vhost}"), operator=True)
    yield from check_policies(patient.group, queues, policies, consumer_timeout_seconds=consumer_timeout_seconds)
    yield from _check_replicas(patient, queues, nodes)


def unexamined() -> Finding:
    """Return the finding for a broker without a management API to ask."""
    return Finding(
        "note",
        "management",
        "not checked: foreign bindings, the ring's bindings, policies, alarms, replicas; plain AMQP does not tell them",
        "set sharding_management_url to the broker's management API, as in 'http://host:15672'",
    )


def _check_nodes(nodes: list[Mapping[str, Any]]) -> Iterator[Finding]:
    for node in nodes:
        name = node.get("name")
        if node.get("running") is False:
            yield Finding("error", "nodes", f"{name} is down", "start it")
        for alarm, what, fix in (
            ("mem_alarm", "memory", "consume faster, or give it more memory; see vm_memory_high_watermark"),
            ("disk_free_alarm", "disk", "free some disk space; see disk_free_limit"),
        ):
            if node.get(alarm):
                text = f"{name} has a {what} alarm: the broker blocks publishers"
                yield Finding("error", "nodes", text, fix)
    if nodes and all(n.get("running") is not False and not _has_alarm(n) for n in nodes):
        yield Finding("ok", "nodes", f"{len(nodes)} running, no alarm")


def _has_alarm(node: Mapping[str, Any]) -> bool:
    return bool(node.get("mem_alarm") or node.get("disk_free_alarm"))


def _check_bindings(patient: Patient, api: Management, vhost: str) -> Iterator[Finding]:
    names, layout = patient.names, patient.layout
    ring = names.ring(layout.generation)
    wanted = {names.publish: [(ring, "")], names.next: [], names.unrouted: [(names.limbo(layout.limbo), "")]}
    if layout.generation and topology.ring_exists(patient.connection, names, layout.generation):
        wanted[ring] = [(names.shard(layout.generation, index), RING_WEIGHT) for index in range(layout.shards)]
    elif not layout.generation:
        wanted[names.publish] = []
    foreign = missing = False
    for exchange, expected in wanted.items():
        if exchange != ring and not all_exist(patient.connection, Look(exchange, "fanout")):
            continue  # a finding by plain AMQP
        found = [
            (str(each.get("destination")), str(each.get("routing_key")))
            for each in api.get(f"/api/exchanges/{vhost}/{quote(exchange, safe='')}/bindings/source")
        ]
        for destination, key in found:
            # Bindings of an open switch are the switch's business.
            ours = destination.startswith(f"{names.publish}.") and layout.switch is not None and exchange != ring
            if (destination, key) not in expected and not ours:
                foreign = True
                yield Finding("error", "bindings", f"{exchange} has a foreign binding, to {destination}", _TAP)
        if layout.switch is None and (gone := [name for name, key in expected if (name, key) not in found]):
            missing = True
            yield _missing(patient, exchange, gone, ring)
    if not foreign and not missing:
        yield Finding("ok", "bindings", "exchanges and ring are bound as they should be")


def _missing(patient: Patient, exchange: str, gone: list[str], ring: str) -> Finding:
    what = f"{exchange} is not bound to {name_some(gone)}"
    if exchange == ring:
        fix = f"delete the exchange {ring}: a worker makes a new generation, in order; bind nothing by hand"
    elif patient.layout.generation:
        fix = f"delete the exchange {patient.names.publish}, then run `celery shards declare`; bind nothing by hand"
    else:
        fix = "run `celery shards declare`; until then, what is published may be returned to the publisher"
    return Finding("error", "bindings", what, fix)


def _check_replicas(
    patient: Patient, queues: list[Mapping[str, Any]], nodes: list[Mapping[str, Any]]
) -> Iterator[Finding]:
    if len(nodes) < 2:
        yield Finding(
            "note", "replicas", "the broker has one node: while it is down, nothing runs, but nothing is lost"
        )
        return
    few: list[str] = []
    partly: list[str] = []
    halted: list[str] = []
    classic: list[str] = []
    for queue in queues:
        name, members, online = str(queue.get("name")), queue.get("members") or (), queue.get("online") or ()
        if queue.get("type") == "classic" and not queue.get("exclusive") and not _is_passing(patient.names, name):
            classic.append(name)
        elif members:
            if 2 * len(online) <= len(members):
                halted.append(name)
            elif len(online) < len(members):
                partly.append(name)
            if len(members) < min(3, len(nodes)):
                few.append(name)
    if halted:
        yield Finding("error", "replicas", f"without a majority of replicas: {name_some(halted)}", "start their nodes")
    if classic:
        text = f"classic queues on a cluster: {name_some(classic)}; they may lose their order with a node"
        fix = 'move to a group with queue_type="quorum"'
        yield Finding("error", "replicas", text, fix)
    if partly:
        yield Finding("warning", "replicas", f"a replica is down: {name_some(partly)}", "start its node")
    if few:
        text = f"fewer than {min(3, len(nodes))} replicas: {name_some(few)}"
        fix = (
            "run `rabbitmq-queues grow NODE all --queue-pattern '^shards'`, for streams `rabbitmq-streams add_replica`"
        )
        yield Finding("warning", "replicas", text, fix)
    if not (halted or classic or partly or few):
        yield Finding("ok", "replicas", f"every queue has its replicas, on {len(nodes)} nodes")


def _is_passing(names: Names, queue: str) -> bool:
    """Tell whether a queue lives only as long as a command."""
    return queue in (names.admin, names.dead_admin) or queue.startswith(f"{names.publish}.locate.")
