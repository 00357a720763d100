"""How long a publish begins anew, by who makes it and what the settings say."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable

import pytest
from celery import Celery
from celery.app.trace import build_tracer

from celery_sharding.publish.patience import patience_seconds


@pytest.fixture
def app() -> Celery:
    return Celery("patient", broker="memory://", set_as_current=False)


def in_a_run(app: Celery, ask: Callable[[], float], *, eager: bool = False) -> float:
    """Return what `ask` returns within a task, as a worker runs it, or as its caller does."""
    told: list[float] = []

    @app.task(shared=False, name=f"ask-{uuid.uuid4().hex}")
    def asking() -> None:
        told.append(ask())

    build_tracer(asking.name, app.tasks[asking.name], app=app, eager=eager)("id", (), {}, {"is_eager": eager})
    return told[0]


def test_a_caller_is_told_at_once(app: Celery) -> None:
    assert patience_seconds(app.conf, {}, consumer_thread=None) == 0


def test_a_run_waits_at_least_half_a_minute(app: Celery) -> None:
    assert in_a_run(app, lambda: patience_seconds(app.conf, {}, consumer_thread=None)) == 30


def test_a_run_in_the_thread_that_consumes_waits_too(app: Celery) -> None:
    me = threading.get_ident()
    assert in_a_run(app, lambda: patience_seconds(app.conf, {}, consumer_thread=me)) == 30


def test_a_task_that_its_caller_runs_is_told_at_once(app: Celery) -> None:
    assert in_a_run(app, lambda: patience_seconds(app.conf, {}, consumer_thread=None), eager=True) == 0


def test_a_task_that_a_run_runs_in_its_place_waits_as_the_run_does(app: Celery) -> None:
    def ask() -> float:
        return in_a_run(app, lambda: patience_seconds(app.conf, {}, consumer_thread=None), eager=True)

    assert in_a_run(app, ask) == 30


def test_the_thread_that_consumes_never_waits_and_others_of_its_process_do(app: Celery) -> None:
    me = threading.get_ident()
    assert patience_seconds(app.conf, {}, consumer_thread=me) == 0
    assert patience_seconds(app.conf, {}, consumer_thread=me + 1) == 30


@pytest.mark.parametrize(
    ("policy", "seconds"),
    [
        ({"max_retries": 100, "interval_start": 1, "interval_step": 0, "interval_max": 1}, 100),
        ({"max_retries": 10, "interval_start": 1, "interval_step": 1, "interval_max": 5}, 1 + 2 + 3 + 4 + 6 * 5),
        ({"max_retries": 20, "interval_start": 10, "interval_step": 1, "interval_max": 5}, 20 * 5),
        ({"max_retries": 3}, 30),
        ({"max_retries": 0}, 30),
        ({"max_retries": None, "interval_max": 100}, 30),
    ],
)
def test_a_policy_that_waits_longer_counts(app: Celery, policy: dict[str, object], seconds: float) -> None:
    app.conf.task_publish_retry_policy = policy
    assert in_a_run(app, lambda: patience_seconds(app.conf, {}, consumer_thread=None)) == seconds


def test_the_policy_of_the_call_counts_before_that_of_the_app(app: Celery) -> None:
    options = {"retry_policy": {"max_retries": 50, "interval_start": 1, "interval_step": 0, "interval_max": 1}}
    assert in_a_run(app, lambda: patience_seconds(app.conf, options, consumer_thread=None)) == 50


def test_nothing_waits_where_retries_are_off(app: Celery) -> None:
    assert in_a_run(app, lambda: patience_seconds(app.conf, {"retry": False}, consumer_thread=None)) == 0
    app.conf.task_publish_retry = False
    assert in_a_run(app, lambda: patience_seconds(app.conf, {}, consumer_thread=None)) == 0
    assert in_a_run(app, lambda: patience_seconds(app.conf, {"retry": True}, consumer_thread=None)) == 30
