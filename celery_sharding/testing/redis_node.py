"""A private Redis node: started, killed, restarted and removed, without touching any other server.

It listens on a free port of 127.0.0.1 only, and never starts or stops a service of the system. It runs as whoever
starts it; only the process that did so can drive it.

    new ─start─▶ running ─stop | kill─▶ stopped ─start─▶ running, empty unless it keeps its data … ─remove─▶ gone
                 running ─pause─▶ connected, and silent ─resume─▶ running
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from celery_sharding.testing.node import Node
from celery_sharding.testing.processes import (
    ServerNotReady,
    exchange_bytes,
    find_free_port,
    find_program,
    tail,
    wait_until,
)


class RedisNode(Node):
    """A private Redis (or Valkey) node that keeps nothing on disk; restarted, it is empty.

    As a context manager it is started on entry and removed on exit.

    Args:
        keeps_data: Write everything to disk before it is answered, and have it again after a restart.
    """

    def __init__(self, *, keeps_data: bool = False) -> None:
        self._keeps_data = keeps_data
        self.folder = Path(tempfile.mkdtemp(prefix="sharding-redis-"))
        self._port = find_free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"redis://127.0.0.1:{self._port}/0"

    def start(self) -> None:
        """Start the node and return when it answers. A running node is left alone.

        Raises:
            ServerMissing: There is neither redis-server nor valkey-server.
            ServerNotReady: It does not answer; the log's last lines are in the message.
        """
        if self.answers():
            return
        log = self.folder / "log"
        self._process = subprocess.Popen(
            [
                find_program("redis-server", "valkey-server"), "--bind", "127.0.0.1", "--port", str(self._port),
                "--dir", str(self.folder), "--logfile", str(log), "--save", "",
                "--appendonly", "yes" if self._keeps_data else "no", "--appendfsync", "always", "--daemonize", "no",
            ],
            start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if not wait_until(self.answers, timeout_seconds=20):
            raise ServerNotReady(f"Redis does not answer on {self.url}\n{tail(log)}")

    def stop(self) -> None:
        """Stop the node."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def kill(self) -> None:
        """Kill the node (SIGKILL)."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Let the node stand still, with its connections open (SIGSTOP)."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused node go on."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def restart(self) -> None:
        """Stop the node, start it on the same port, and return when it answers."""
        self.stop()
        self.start()

    def remove(self) -> None:
        """Kill the node if it runs, and delete its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def answers(self) -> bool:
        """Say whether the node takes commands."""
        return exchange_bytes(self._port, b"PING\r\n").startswith(b"+PONG")

    @property
    def output(self) -> str:
        """What it has logged."""
        log = self.folder / "log"
        return log.read_text(errors="replace") if log.exists() else ""
