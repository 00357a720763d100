"""Checks by plain AMQP of what exists: version, plugin, exchanges, queues and their arguments."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

from celery_sharding import topology
from celery_sharding.errors import PluginMissing, TopologyError, TopologyMismatch
from celery_sharding.layout.ensure import find_fault
from celery_sharding.monitoring.doctor.finding import Finding, Patient, unchecked
from celery_sharding.monitoring.health import SWITCH_SECONDS, name_some
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.rabbitmq.connect import close_connection, open_connection
from celery_sharding.rabbitmq.pipelining import Look, all_exist
from celery_sharding.rabbitmq.queues import queue_exists
from celery_sharding.rabbitmq.refusals import explained
from celery_sharding.topology import RING_TYPE

_OLDEST, _BEST = (3, 10), (4, 0)


def check_version(patient: Patient) -> Iterator[Finding]:
    properties = getattr(patient.connection.connection, "server_properties", {})
    product, text = properties.get("product", "the broker"), str(properties.get("version", ""))
    version = tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())
    if len(version) < 2:
        yield Finding("note", "version", f"{product} does not tell its version", "")
    elif version < _OLDEST:
        yield Finding("error", "version", f"{product} {text} is too old", "run RabbitMQ 3.10 or later, preferably 4")
    elif version < _BEST:
        yield Finding(
            "note",
            "version",
            f"{product} {text} works, but it keeps rings in memory, so a restart costs a new generation, and the next "
            "standby cannot be chosen",
            "RabbitMQ 4 balances shards sooner; on Khepri rings survive a restart",
        )
    else:
        yield Finding("ok", "version", f"{product} {text}")


def check_plugin(patient: Patient) -> Iterator[Finding]:
    layout = patient.layout
    if layout.generation and topology.ring_exists(patient.connection, patient.names, layout.generation):
        yield Finding("ok", "plugin", "the consistent-hash exchange is enabled")
        return
    # A connection of its own: brokers before 4 close it when they do not know the type.
    ring = f"{patient.names.publish}.locate.{uuid.uuid4().hex}"
    connection = open_connection(patient.connect())
    try:
        with brief_channel(connection) as channel, explained(patient.group.name, ring):
            channel.exchange_declare(ring, RING_TYPE, durable=False, auto_delete=True)
            channel.exchange_delete(ring)
        yield Finding("ok", "plugin", "the consistent-hash exchange is enabled")
    except PluginMissing:
        text = "the broker has no consistent-hash exchange, so no ring can be declared"
        fix = "run `rabbitmq-plugins enable rabbitmq_consistent_hash_exchange` on every node"
        yield Finding("error", "plugin", text, fix)
    except TopologyError as exc:
        yield unchecked("plugin", exc)
    finally:
        close_connection(connection)


def check_configuration(patient: Patient) -> Iterator[Finding]:
    group, layout = patient.group, patient.layout
    live = layout.segment(f"g{layout.generation:03d}")
    if live is None:
        return
    if live.shards != group.shards:
        text = f"{live.shards} shards are live, {group.shards} are configured; the live number counts"
        fix = f"set shards={live.shards}"
        yield Finding("warning", "configuration", text, fix)
    if live.queue_type != group.queue_type:
        text = f"the queues are {live.queue_type} queues, {group.queue_type} is configured; no worker will start"
        fix = f"set queue_type={live.queue_type!r}, or choose another name for a group of {group.queue_type} queues"
        yield Finding("error", "configuration", text, fix)
    if (live.shards, live.queue_type) == (group.shards, group.queue_type):
        yield Finding("ok", "configuration", f"{live.shards} {live.queue_type} shards, as configured")


def check_layout(patient: Patient) -> Iterator[Finding]:
    layout = patient.layout
    fault = find_fault(patient.connection, patient.names, layout)
    if fault is None:
        yield Finding("ok", "layout", f"generation {layout.generation} is whole")
        return
    switch = layout.switch
    if switch is not None and switch.at is not None and time.time() - switch.at < SWITCH_SECONDS:
        yield Finding("note", "layout", f"{fault}, for less than a minute so far", "run the doctor again in a minute")
    else:
        yield Finding("error", "layout", fault, "run `celery shards declare`; running workers repair it by themselves")


def check_arguments(patient: Patient) -> Iterator[Finding]:
    """Declare what exists once more, which the broker refuses if the arguments differ."""
    layout, names, connection = patient.layout, patient.names, patient.connection
    queues = [names.limbo(layout.limbo)] if layout.limbo else []
    queues += [names.shard(layout.generation, index) for index in range(layout.shards)]
    refused: list[str] = []
    fix = ""
    try:
        if all_exist(connection, *(Look(name, "fanout") for name, _ in topology.fanouts(names))):
            topology.check_fixed(connection, patient.group)
        for queue in queues:
            try:
                if queue_exists(connection, queue):
                    topology.check_queue(connection, patient.group, queue)
            except TopologyMismatch as exc:
                refused.append(queue)
                fix = fix or exc.message
    except TopologyMismatch as exc:
        yield Finding("error", "arguments", f"{exc.entity} was declared with other arguments", exc.message)
        return
    except TopologyError as exc:
        yield unchecked("arguments", exc)
        return
    if refused:
        yield Finding("error", "arguments", f"declared with other arguments: {name_some(refused)}", fix)
    else:
        yield Finding("ok", "arguments", f"exchanges and {len(queues)} queues are as this version declares them")
