"""One `docker compose` project of docker-compose.yml, with passwords, ports, networks and volumes of its own."""

from __future__ import annotations

import json
import re
import subprocess
import uuid
from base64 import b64encode
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from celery_sharding.testing.processes import find_free_port
from support.compose.engine import run_docker
from support.paths import ROOT

CLUSTER = "deploy/compose/cluster.yml"
_PORTS = ("RABBITMQ_PORT", "FLOWER_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")
_UP_SECONDS = 600


class Stack:
    """The project, from its first `up` on.

    As a context manager it is taken down, volumes and all, on exit.

    Args:
        folder: Where its passwords are kept.
        files: Further compose files, relative to the root.
    """

    def __init__(self, folder: Path, *files: str) -> None:
        env_file = folder / "env"
        subprocess.run([ROOT / "deploy" / "compose" / "make-env", env_file], check=True)
        self._ports = {name: find_free_port() for name in _PORTS}
        with env_file.open("a") as env:
            env.writelines(f"{name}={port}\n" for name, port in self._ports.items())
        self._passwords = dict(line.split("=", 1) for line in env_file.read_text().splitlines())
        self._project = f"sharding-test-{uuid.uuid4().hex[:8]}"
        self._options = ["--project-name", self._project, "--env-file", str(env_file)]
        for file in ("docker-compose.yml", *files):
            self._options += ["--file", file]

    def compose(self, *arguments: str, timeout_seconds: float = 300.0) -> str:
        """Run `docker compose` and return what it prints.

        Raises:
            AssertionError: It failed.
        """
        return run_docker("compose", *self._options, *arguments, timeout_seconds=timeout_seconds)

    def up(self, *services: str) -> None:
        """Start what does not run, and return when everything is healthy.

        Raises:
            AssertionError: Something is not; the message has the ends of all logs.
        """
        waiting = ["--no-build", "--wait", "--wait-timeout", str(_UP_SECONDS)]
        try:
            self.compose("up", "--detach", *waiting, *services, timeout_seconds=_UP_SECONDS + 60)
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n{self.compose('ps', '--all')}\n{self.logs()}") from exc

    def exec(self, service: str, *command: str) -> str:
        """Run a command in a container that runs."""
        return self.compose("exec", "--no-TTY", service, *command)

    def run(self, *command: str) -> str:
        """Run a command in a container of its own."""
        return self.compose("run", "--rm", "--no-TTY", "shop", *command)

    def start_sending(self, events: int) -> subprocess.Popen[str]:
        """Start to send events, as fast as the example does."""
        command = ["run", "--rm", "--no-TTY", "shop", "python", "orders.py", "send", str(events)]
        return subprocess.Popen(
            ["docker", "compose", *self._options, *command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def logs(self) -> str:
        return self.compose("logs", "--no-color", "--tail", "60")

    def exit_codes(self, service: str) -> dict[str, int]:
        """Return the containers of a service that have ended, by id, with what they ended with."""
        ids = self.compose("ps", "--all", "--quiet", "--status", "exited", service).split()
        return {
            container[:12]: int(run_docker("inspect", "--format", "{{.State.ExitCode}}", container))
            for container in ids
        }

    def owners_by_command(self) -> list[str | None]:
        """Return the owner of each shard, as the command line in a container says."""
        return _owners(json.loads(self.exec("flower", "celery", "-A", "shop", "shards", "status", "--json")))

    def owners_by_api(self) -> list[str | None]:
        """Return the owner of each shard, as the API of Flower's page says."""
        return _owners(json.loads(self.ask_flower("/api/shards")))

    def owners_by_prometheus(self) -> list[str | None]:
        """Return the owner of each shard, as Prometheus has it."""
        query = urlencode({"query": "celery_sharding_owner_info"})
        with urlopen(f"http://127.0.0.1:{self._ports['PROMETHEUS_PORT']}/api/v1/query?{query}", timeout=30) as answer:
            found = [sample["metric"] for sample in json.load(answer)["data"]["result"]]
        return [labels["worker"] for labels in sorted(found, key=lambda labels: int(labels["shard"]))]

    def count_done(self) -> float:
        """Return how many tasks were done, as the metrics on Flower's port say."""
        counts = re.findall(r"^celery_sharding_done_total{.*} (\S+)$", self.ask_flower("/metrics"), re.MULTILINE)
        return sum(map(float, counts))

    def ask_flower(self, path: str) -> str:
        login = f"admin:{self._passwords['FLOWER_PASSWORD']}".encode()
        headers = {"Authorization": f"Basic {b64encode(login).decode()}"}
        with urlopen(Request(f"{self.flower_url}{path}", headers=headers), timeout=30) as answer:
            return str(answer.read().decode())

    @property
    def flower_url(self) -> str:
        return f"http://127.0.0.1:{self._ports['FLOWER_PORT']}"

    @property
    def flower_url_with_login(self) -> str:
        return self.flower_url.replace("//", f"//admin:{self._passwords['FLOWER_PASSWORD']}@")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.compose("--profile", "*", "down", "--volumes", "--timeout", "60")


def _owners(snapshot: dict[str, Any]) -> list[str | None]:
    return [shard["owner"] for group in snapshot["groups"] for shard in group["shards"]]
