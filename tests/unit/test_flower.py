"""The parts of the page of shards that need no Flower to run: where it is mounted, who may post, what is remembered."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from types import SimpleNamespace
from typing import Any

import pytest
from celery.events.state import Task
from flower import urls
from prometheus_client import REGISTRY, Metric
from prometheus_client.registry import Collector
from tornado.httpclient import AsyncHTTPClient, HTTPResponse
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application

from celery_sharding.errors import (
    BrokerUnavailable,
    DeadLetterError,
    LockHeld,
    ManifestConflict,
    UnknownGroup,
    UnknownShard,
)
from celery_sharding.flower import format_task, mask_task
from celery_sharding.flower.actions import Refused, check_origin, refusal_for
from celery_sharding.flower.mount import _add_entry, mount
from celery_sharding.flower.recent import EVENTS_MAX, KEEP_SECONDS, STEP_SECONDS, Recent
from celery_sharding.journal.events import TaskFailed

QUEUE = "shards.orders.g001.003"


# --- where it is mounted ---------------------------------------------------------------------------------------------


def test_flower_still_has_the_list_and_the_settings_that_we_add_to() -> None:
    # The last handler takes every address, and the last but one must be ours to be reached
    assert urls.handlers[-1][0] == ".*"
    assert {"template_path", "xsrf_cookies"} <= set(urls.settings)
    assert "template_loader" not in urls.settings


def test_every_address_is_a_url_that_keeps_its_arguments_under_a_prefix() -> None:
    handlers: list[Any] = [(r".*", object)]
    mount(SimpleNamespace(), handlers, {"template_path": "."})  # type: ignore[arg-type]

    assert handlers[-1] == (r".*", object)
    assert all(type(each) is urls.url for each in handlers[:-1])


def test_the_navigation_of_another_flower_is_left_alone_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert _add_entry("<nav>other</nav>") == "<nav>other</nav>"
    assert "/shards" in caplog.text


# --- who may post ----------------------------------------------------------------------------------------------------

HOST = "flower.test:5555"
OURS = {"X-Requested-By": "shards"}


@pytest.mark.parametrize(
    "headers",
    [
        OURS,
        OURS | {"Sec-Fetch-Site": "same-origin", "Origin": f"http://{HOST}"},
        OURS | {"Origin": f"https://{HOST}"},
        OURS | {"Sec-Fetch-Site": "same-origin", "Origin": "https://outside.test"},  # a proxy that changes the host
    ],
)
def test_a_post_of_the_page_or_of_a_program_is_taken(headers: dict[str, str]) -> None:
    check_origin(headers, HOST)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Sec-Fetch-Site": "same-origin", "Origin": f"http://{HOST}"},
        OURS | {"Sec-Fetch-Site": "cross-site"},
        OURS | {"Origin": "http://evil["},
        OURS | {"Origin": f"http://{HOST}.evil.test"},
        OURS | {"Sec-Fetch-Site": "same-site", "Origin": f"http://{HOST}"},
        OURS | {"Sec-Fetch-Site": "none"},
        OURS | {"Origin": "http://evil.test"},
        OURS | {"Origin": "http://flower.test"},
        OURS | {"Origin": "null"},
    ],
)
def test_a_post_that_another_site_may_have_made_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(Refused) as refused:
        check_origin(headers, HOST)
    assert refused.value.status == 403


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UnknownGroup("x"), 404),
        (UnknownShard("x"), 404),
        (LockHeld("x"), 409),
        (ManifestConflict("x"), 409),
        (DeadLetterError("x"), 409),
        (BrokerUnavailable("x"), 503),
        (ConnectionRefusedError(), 503),
    ],
)
def test_errors_have_the_status_that_fits_and_a_text(error: Exception, status: int) -> None:
    refused = refusal_for(error)
    assert refused is not None
    assert refused.status == status
    assert str(refused)


def test_an_error_that_nobody_expects_is_not_hidden() -> None:
    assert refusal_for(KeyError("x")) is None


# --- what is remembered ----------------------------------------------------------------------------------------------


def vitals(at: float, *, by: str = "w@test", since: float = 0.0, done: int = 0, lag: float | None = None) -> Any:
    owned = {
        QUEUE: {"index": 3, "since": since, "held": 1, "running": 1, "lag_seconds": lag, "counters": {"done": done}}
    }
    return {"event": "vitals", "at": at, "by": by, "generation": 1, "owned": owned, "standby": []}


def test_a_trend_has_the_largest_lag_and_the_rate_of_each_step_that_is_over() -> None:
    recent = Recent()
    for at, done, lag in [
        (100, 1_000, None),
        (101, 1_010, 3.0),
        (104, 1_020, 1.0),
        (105, 1_025, None),
        (112, 1_030, 9.0),
    ]:
        recent.note("orders", vitals(at, done=done, lag=lag))

    points = recent.points(QUEUE, now=112.5)

    # What was done before the first word is not of this step; the step that is not over has no rate yet
    assert [(point.at, point.lag_seconds, point.rate) for point in points] == [(100, 3.0, 4.0), (105, 0.0, 1.0)]


def test_events_that_come_again_after_a_lost_connection_count_once() -> None:
    recent = Recent()
    failure = TaskFailed(QUEUE, "w@test", task_id="1", task="shop.pay", error="ValueError", at=102.0).as_dict()
    events = [vitals(100, done=1), vitals(101, done=5), failure]
    for event in [*events, *events]:
        recent.note("orders", event)

    assert [point.done for point in recent.points(QUEUE, now=105)] == [4]
    assert recent.events(QUEUE) == [failure]


def test_a_new_owner_counts_from_nothing() -> None:
    recent = Recent()
    recent.note("orders", vitals(100, done=50))
    recent.note("orders", vitals(102, by="other@test", since=101, done=2))

    assert [point.done for point in recent.points(QUEUE, now=110)] == [2]


def test_a_queue_of_which_nothing_is_said_any_more_is_forgotten() -> None:
    recent = Recent()
    recent.note("orders", {"event": "handover", "at": 100.0, "queue": "shards.orders.g001.007", "change": "released"})
    recent.note("orders", vitals(100))
    recent.note("orders", vitals(100 + KEEP_SECONDS))
    assert recent.events("shards.orders.g001.007")

    recent.note("orders", vitals(200 + KEEP_SECONDS))

    assert set(recent._queues) == {QUEUE}


def test_the_past_and_damaged_events_are_let_go() -> None:
    recent = Recent()
    for number in range(EVENTS_MAX + 5):
        recent.note("orders", {"event": "handover", "at": float(number), "queue": QUEUE, "change": "taken"})
    for damaged in ({}, {"event": "vitals", "at": 1, "owned": {QUEUE: None}}, {"event": "dead", "at": "x", "queue": 5}):
        recent.note("orders", damaged)
    recent.note("orders", vitals(100))

    assert [event["at"] for event in recent.events(QUEUE)] == list(range(EVENTS_MAX + 4, 4, -1))
    assert recent.points(QUEUE, now=100 + STEP_SECONDS)
    assert not recent.points(QUEUE, now=1_000)


# --- tasks in Flower's list ------------------------------------------------------------------------------------------


def task(**facts: Any) -> Task:
    """Return a task as Flower gives it: a copy."""
    given = {
        "name": "shop.pay",
        "args": "(42,)",
        "kwargs": "{}",
        "routing_key": "42",
        "exchange": "shards.orders.g001.003",
    }
    return copy(Task(uuid="1", **given | facts))


def test_a_task_is_shown_with_its_shard_and_with_its_key_unless_it_is_to_be_masked() -> None:
    shown, masked = format_task(task()), mask_task(task())

    assert (shown.exchange, shown.routing_key, shown.args) == ("orders/3", "42", "(42,)")
    assert masked.exchange == "orders/3"
    assert "42" not in f"{masked.args}{masked.kwargs}{masked.routing_key}"


def test_tasks_of_a_limbo_of_no_shard_and_of_which_nothing_is_known() -> None:
    assert format_task(task(exchange="shards.orders.limbo001")).exchange == "orders/limbo001"
    assert format_task(task(exchange="celery")).exchange == "celery"
    assert "42" not in mask_task(task(name=None, exchange=None)).args


# --- metrics ---------------------------------------------------------------------------------------------------------


class _Slow(Collector):
    """Notes which thread collects."""

    thread: threading.Thread | None = None

    def collect(self) -> Iterator[Metric]:
        self.thread = threading.current_thread()
        return iter(())


def test_metrics_are_written_beside_flowers_loop_which_goes_on() -> None:
    # Given Flower's addresses with ours among them
    slow = _Slow()
    REGISTRY.register(slow)
    mount(SimpleNamespace(), handlers := [*urls.handlers], {"template_path": "."})  # type: ignore[arg-type]
    application = Application(handlers)
    application.options = SimpleNamespace(basic_auth=[], auth="")  # type: ignore[attr-defined]

    async def ask() -> HTTPResponse:
        server, (socket,) = HTTPServer(application), bind_sockets(0, "127.0.0.1")
        server.add_socket(socket)
        application.executor = ThreadPoolExecutor(1)  # type: ignore[attr-defined]
        try:
            return await AsyncHTTPClient().fetch(f"http://127.0.0.1:{socket.getsockname()[1]}/metrics")
        finally:
            server.stop()

    # When somebody asks for the metrics
    try:
        answer = asyncio.run(ask())
    finally:
        REGISTRY.unregister(slow)
    # Then they come, and another thread has written them
    assert b"python_info" in answer.body
    assert slow.thread not in (None, threading.main_thread())


def test_a_group_may_be_called_static() -> None:
    mount(SimpleNamespace(), handlers := [(r".*", object)], {"template_path": "."})  # type: ignore[arg-type,list-item]
    found = next(each for each in handlers if each.regex.match("/shards/static/0"))  # type: ignore[attr-defined]

    assert found.name == "shard"  # type: ignore[attr-defined]
