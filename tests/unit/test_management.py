"""The client of the management API against what else may answer there: a real HTTP server that says what it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from kombu import Connection

from celery_sharding.config import Settings, read_settings
from celery_sharding.errors import ConfigurationError, ManagementUnavailable
from celery_sharding.monitoring import management
from celery_sharding.monitoring.management import ConsumerFacts, Management, QueueFacts, open_management
from celery_sharding.topology import Names

QUEUE = "shards.orders.g001.000"


class Server(ThreadingHTTPServer):
    """Answers everything with `status`, `headers` and `body`, and keeps what it was asked.

    It `drips` after "headers" or "body", until it is told to stop.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.headers, self.body = 200, {}, b"{}"
        self.drips, self.stops = "", threading.Event()
        self.asked: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        self.send_response(self.server.status)
        for name, value in {"Content-Length": str(len(self.server.body)), **self.server.headers}.items():
            self.send_header(name, value)
        with suppress(ConnectionError):  # the client has had enough
            self.flush_headers()
            self._drip("headers")
            self.end_headers()
            self.wfile.write(self.server.body)
            self._drip("body")

    def _drip(self, after: str) -> None:
        while self.server.drips == after and not self.server.stops.wait(0.001):
            self.wfile.write(b" ")

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


def client(server: Server) -> Management:
    return Management(server.url, user="guest", password="hunter2", virtual_host="/")


def test_a_broker_whose_statistics_are_off_is_not_asked_for_more_than_it_knows(server):
    # Given what RabbitMQ 3.10 answers with `management_agent.disable_metrics_collector = true`
    server.body = json.dumps(
        {
            "name": QUEUE,
            "leader": "rabbit@a",
            "members": ["rabbit@b", "rabbit@a"],
            "online": ["rabbit@a"],
            "type": "quorum",
        }
    ).encode()

    facts, consumers = client(server).read_queue(QUEUE)

    assert facts == QueueFacts(leader="rabbit@a", members=("rabbit@a", "rabbit@b"), online=("rabbit@a",))
    assert consumers is None


def test_a_consumer_whose_channel_has_gone_is_still_told(server):
    server.body = json.dumps({"consumer_details": [{"consumer_tag": "w@h", "channel_details": []}]}).encode()

    assert client(server).read_queue(QUEUE)[1] == (ConsumerFacts("w@h", False, "", "", None),)


def test_many_queues_are_read_page_by_page(server):
    server.body = json.dumps({"page_count": 3, "items": [{"name": QUEUE, "messages_unacknowledged": 4}]}).encode()

    assert client(server).read_queues(Names("orders"))[QUEUE].unacknowledged == 4
    assert [path.partition("&page=")[2].partition("&")[0] for path, _ in server.asked] == ["1", "2", "3"]


@pytest.mark.parametrize("count", [10**9, "many", None])
def test_pages_that_are_not_there_are_not_asked_for(server, count):
    server.body = json.dumps({"page_count": count, "items": []}).encode()

    assert client(server).read_queues(Names("orders")) == {}
    assert len(server.asked) == 1


@pytest.mark.parametrize("after", ["headers", "body"])
@pytest.mark.timeout(20)
def test_an_answer_that_never_ends_is_given_up(server, monkeypatch, after):
    monkeypatch.setattr(management, "_REQUEST_SECONDS", 0.1)
    server.headers = {"Content-Length": "1000000000"}
    server.drips = after

    with pytest.raises(ManagementUnavailable, match="its answer is not complete"):
        client(server).read_queues(Names("orders"))

    server.stops.set()


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (401, b"{}", "refuses the user or the password"),
        (404, b"{}", "the management plugin is enabled"),
        (500, b"oops", "status 500"),
        (200, b"<html>", "does not answer in JSON"),
        (200, b"[]", "of an unknown shape"),
        (200, b"\xff\xfe", "does not answer in JSON"),
        (200, b"[" * 100_000, "does not answer in JSON"),
    ],
)
def test_what_is_no_management_api_is_one_clear_line_without_a_password(server, status, body, why):
    server.status, server.body = status, body

    with pytest.raises(ManagementUnavailable, match=why) as caught:
        client(server).read_queues(Names("orders"))

    assert server.url in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_credentials_do_not_follow_a_redirect(server):
    with Server() as other:
        threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True).start()
        server.status, server.headers = 302, {"Location": other.url}
        with pytest.raises(ManagementUnavailable, match="status 302"):
            client(server).read_queues(Names("orders"))
        other.shutdown()

    assert (len(server.asked), other.asked) == (1, [])


@pytest.mark.parametrize(
    ("setting", "credentials"),
    [("http://HOST", "Basic dXM6cC93"), ("http://op:a%2Fb@HOST/", "Basic b3A6YS9i"), ("http://op:@HOST", "Basic b3A6")],
)
def test_credentials_are_those_of_the_setting_or_else_of_the_broker(server, setting, credentials):
    settings = Settings(management_url=setting.replace("HOST", f"127.0.0.1:{server.server_port}"))
    server.body = b'{"items": []}'

    api = open_management(settings, Connection("amqp://us:p%2Fw@127.0.0.1/a%2Fb"))
    api.read_queues(Names("orders"))

    ((path, authorization),) = server.asked
    assert path.startswith("/api/queues/a%2Fb?")
    assert authorization == credentials
    assert api.url == server.url


@pytest.mark.parametrize("url", ["host:15672", "amqp://h", "http://", "http://u:hunter2@h:port", 7, "http://h?x=1"])
def test_a_url_that_cannot_be_used_is_refused_without_being_shown(url):
    with pytest.raises(ConfigurationError, match="sharding_management_url") as caught:
        read_settings({"sharding_management_url": url})

    assert "hunter2" not in str(caught.value)


def test_settings_do_not_show_the_password():
    assert "hunter2" not in repr(read_settings({"sharding_management_url": "https://u:hunter2@h"}))
