"""What each fault does to the field. Each function returns when its fault is over, and tells when it was there."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable

from amqp.exceptions import AMQPError
from kombu.exceptions import OperationalError

from celery_sharding.errors import ShardingError
from celery_sharding.layout.manifest import load
from celery_sharding.testing import Direction
from celery_sharding.testing.processes import is_alive, wait_until
from soak.field import Field, Party
from soak.plan import Fault, Kind
from soak.verdict import ALL_WORKERS, Incident

STOP_SECONDS = 60.0
_READY_SECONDS = 60.0
_REJOIN_SECONDS = 90.0
_BOTH, _TO_SERVER, _TO_CLIENT = (), (Direction.TO_SERVER,), (Direction.TO_CLIENT,)


class FaultFailed(RuntimeError):
    """A fault could not be injected, or did not end as it should; the message says why."""


def inject(field: Field, fault: Fault, over: threading.Event) -> Incident:
    """Let `fault` happen, wait until it is over, and return when it was there.

    Args:
        over: Set when the soak ends early: faults that last are over then.

    Raises:
        FaultFailed: It could not happen, or a worker did not do what it should.
    """
    return _INJECTORS[fault.kind](field, fault, over)


def _incident(fault: Fault, began: float) -> Incident:
    return Incident(fault.kind, fault.target, began, time.time())


def _stop(field: Field, fault: Fault, over: threading.Event) -> Incident:
    party = field.workers[fault.target]
    party.should_run = False
    began = time.time()
    failure = _stop_warm(party)
    incident = _incident(fault, began)
    over.wait(fault.seconds)
    party.node.start(wait_seconds=0)
    party.should_run = True
    if failure:
        raise FaultFailed(failure)
    return incident


def _join(field: Field, fault: Fault, over: threading.Event) -> Incident:
    began = time.time()
    party = field.add_worker(fault.target)
    over.wait(fault.seconds)
    party.should_run = False
    failure = _stop_warm(party)
    if failure:
        raise FaultFailed(failure)
    return _incident(fault, began)


def _stop_warm(party: Party) -> str | None:
    """Stop a worker warm, and say what was wrong with it. One that is still starting may just end."""
    node = party.node
    is_ready = " ready." in node.output
    try:
        status = node.stop(timeout_seconds=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        node.kill()
        return f"{party.name} was told to stop and still ran after {STOP_SECONDS:g} s"
    if status and is_ready:
        return f"{party.name} ended with status {status} when it was stopped warm"
    return None


def _kill(field: Field, fault: Fault, over: threading.Event) -> Incident:
    party = field.workers[fault.target]
    party.should_run = False
    began = time.time()
    party.node.kill()
    incident = _incident(fault, began)
    over.wait(fault.seconds)
    party.node.start(wait_seconds=0)
    party.should_run = True
    return incident


def _kill_parent(field: Field, fault: Fault, over: threading.Event) -> Incident:
    party = field.workers[fault.target]
    party.should_run = False
    children = party.node.children()
    began = time.time()
    party.node.signal(signal.SIGKILL)
    party.node.wait()
    gone = wait_until(lambda: not any(map(is_alive, children)), timeout_seconds=10)
    incident = _incident(fault, began)
    party.node.kill()
    over.wait(fault.seconds)
    party.node.start(wait_seconds=0)
    party.should_run = True
    if not gone:
        raise FaultFailed(f"processes of the pool of {fault.target} outlived their parent")
    return incident


def _kill_child(field: Field, fault: Fault, over: threading.Event) -> Incident:
    node = field.workers[fault.target].node
    # Celery takes a child that dies before its worker is ready for one that cannot start, and ends the worker.
    wait_until(lambda: " ready." in node.output or over.is_set(), timeout_seconds=_READY_SECONDS)
    children = node.children()
    began = time.time()
    if children:
        try:
            os.kill(children[int(fault.draw * len(children))], signal.SIGKILL)
        except ProcessLookupError:
            pass  # it was being replaced
    return _incident(fault, began)


def _pause(field: Field, fault: Fault, over: threading.Event) -> Incident:
    node = field.workers[fault.target].node
    began = time.time()
    node.signal(signal.SIGSTOP)
    try:
        over.wait(fault.seconds)
    finally:
        node.signal(signal.SIGCONT)
    return _incident(fault, began)


def _cut(field: Field, fault: Fault, over: threading.Event) -> Incident:
    began = time.time()
    field.workers[fault.target].link.cut(reset=fault.draw < 0.5)
    return _incident(fault, began)


def _stall(field: Field, fault: Fault, over: threading.Event) -> Incident:
    return _break_link(field, fault, over, field.workers[fault.target].link.stall)


def _blackhole(field: Field, fault: Fault, over: threading.Event) -> Incident:
    return _break_link(field, fault, over, field.workers[fault.target].link.blackhole)


def _break_link(field: Field, fault: Fault, over: threading.Event, breaking: Callable[..., None]) -> Incident:
    directions = (_BOTH, _TO_SERVER, _TO_CLIENT)[int(fault.draw * 3)]
    began = time.time()
    breaking(*directions)
    try:
        over.wait(fault.seconds)
    finally:
        field.workers[fault.target].link.heal()
    return _incident(fault, began)


def _cut_backend(field: Field, fault: Fault, over: threading.Event) -> Incident:
    return _break_backend(field, fault, over, field.workers[fault.target].backend.refuse)


def _blackhole_backend(field: Field, fault: Fault, over: threading.Event) -> Incident:
    return _break_backend(field, fault, over, field.workers[fault.target].backend.blackhole)


def _break_backend(field: Field, fault: Fault, over: threading.Event, breaking: Callable[[], None]) -> Incident:
    began = time.time()
    breaking()
    try:
        over.wait(fault.seconds)
    finally:
        field.workers[fault.target].backend.heal()
    return _incident(fault, began)


def _stop_store(field: Field, fault: Fault, over: threading.Event) -> Incident:
    redis = field.servers.redis
    began = time.time()
    stop, go_on = (redis.pause, redis.resume) if fault.hangs else (redis.stop, redis.start)
    stop()
    try:
        over.wait(fault.seconds)
    finally:
        go_on()
    # Whoever claims is hit.
    return Incident(fault.kind, ALL_WORKERS, began, time.time())


def _cut_publisher(field: Field, fault: Fault, over: threading.Event) -> Incident:
    began = time.time()
    field.publisher_links[fault.target].cut(reset=fault.draw < 0.5)
    return _incident(fault, began)


def _delete_ring(field: Field, fault: Fault, over: threading.Event) -> Incident:
    began = time.time()
    names = field.names(fault.target)
    try:
        with field.servers.connected() as connection:
            connection.channel().exchange_delete(names.ring(load(connection, names).generation))
    except (OSError, AMQPError, OperationalError, ShardingError):
        pass  # the broker is down, and its ring with it
    return _incident(fault, began)


def _restart_broker(field: Field, fault: Fault, over: threading.Event) -> Incident:
    began = time.time()
    field.servers.restart_broker()
    return _incident(fault, began)


def _kill_broker(field: Field, fault: Fault, over: threading.Event) -> Incident:
    began = time.time()
    node = field.servers.kill_broker()
    over.wait(fault.seconds)
    node.start()
    return _incident(fault, began)


def _reshard(field: Field, fault: Fault, over: threading.Event) -> Incident:
    began = time.time()
    failure = field.reshard(fault.target, fault.shards, dies_after=fault.dies_after)
    if failure:
        raise FaultFailed(failure)
    return _incident(fault, began)


def _kill_node(field: Field, fault: Fault, over: threading.Event) -> Incident:
    node = field.servers.node(fault.target)
    began = time.time()
    node.kill()
    incident = _incident_of_node(fault, began)
    over.wait(fault.seconds)
    node.start()
    return incident


def _restart_node(field: Field, fault: Fault, over: threading.Event) -> Incident:
    node = field.servers.node(fault.target)
    began = time.time()
    node.stop()
    incident = _incident_of_node(fault, began)
    node.start()
    return incident


def _pause_node(field: Field, fault: Fault, over: threading.Event) -> Incident:
    node = field.servers.node(fault.target)
    began = time.time()
    node.pause()
    try:
        over.wait(fault.seconds)
    finally:
        node.resume()
    incident = _incident_of_node(fault, began)
    # One that was given up finds itself in the minority, stops serving, and joins again.
    if not wait_until(lambda: field.servers.is_whole(), timeout_seconds=_REJOIN_SECONDS):
        raise FaultFailed(f"{fault.target} did not join its cluster again after it was paused")
    return incident


def _incident_of_node(fault: Fault, began: float) -> Incident:
    # Whose queues and connections were there is not known here, so it counts as everybody's.
    return Incident(fault.kind, ALL_WORKERS, began, time.time())


_INJECTORS: dict[Kind, Callable[[Field, Fault, threading.Event], Incident]] = {
    Kind.STOP: _stop,
    Kind.LEAVE: _stop,
    Kind.JOIN: _join,
    Kind.KILL: _kill,
    Kind.KILL_PARENT: _kill_parent,
    Kind.KILL_CHILD: _kill_child,
    Kind.PAUSE: _pause,
    Kind.CUT: _cut,
    Kind.STALL: _stall,
    Kind.BLACKHOLE: _blackhole,
    Kind.CUT_PUBLISHER: _cut_publisher,
    Kind.DELETE_RING: _delete_ring,
    Kind.RESHARD: _reshard,
    Kind.RESTART_BROKER: _restart_broker,
    Kind.KILL_BROKER: _kill_broker,
    Kind.KILL_NODE: _kill_node,
    Kind.RESTART_NODE: _restart_node,
    Kind.PAUSE_NODE: _pause_node,
    Kind.CUT_BACKEND: _cut_backend,
    Kind.BLACKHOLE_BACKEND: _blackhole_backend,
    Kind.STOP_STORE: _stop_store,
}
