"""The field of one soak: its groups, and behind a link each, its workers and publishers. They are ended with it.

A field is used from several threads: each worker and publisher by one fault at a time, which the plan sees to.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from amqp import Message
from amqp.exceptions import AMQPError
from kombu.exceptions import OperationalError

from celery_sharding.errors import ShardingError
from celery_sharding.layout.cleanup import delete_group
from celery_sharding.layout.ensure import find_fault
from celery_sharding.layout.manifest import load
from celery_sharding.testing import Trace, WorkerNode
from celery_sharding.testing.processes import wait_until
from celery_sharding.topology import Names
from celery_sharding.wire import DEAD_AT_HEADER, REASON_HEADER
from soak.plan import GROUPS
from soak.servers import Link, Servers
from soak.verdict import Letter, Note
from support.paths import TESTS, python_path

POOL_PROCESSES = 4
_RESHARD_SECONDS = 90.0
# Publishers need none, whatever happens to that of the workers.
_NO_BACKEND = "disabled://"


class Party:
    """A worker, and its links to the broker and to the result backend."""

    def __init__(self, name: str, link: Link, backend: Link, node: WorkerNode) -> None:
        self.name = name
        self.link = link
        self.backend = backend
        self.node = node
        self.should_run = True


class Field:
    """One soak's groups, workers and publishers.

    As a context manager it has nothing running on entry, and ends and removes everything on exit.
    """

    def __init__(self, servers: Servers, folder: Path) -> None:
        self.servers = servers
        self.folder = folder
        self.name = f"soak{uuid.uuid4().hex[:8]}"
        self.traces = {group: Trace(folder / f"{group}.trace") for group in GROUPS}
        self.workers: dict[str, Party] = {}
        self.publisher_links: dict[str, Link] = {}
        self.publishers: list[subprocess.Popen[bytes]] = []
        self._shards: dict[str, int] = {}
        self._lock = threading.Lock()
        self._noted: Counter[Path] = Counter()
        self._confirmed = 0

    def group(self, name: str) -> str:
        return f"{self.name}-{name}"

    def names(self, group: str) -> Names:
        return Names(self.group(group))

    def add_worker(self, name: str) -> Party:
        """Start a worker, without waiting for it."""
        link = Link(self.servers.broker_url, first=int(name[1:]))
        backend = Link(self.servers.redis.url)
        groups = ",".join(self.group(group) for group in GROUPS)
        node = WorkerNode(
            "soak.shop",
            f"{name}@{self.name}",
            ["-c", str(POOL_PROCESSES), "-Q", groups, "--without-mingle"],
            env=self._env(link, backend.url) | {"SOAK_WORKER": name},
            folder=self.folder,
        )
        party = Party(name, link, backend, node)
        with self._lock:
            self.workers[name] = party
        node.start(wait_seconds=0)
        return party

    def start_publishers(self, count: int, *, rate: float, seconds: float) -> None:
        """Start publishers that publish for some seconds each, without waiting for them."""
        for number in range(1, count + 1):
            link = self.publisher_links[f"p{number}"] = Link(self.servers.broker_url, first=number)
            command = [
                sys.executable, "-m", "soak.publisher", "--number", str(number), "--publishers", str(count),
                "--rate", str(rate), "--seconds", str(seconds), "--notes", str(self.folder / f"p{number}.notes"),
            ]  # fmt: skip
            with (self.folder / f"p{number}.log").open("ab") as log:
                self.publishers.append(
                    subprocess.Popen(
                        command,
                        env=os.environ | self._env(link, _NO_BACKEND),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                    )
                )

    def wait_for_workers(self, *, timeout_seconds: float) -> bool:
        """Wait until all workers are ready; False if that takes too long."""
        return wait_until(
            lambda: all(" ready." in party.node.output for party in self.workers.values()),
            timeout_seconds=timeout_seconds,
        )

    def reshard(self, group: str, shards: int, *, dies_after: int | None) -> str | None:
        """Give a group that many shards, or another number if it has as many; return what was wrong."""
        command = [
            sys.executable, "-m", "soak.resharder", "--broker", self.servers.broker_url, "--group", self.group(group),
            "--shards", str(shards), "--seconds", str(_RESHARD_SECONDS),
        ]  # fmt: skip
        if dies_after is not None:
            command += ["--dies-after", str(dies_after)]
        env = os.environ | {"PYTHONPATH": python_path(TESTS)}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode == (0 if dies_after is None else -signal.SIGKILL):
            self._shards[group] = int(done.stdout)
            return None
        return f"{group} could not be resharded: status {done.returncode}, {done.stderr.strip()[-1000:]}"

    def find_trouble(self, group: str) -> str | None:
        """Return what keeps a group from being live, with its shards, in its last segment only; None if nothing."""
        names = self.names(group)
        try:
            with self.servers.connected() as connection:
                layout = load(connection, names)
                fault = find_fault(connection, names, layout)
        except (OSError, AMQPError, OperationalError, ShardingError) as error:
            return f"{type(error).__name__}: {error}"
        if fault is None and layout.shards != self._shards.get(group, layout.shards):
            fault = f"it has {layout.shards} shards, and was given {self._shards[group]}"
        if fault is None and len(layout.open_segments) > 1:
            fault = f"{', '.join(segment.name for segment in layout.open_segments[:-1])} are not drained"
        return fault

    def read_notes(self) -> Iterator[Note]:
        """Return what the publishers have noted so far."""
        for path in sorted(self.folder.glob("p*.notes")):
            with path.open() as file:
                for line in file:
                    if line.endswith("\n"):
                        yield Note(*json.loads(line)[:5])

    def count_confirmed(self) -> int:
        """Return how many publishes were confirmed so far. Goes on where it ended: it is asked again and again."""
        for path in self.folder.glob("p*.notes"):
            with path.open("rb") as file:
                file.seek(self._noted[path])
                for line in file:
                    if line.endswith(b"\n"):
                        self._noted[path] += len(line)
                        self._confirmed += line.startswith(b'["confirmed"')
        return self._confirmed

    def take_dead_letters(self) -> list[Letter]:
        """Take the dead letters of all groups out of their queues."""
        found = []
        with self.servers.connected() as connection:
            for group in GROUPS:
                channel = connection.channel()
                while (message := channel.basic_get(self.names(group).dead, no_ack=True)) is not None:
                    found.append(_read_letter(group, message))
                channel.close()
        return found

    def _env(self, link: Link, backend: str) -> dict[str, str]:
        return {
            "SOAK_NAME": self.name,
            "SOAK_FOLDER": str(self.folder),
            "SOAK_BROKER": link.url,
            "SOAK_BACKEND": backend,
            "PYTHONPATH": python_path(TESTS),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for publisher in self.publishers:
            publisher.kill()
            publisher.wait()
        with self._lock:
            parties = list(self.workers.values())
        for party in parties:
            party.node.kill()
        links = [link for party in parties for link in (party.link, party.backend)]
        for link in [*self.publisher_links.values(), *links]:
            link.close()
        with self.servers.connected() as connection:
            for group in GROUPS:
                delete_group(connection, self.group(group))


def _read_letter(group: str, message: Message) -> Letter:
    """Return whose letter it is, as far as it can be read, and why it died."""
    try:
        kwargs = json.loads(message.body)[1]
        key, number = str(kwargs["key"]), int(kwargs["number"])
    except (ValueError, LookupError, TypeError):
        key, number = "", -1
    headers = message.headers
    return Letter(
        group, key, number, f"{group}: {headers}", str(headers[REASON_HEADER]), float(headers[DEAD_AT_HEADER])
    )
