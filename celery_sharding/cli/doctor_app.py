"""The doctor's checks of the app itself: its settings, and its store of claims."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from celery_sharding.config import Settings
from celery_sharding.dedup.mark import deduplicated_tasks
from celery_sharding.dedup.stores import check_tasks, store_for
from celery_sharding.errors import DamagedRecord, NoUsableStore, StoreUnavailable
from celery_sharding.extension import Sharding
from celery_sharding.monitoring.doctor import Finding

# Not the name of any claim: scopes are names of tasks.
_PROBE = "celery-sharding:doctor"
_SHORT_HEARTBEAT_SECONDS = 5.0


def examine_app(sharding: Sharding) -> Iterator[Finding]:
    """Import the tasks of this process' app, and yield what is found in it."""
    app = sharding.app
    app.loader.import_default_modules()
    yield from _check_settings(app, sharding.settings)
    yield from _check_names(sharding)
    yield from _check_time_limits(sharding)
    yield from _check_claims(app)


def _check_settings(app: Any, settings: Settings) -> Iterator[Finding]:
    conf = app.conf
    wrong = False
    if conf.task_always_eager:
        wrong = True
        yield Finding(
            "error",
            "settings",
            "task_always_eager is on: tasks run where they are called, in no order, and never reach the broker",
            "use it in tests only; for tests, memory:// keeps the order",
        )
    beat = conf.broker_heartbeat
    heartbeat = min(beat or settings.heartbeat_seconds, settings.heartbeat_seconds)
    if heartbeat < _SHORT_HEARTBEAT_SECONDS:
        wrong = True
        yield Finding(
            "warning",
            "heartbeat",
            f"the heartbeat is {heartbeat:g} s: a busy host may seem dead, and its tasks run twice",
            "15 s suit most; the smaller of broker_heartbeat and sharding_heartbeat_seconds counts",
        )
    if conf.broker_connection_retry is False:
        wrong = True
        yield Finding(
            "warning",
            "settings",
            "broker_connection_retry is off: a worker ends when its connection is lost",
            "leave it on, or make sure that something restarts workers",
        )
    if conf.worker_enable_remote_control and conf.control_queue_exclusive and len(app.connection_for_read().alt) > 1:
        yield Finding(
            "note",
            "settings",
            "the queues for remote control are exclusive: when a node of a RabbitMQ 4.3 cluster is lost, workers "
            "connected to it cannot connect again until it is back",
            "set control_queue_exclusive=False and control_queue_durable=True, and default_queue_type = quorum on the "
            "nodes",
        )
    if not wrong:
        yield Finding("ok", "settings", f"heartbeat {heartbeat:g} s; no setting of Celery's is a problem")


def _check_names(sharding: Sharding) -> Iterator[Finding]:
    for doubt in sharding.warnings:
        yield Finding("warning", "settings", doubt, "correct the name, or ignore this if it is not meant for sharding")
    for doubt in sharding.find_idle_routes(sharding.settings.groups):
        yield Finding(
            "warning",
            "routes",
            f"{doubt}: tasks that it was meant for run in no order",
            "correct the name of the task, or import its module here; ignore this if another app has the task",
        )


def _check_time_limits(sharding: Sharding) -> Iterator[Finding]:
    app, timeout_seconds = sharding.app, sharding.settings.consumer_timeout_seconds
    yield Finding(
        "note",
        "consumer time-out",
        f"not checked: the broker does not show its consumer_timeout, assumed to be {timeout_seconds:g} s",
        "see `rabbitmqctl environment`; if it is not 30 min, set sharding_consumer_timeout_seconds",
    )
    for name in sorted(app.tasks):
        task = app.tasks[name]
        if sharding.rules.rule_for(name, task) is None:
            continue
        limit = task.time_limit or app.conf.task_time_limit
        if isinstance(limit, int | float) and limit > timeout_seconds:
            yield Finding(
                "warning",
                "consumer time-out",
                f"{name} may run for {limit:g} s, longer than the broker waits for an acknowledgement",
                "raise consumer_timeout on the broker, and sharding_consumer_timeout_seconds, or lower the time limit",
            )


def _check_claims(app: Any) -> Iterator[Finding]:
    tasks = deduplicated_tasks(app)
    if not tasks:
        yield Finding("ok", "claims", "no task is deduplicated, so no store is needed")
        return
    pool = str(app.conf.worker_pool)
    try:
        check_tasks(app, has_child_processes=pool in ("prefork", "processes"))
        store = store_for(app, eager=bool(app.conf.task_always_eager))
        store.show(_PROBE)
    except NoUsableStore as exc:
        fix = "grant that right" if exc.facts.get("refused") else "set result_backend to one of these"
        yield Finding("error", "claims", exc.message, f"{fix}; workers will not start")
        return
    except StoreUnavailable as exc:
        yield Finding("error", "claims", exc.message, "make sure that it is up; deduplicated tasks wait for it or fail")
        return
    except DamagedRecord:
        pass  # it answers
    kind = type(store).__name__.removesuffix("Store")
    if store.caveat is not None:
        yield Finding("warning", "claims", f"claims may be lost: {store.caveat}", "use another result backend")
    yield Finding("ok", "claims", f"{kind} keeps the claims of {len(tasks)} tasks, and accepts new ones")
    if kind == "Redis":
        yield from _check_redis(app)


def _check_redis(app: Any) -> Iterator[Finding]:
    from redis.exceptions import RedisError

    try:
        client = app.backend.client
        found: Mapping[str, Any] = client.info() | client.config_get("maxmemory*")
        found |= client.config_get("min-replicas-to-write") | client.config_get("save")
    except (RedisError, OSError, AttributeError) as exc:
        yield Finding(
            "note",
            "Redis",
            f"not checked: its configuration cannot be read ({type(exc).__name__})",
            "make sure that maxmemory-policy is noeviction, and that it writes to disk (appendonly yes)",
        )
        return
    yield from examine_redis(found)


def examine_redis(found: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what is wrong with a Redis for claims, from its INFO and CONFIG."""
    policy, limit = str(found.get("maxmemory-policy")), int(found.get("maxmemory") or 0)
    wrong = False
    if limit and policy != "noeviction":
        wrong = True
        yield Finding(
            "error",
            "Redis",
            f"maxmemory-policy is {policy}: claims are evicted when the memory is full, and duplicates run",
            "set maxmemory-policy noeviction",
        )
    if not int(found.get("aof_enabled") or 0):
        wrong = True
        saves = bool(found.get("save"))
        yield Finding(
            "warning",
            "Redis",
            "it writes to disk only now and then: a crash loses the last claims" if saves else
            "it writes nothing to disk: a restart loses all claims",
            "set appendonly yes",
        )  # fmt: skip
    if int(found.get("connected_slaves") or 0) and not int(found.get("min-replicas-to-write") or 0):
        yield Finding(
            "note",
            "Redis",
            "it accepts writes that no replica has: a failover may lose claims",
            "set min-replicas-to-write 1, and min-replicas-max-lag",
        )
    if not wrong:
        yield Finding("ok", "Redis", "it evicts nothing, and writes to disk")
