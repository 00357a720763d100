"""Flower with the page of shards as a real process, and an app to show."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from celery import Celery

from celery_sharding import ShardGroup, Sharding
from celery_sharding.testing import WorkerNode
from celery_sharding.testing.processes import find_free_port, tail, wait_until
from support.paths import python_path

# Made by scripts/make_venv: the oldest Flower that is supported.
OLD_FLOWER = Path(sys.prefix) / "flower-2.0"
APP = """
import os, time
from celery import Celery
from celery_sharding import ShardGroup, Sharding

GROUP = os.environ["SHOW_GROUP"]
app = Celery("show", broker=os.environ["SHOW_BROKER"])
app.conf.update(
    task_default_queue=GROUP + "-plain", broker_connection_retry_on_startup=True, worker_send_task_events=True,
    worker_prefetch_multiplier=1,
)
OTHER = os.environ["SHOW_OTHER"]
groups = [ShardGroup(GROUP, shards=8, on_failure="dead-letter")] + ([ShardGroup(OTHER, shards=2)] if OTHER else [])
Sharding(app, groups=groups)

@app.task(shard_group=GROUP, shard_key="key", ignore_result=True)
def nap(key, seconds):
    time.sleep(seconds)

@app.task(shard_group=GROUP, shard_key="key", ignore_result=True)
def fail(key):
    raise ValueError(key)
"""


class _StayHere(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow nobody: the answer is that one is sent elsewhere."""


_OPENER = urllib.request.build_opener(_StayHere)


class Show:
    """A group that is consumed and published to, and beside it another that was never declared.

    Args:
        folder: Where the app and the logs go.
        other_group: None: the name of the first with "-b" behind it; "": there is no other.
    """

    def __init__(self, group: str, broker_url: str, folder: Path, *, other_group: str | None = None) -> None:
        self.group, self.folder, self.broker_url = group, folder, broker_url
        (folder / "show.py").write_text(APP)
        path = python_path(folder)
        other = f"{group}-b" if other_group is None else other_group
        self.env = {"SHOW_GROUP": group, "SHOW_OTHER": other, "SHOW_BROKER": broker_url, "PYTHONPATH": path}
        self.workers: list[WorkerNode] = []
        self._app = Celery("publisher", broker=broker_url, set_as_current=False)
        self._app.conf.sharding_routes = {"show.*": {"group": group, "key": "key"}}
        Sharding(self._app, groups=[ShardGroup(group, shards=8)])

    def worker(self, name: str = "") -> WorkerNode:
        """Start a worker of the group."""
        name = name or f"w{len(self.workers)}-{uuid.uuid4().hex[:4]}@test"
        arguments = ("-c", "2", "-Q", self.group)
        self.workers.append(WorkerNode("show", name, arguments, env=self.env, folder=self.folder))
        return self.workers[-1].start()

    def kill_workers(self) -> None:
        for worker in self.workers:
            worker.kill()

    def publish(self, task: str, key: str, **facts: Any) -> str:
        """Publish a task, and return its id."""
        return str(self._app.send_task(f"show.{task}", kwargs={"key": key, **facts}).id)

    def celery(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `celery -A show …` to its end."""
        command = [sys.executable, "-m", "celery", "-A", "show", *arguments]
        full = {**os.environ, **self.env, **env}
        return subprocess.run(command, cwd=self.folder, env=full, capture_output=True, text=True, timeout=60)

    def old_flower(self) -> dict[str, str]:
        """Return the variables with which the oldest supported Flower is found first."""
        return {"PYTHONPATH": f"{OLD_FLOWER}{os.pathsep}{self.env['PYTHONPATH']}"}


@dataclass(frozen=True, slots=True)
class Answer:
    """What Flower answered."""

    status: int
    text: str
    headers: Mapping[str, str]


class FlowerServer:
    """A Flower process on a free port of 127.0.0.1.

    Args:
        command: What follows `celery -A show`: `shards flower` or `flower`.
        options: Of Flower.
        env: Added to the environment.
        folder: Where it runs, and its log goes.
        user: Whose name and password requests carry, as `name:password`; None: nobody's.
    """

    def __init__(
        self,
        command: str,
        options: Sequence[str] = (),
        *,
        env: Mapping[str, str],
        folder: Path,
        user: str | None = None,
        prefix: str = "",
    ) -> None:
        self.port = find_free_port()
        self.url = f"http://127.0.0.1:{self.port}{prefix}"
        self.user = user
        self.log = folder / f"flower-{self.port}.log"
        self._command = [sys.executable, "-m", "celery", "-A", "show", *command.split()]
        self._command += [f"--port={self.port}", "--address=127.0.0.1", *options]
        self._env = {**os.environ, **env}
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_until(lambda: self._answers() or not self.is_running, timeout_seconds=40)
        assert self._answers(), tail(self.log, lines=40)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> int:
        """Ask it to end, and return its exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(30)

    def ask(
        self, path: str, *, method: str = "GET", body: str | None = None, user: str | None = "", **headers: str
    ) -> Answer:
        """Send a request as `self.user`, or as another or nobody (None); "_" in names of headers stands for "-"."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        user = self.user if user == "" else user
        if user is not None:
            given["Authorization"] = f"Basic {b64encode(user.encode()).decode()}"
        data = body.encode() if body is not None else b"" if method == "POST" else None
        request = urllib.request.Request(f"{self.url}{path}", method=method, data=data, headers=given)
        try:
            with _OPENER.open(request, timeout=60) as answer:
                return Answer(answer.status, answer.read().decode(), dict(answer.headers))
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.read().decode(), dict(error.headers))

    def act(self, path: str, *, body: str | None = None, user: str | None = "", **headers: str) -> Answer:
        """Post as a program that knows what is asked of it."""
        return self.ask(path, method="POST", body=body, user=user, X_Requested_By="test", **headers)

    def _answers(self) -> bool:
        try:
            return self.ask("/healthcheck").status == 200
        except OSError:
            return False
