"""A private Redis node: started, killed, restarted and removed, without touching any other server.

It listens on a free port of 127.0.0.1 only, and never starts or stops a service of the system. It runs as whoever
starts it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from celery_sharding.testing.node import ServerNode
from celery_sharding.testing.processes import (
    ServerNotReady,
    exchange_bytes,
    find_free_port,
    find_program,
    spawn,
    wait_until,
)


class RedisNode(ServerNode):
    """A private Redis (or Valkey) node that keeps nothing on disk; restarted, it is empty.

    As a context manager it is started on entry and removed on exit.

    Args:
        keeps_data: Write everything to disk before the answer, and load it at a restart.
    """

    process_name = "redis"

    def __init__(self, *, keeps_data: bool = False) -> None:
        self._keeps_data = keeps_data
        self.folder = Path(tempfile.mkdtemp(prefix="sharding-redis-"))
        (self.folder / "log").mkdir()
        self._port = find_free_port()
        self.url = f"redis://127.0.0.1:{self._port}/0"

    def start(self) -> None:
        """Start the node and return when it answers. A running node is left alone.

        Raises:
            ServerMissing: There is neither redis-server nor valkey-server.
            ServerNotReady: It does not answer; the log's last lines are in the message.
        """
        if self.answers():
            return
        command = [
            find_program("redis-server", "valkey-server"), "--bind", "127.0.0.1", "--port", str(self._port),
            "--dir", str(self.folder), "--save", "", "--appendonly", "yes" if self._keeps_data else "no",
            "--appendfsync", "always", "--daemonize", "no",
        ]  # fmt: skip
        spawn(self.folder, self.process_name, command, env=os.environ)
        if not wait_until(self.answers, timeout_seconds=20):
            raise ServerNotReady(f"Redis does not answer on {self.url}\n{self.log_tail()}")

    def answers(self) -> bool:
        return exchange_bytes(self._port, b"PING\r\n").startswith(b"+PONG")
