"""Two workers cannot share a name: the second logs who has it, and waits until it is free.

A worker's remote-control queue bears its name and is exclusive to its connection. The broker refuses a second worker of
that name (RESOURCE_LOCKED), which Celery takes for a lost connection: it connects again, is refused again, and says
neither whose the name is nor what to do. Here the worker checks the queue first, and asks the worker that answers under
the name for its process.

If nobody answers, the connection of a dead worker may linger: the broker closes it after two to three heartbeats.
"""

from __future__ import annotations

import logging
import socket
import time
from typing import Any
from urllib.parse import quote

from amqp import exceptions as amqp_errors
from celery.worker.consumer.control import Control
from celery.worker.state import maybe_shutdown
from kombu.exceptions import OperationalError

from celery_sharding.celery_hooks.site import WorkerSite
from celery_sharding.errors import ManagementUnavailable
from celery_sharding.monitoring.management import open_management
from celery_sharding.rabbitmq.channels import brief_channel

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_ANSWER_SECONDS = 2.0
_REMIND_SECONDS = 60.0
_HOST = "host"


def wait_for_name(site: WorkerSite) -> None:
    """Let a worker wait for its name before it declares its queue for remote control, at each connect.

    Steps stand in `consumer.steps`, and `Control` keeps its `start` on itself.
    """
    for step in site.consumer.steps:
        if isinstance(step, Control):
            _start_when_free(site.consumer, step)


def describe_process() -> dict[str, str]:
    """Return what `inspect stats` shows beside the process id, for a worker that wants the same name."""
    return {_HOST: socket.gethostname()}


def _start_when_free(consumer: Any, control: Any) -> None:
    stock = control.start

    def start_when_free(c: Any) -> Any:
        told_at = None
        while is_taken(consumer):
            now = time.monotonic()
            if told_at is None or now - told_at >= _REMIND_SECONDS:
                told_at = now
                logger.error(
                    "%s; waiting until the name is free. Give each worker a name of its own, as in `-n w2@%%h`",
                    _describe_holder(consumer),
                )
            time.sleep(_POLL_SECONDS)
            maybe_shutdown()
        if told_at is not None:
            logger.info("the name %s is free now", consumer.hostname)
        return stock(c)

    control.start = start_when_free


def is_taken(consumer: Any) -> bool:
    """Say whether another connection has the queue for remote control that is called after this worker."""
    mailbox = consumer.app.control.mailbox
    if not mailbox.queue_exclusive or consumer.connection.transport.driver_type != "amqp":
        return False
    queue = mailbox.get_queue(consumer.hostname).name
    with brief_channel(consumer.connection) as channel:
        try:
            channel.queue_declare(queue, passive=True)
        except amqp_errors.ResourceLocked:
            return True
        except (amqp_errors.NotFound, amqp_errors.AccessRefused):
            return False
    return False


def _describe_holder(consumer: Any) -> str:
    name = consumer.hostname
    try:
        replies = consumer.app.control.inspect([name], timeout=_ANSWER_SECONDS, limit=1).stats() or {}
    except (OperationalError, amqp_errors.AMQPError, OSError) as exc:
        logger.debug("the worker called %s could not be asked", name, exc_info=exc)
        replies = {}
    found = replies.get(name)
    if not isinstance(found, dict) or "pid" not in found:
        return (
            f"a connection to the broker{_find_address(consumer)} has the name {name} of this worker, but nobody "
            "answers: that of a worker that is gone, which the broker ends after two to three heartbeats, or of one "
            "that is busy"
        )
    where = f" on {found[_HOST]}" if _HOST in found else ""
    return f"another worker is called {name} as well: process {found['pid']}{where}"


def _find_address(consumer: Any) -> str:
    """Return from where the connection comes, as only the management API knows; "" if there is none to ask."""
    api = open_management(consumer.app.sharding.settings, consumer.connection)
    if api is None:
        return ""
    queue = consumer.app.control.mailbox.get_queue(consumer.hostname).name
    try:
        owner = api.get(f"/api/queues/{api.virtual_host}/{quote(queue, safe='')}").get("owner_pid_details")
    except ManagementUnavailable as exc:
        logger.debug("the owner of %s is not known: %s", queue, exc)
        return ""
    return f", from {owner['peer_host']}:{owner.get('peer_port')}," if owner and "peer_host" in owner else ""
