"""Passwords of the broker, its management API and the result backend: in no output and no log, whatever goes wrong."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import pytest
import redis
from celery import Celery

from celery_sharding import ShardGroup, Sharding, deduplicate
from celery_sharding.cli import shards
from celery_sharding.operations.permissions import Permissions
from celery_sharding.testing import WorkerNode
from support.commands import call_shards
from support.paths import python_path
from support.virtual_hosts import VirtualHost

pytestmark = pytest.mark.timeout(150)

SECRET = "hunter2hunter2"
# What a verb is given beside nothing at all, so that it gets as far as the broker or the store.
ARGUMENTS = {
    "describe": ["orders/0"],
    "locate": ["orders", "a"],
    "export": ["--format=operator", "--user=worker=w"],
    "pause": ["orders/1"],
    "resume": ["orders/1"],
    "dead-letters show": ["orders", "0123456789"],
    "dead-letters replay": ["orders", "--all", "--yes"],
    "dead-letters discard": ["orders", "--all", "--yes"],
    "purge": ["orders", "--yes"],
    "remove": ["orders", "--yes"],
    "dedup show": ["a"],
    "dedup forget": ["a", "--yes"],
}
APP = """
import os
from celery import Celery
from celery_sharding import ShardGroup, Sharding, deduplicate

app = Celery("secretive", broker=os.environ["SECRET_BROKER"], backend=os.environ["SECRET_BACKEND"])
app.conf.sharding_management_url = os.environ["SECRET_MANAGEMENT"]
app.conf.task_default_queue = "orders-plain"
Sharding(app, groups=[ShardGroup("orders", shards=2)])

@app.task(shard_group="orders", shard_key="key")
@deduplicate(key="key")
def pay(key):
    return key
"""


def verbs(group: click.Group = shards, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield every verb of the command line that comes to an end by itself."""
    for name, command in group.commands.items():
        if name in ("flower", "exporter"):
            continue
        if isinstance(command, click.Group):
            yield from verbs(command, (*prefix, name))
        else:
            yield (*prefix, name)


class Places:
    """A user on the broker and one in Redis, both with the secret for a password."""

    def __init__(self, host: VirtualHost, management_url: str, redis_url: str) -> None:
        user = host.add_user("secretive")
        host.call("PUT", f"/api/users/{user}", {"password": SECRET, "tags": "monitoring"})
        host.permit(user, Permissions(".*", ".*", ".*"))
        at = urlsplit(redis_url).netloc
        api = management_url.partition("//")[2]
        broker, api, backend = (
            host.url(user, SECRET),
            f"http://{user}:{SECRET}@{api}",
            f"redis://{user}:{SECRET}@{at}/0",
        )
        # What all of them are, and then what two of them are while the broker lets us in.
        refused = tuple(url.replace(SECRET, f"{SECRET}x") for url in (broker, api, backend))
        nobody = tuple(f"{kind}://{user}:{SECRET}@127.0.0.1:1/" for kind in ("amqp", "http", "redis"))
        unreadable = tuple(f"{kind}://{user}:{SECRET}/a@127.0.0.1:1/" for kind in ("amqp", "redis"))
        self.urls = {
            "good": (broker, api, backend),
            "refused": refused,
            "nobody there": nobody,
            "unreadable": (unreadable[0], api, unreadable[1]),
            "others refused": (broker, *refused[1:]),
            "others not there": (broker, *nobody[1:]),
            "others unreadable": (broker, api, unreadable[1]),
        }
        self.redis_user = user

    def app(self, case: str) -> Celery:
        broker, management, backend = self.urls[case]
        app = Celery("secretive", broker=broker, backend=backend, set_as_current=False)
        app.conf.sharding_management_url = management
        Sharding(app, groups=[ShardGroup("orders", shards=2)])

        @app.task(name="pay", shared=False, shard_group="orders", shard_key="key")
        @deduplicate(key="key")
        def pay(key: str) -> str:
            return key

        return app


@pytest.fixture
def places(virtual_host: VirtualHost, management_url: str, redis_url: str) -> Iterator[Places]:
    places = Places(virtual_host, management_url, redis_url)
    client = redis.Redis.from_url(redis_url)
    client.acl_setuser(
        places.redis_user, enabled=True, passwords=[f"+{SECRET}"], keys="*", channels="*", categories=["+@all"]
    )
    yield places
    client.acl_deluser(places.redis_user)
    client.close()


