"""What `shards doctor` checks in a group: findings, each with its fix. Changes nothing.

    error     a promise is broken, or tasks do not run
    warning   a promise is at risk, or somebody should take a look
    note      worth knowing; or a check that was not possible, and what it needs
    ok        checked, and as it should be

A check is a function that takes a `Patient` and yields findings. Those of `layout` and `state` use plain AMQP, those of
`broker` the management API; `cli.doctor_app` checks the app's own configuration. A check that lacks permissions yields
a note, no error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from celery_sharding import topology
from celery_sharding.errors import ManagementUnavailable
from celery_sharding.layout.protocol import describe_need, is_known
from celery_sharding.monitoring.doctor.broker import check_broker, unexamined
from celery_sharding.monitoring.doctor.finding import Finding, Patient
from celery_sharding.monitoring.doctor.layout import (
    check_arguments,
    check_configuration,
    check_layout,
    check_plugin,
    check_version,
)
from celery_sharding.monitoring.doctor.state import check_backlog, check_clocks, check_shards
from celery_sharding.monitoring.management import Management

__all__ = ["Finding", "Patient", "examine"]

_CHECKS: tuple[Callable[[Patient], Iterator[Finding]], ...] = (
    check_configuration,
    check_layout,
    check_arguments,
    check_shards,
    check_backlog,
    check_clocks,
)


def examine(patient: Patient, api: Management | None, *, consumer_timeout_seconds: float) -> Iterator[Finding]:
    """Yield what is found in a group.

    Args:
        api: The management API; None: there is none to ask.
        consumer_timeout_seconds: What the app takes the broker's own for.

    Raises:
        LogError: A log could not be read.
        OSError, amqp's ConnectionError: The broker was lost.
    """
    yield from check_version(patient)
    yield from check_plugin(patient)
    if not is_known(patient.layout.protocol):
        text = f"a newer version uses it: it {describe_need(patient.layout.protocol)}"
        yield Finding("error", "protocol", text, "upgrade celery-sharding, here and in the workers")
        return
    if not topology.fixed_exists(patient.connection, patient.names) and not patient.layout.limbo:
        yield Finding("error", "layout", "the group is not declared", "run `celery shards declare` or start a worker")
        return
    for check in _CHECKS:
        yield from check(patient)
    if api is None:
        yield unexamined()
        return
    try:
        yield from check_broker(patient, api, consumer_timeout_seconds=consumer_timeout_seconds)
    except ManagementUnavailable as exc:
        yield Finding("warning", "management", exc.message, "correct sharding_management_url, or remove it")
