"""The field of one soak: its groups, and behind a proxy each, its workers and publishers. They are ended with it.

A field is used from several threads: each worker and publisher by one fault at a time, which the plan sees to.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from kombu import Connection

from celery_sharding.admin.removal import delete_group
from celery_sharding.testing import FaultProxy, RabbitNode, Trace, WorkerNode
from celery_sharding.testing.processes import wait_until
from celery_sharding.topology import Names
from soak.plan import GROUPS, Kind
from soak.verdict import Note

TESTS = Path(__file__).resolve().parents[1]
POOL_PROCESSES = 4


@dataclass(frozen=True, slots=True)
class Servers:
    """What a soak runs on.

    Args:
        restart_command: Restarts the broker and returns when it answers again; None if nobody may.
        broker_folder: Of a node of our own, which may be killed.
    """

    broker_url: str
    redis_url: str
    restart_command: str | None = None
    broker_folder: Path | None = None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The faults that can be injected here."""
        missing = set()
        if self.restart_command is None:
            missing.add(Kind.RESTART_BROKER)
        if self.broker_folder is None:
            missing.add(Kind.KILL_BROKER)
        return tuple(kind for kind in Kind if kind not in missing)

    def restart_broker(self) -> None:
        subprocess.run(self.restart_command or "false", shell=True, check=True, stdout=subprocess.DEVNULL)

    def kill_broker(self) -> RabbitNode:
        """Kill the broker, which has written down what it knows; return the node, to be started."""
        node = RabbitNode.open(self.broker_folder or Path())
        # What was declared lately is with a broker of 3.10 not on disk for minutes, so a queue, with what it was
        # confirmed, would be gone for good. That is not what is tested here.
        program = (
            "spawn(fun() -> timer:sleep(20), [dets:sync(Table) || Table <- dets:all()], catch mnesia:sync_log(), "
            'os:cmd("kill -9 " ++ os:getpid()) end).'
        )
        node.ctl("eval", program)
        wait_until(lambda: not node.answers(), timeout_seconds=10)
        node.kill()
        return node


class Party:
    """A worker, and the proxy that it has its broker behind."""

    def __init__(self, name: str, proxy: FaultProxy, node: WorkerNode) -> None:
        self.name = name
        self.proxy = proxy
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
        self.publisher_proxies: dict[str, FaultProxy] = {}
        self.publishers: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._noted: Counter[Path] = Counter()
        self._confirmed = 0

    def group(self, name: str) -> str:
        return f"{self.name}-{name}"

    def names(self, group: str) -> Names:
        return Names(self.group(group))

    def add_worker(self, name: str) -> Party:
        """Start a worker, without waiting for it."""
        proxy = FaultProxy(self.servers.broker_url).__enter__()
        groups = ",".join(self.group(group) for group in GROUPS)
        node = WorkerNode(
            "soak.shop",
            f"{name}@{self.name}",
            ["-c", str(POOL_PROCESSES), "-Q", groups, "--without-mingle"],
            env=self._env(proxy) | {"SOAK_WORKER": name},
            folder=self.folder,
        )
        party = Party(name, proxy, node)
        with self._lock:
            self.workers[name] = party
        node.start(wait_seconds=0)
        return party

    def start_publishers(self, count: int, *, rate: float, until: float) -> None:
        for number in range(1, count + 1):
            proxy = self.publisher_proxies[f"p{number}"] = FaultProxy(self.servers.broker_url).__enter__()
            command = [
                sys.executable, "-m", "soak.publisher", "--number", str(number), "--publishers", str(count),
                "--rate", str(rate), "--until", str(until), "--notes", str(self.folder / f"p{number}.notes"),
            ]  # fmt: skip
            with (self.folder / f"p{number}.log").open("ab") as log:
                self.publishers.append(
                    subprocess.Popen(
                        command, env=os.environ | self._env(proxy), stdin=subprocess.DEVNULL, stdout=log, stderr=log
                    )
                )

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

    def take_dead_letters(self) -> list[str]:
        """Take the dead letters of all groups out of their queues, and return them in words."""
        found = []
        with Connection(self.servers.broker_url) as connection:
            for group in GROUPS:
                channel = connection.channel()
                while (message := channel.basic_get(self.names(group).dead, no_ack=True)) is not None:
                    found.append(f"{group}: {message.headers}")
                channel.close()
        return found

    def _env(self, proxy: FaultProxy) -> dict[str, str]:
        return {
            "SOAK_NAME": self.name,
            "SOAK_FOLDER": str(self.folder),
            "SOAK_BROKER": proxy.url,
            "SOAK_BACKEND": self.servers.redis_url,
            "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
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
        for proxy in [*self.publisher_proxies.values(), *(party.proxy for party in parties)]:
            proxy.close()
        with Connection(self.servers.broker_url) as connection:
            for group in GROUPS:
                delete_group(connection, self.group(group))