def test_no_verb_shows_a_password_whatever_goes_wrong(places, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    exits: dict[str, dict[str, int]] = {}
    for case in places.urls:
        for verb in [("declare",), *verbs()]:
            name = " ".join(verb)
            done = call_shards(places.app(case), *verb, *ARGUMENTS.get(name, []))
            exits.setdefault(case, {})[name] = done.exit_code
            shown = done.output + caplog.text + "".join(capfd.readouterr())
            assert SECRET not in shown, (case, name, shown)
            assert "Traceback" not in done.output, (case, name, done.output)
            assert done.exit_code == 0 or len(done.stderr.strip().splitlines()) <= 3, (case, name, done.stderr)
            caplog.clear()
    assert exits["good"]["status"] == exits["good"]["locate"] == exits["good"]["declare"] == 0
    for case in ("refused", "nobody there"):
        for name in ("status", "describe", "declare", "locate", "doctor", "dedup show"):
            assert exits[case][name] == 69, (case, name)
    assert exits["unreadable"]["status"] == 2
    assert exits["others refused"]["status"] == 0
    assert {exits[case]["doctor"] for case in exits if case.startswith("others")} == {1}


def test_a_worker_logs_no_password_whether_it_is_let_in_or_not(places, tmp_path: Path):
    (tmp_path / "secretive.py").write_text(APP)

    def start(case: str, urls: tuple[str, str, str], waits_for: str) -> WorkerNode:
        broker, management, backend = urls
        env = {"SECRET_BROKER": broker, "SECRET_MANAGEMENT": management, "SECRET_BACKEND": backend}
        path = python_path(tmp_path)
        arguments = ("-l", "debug", "-c", "1", "--without-mingle")
        node = WorkerNode("secretive", f"{case}@test", arguments, env={**env, "PYTHONPATH": path}, folder=tmp_path)
        nodes.append(node.start(wait_seconds=0))
        node.wait_for(waits_for)
        return node

    nodes: list[WorkerNode] = []
    try:
        start("good", places.urls["good"], " ready.").stop()
        start("refused", places.urls["refused"], "claims cannot be written")
        # and where only the broker lets nobody in
        start("locked-out", (*places.urls["refused"][:2], places.urls["good"][2]), "ACCESS_REFUSED")
    finally:
        for node in nodes:
            node.kill()
    logs: dict[str, Any] = {node.name: node.output for node in nodes}
    assert all(SECRET not in text for text in logs.values()), logs


NAMESPACED = """
import os
from celery import Celery
from celery_sharding import ShardGroup, Sharding

class Settings:
    CELERY_SHARDING_MANAGEMENT_URL = os.environ["SECRET_MANAGEMENT"]
    CELERY_SHARDING_GROUPS = {"orders": {"shards": 2}}

app = Celery("secretive", broker=os.environ["SECRET_BROKER"], backend=os.environ["SECRET_BACKEND"])
Sharding(app)
app.config_from_object(Settings, namespace="CELERY")
app.conf.task_default_queue = "orders-plain"
"""


@pytest.mark.parametrize("module", [APP, NAMESPACED], ids=["plain", "namespaced"])
def test_what_shows_the_configuration_shows_no_password(places, tmp_path: Path, module: str):
    # Given a worker of an app with a password in the URL of the management API
    (tmp_path / "secretive.py").write_text(module)
    broker, management, backend = places.urls["good"]
    env = {"SECRET_BROKER": broker, "SECRET_MANAGEMENT": management, "SECRET_BACKEND": backend}
    env["PYTHONPATH"] = python_path(tmp_path)
    host = urlsplit(management).hostname
    arguments = ("-P", "solo", "--without-mingle")
    with WorkerNode("secretive", "shown@test", arguments, env=env, folder=tmp_path):
        # When it, or the app, is asked for its configuration, then the host is shown, and the password is not
        for command in (
            ["report"],
            ["inspect", "-t", "6", "conf"],
            ["inspect", "-t", "6", "conf", "true"],
            ["inspect", "-t", "6", "report"],
        ):
            done = subprocess.run(
                [sys.executable, "-m", "celery", "-A", "secretive", *command],
                env={**os.environ, **env},
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
            )
            assert SECRET not in done.stdout + done.stderr, command
            [line] = [line for line in done.stdout.splitlines() if "sharding_management_url" in line.lower()]
            assert f"********@{host}" in line, (command, line)
