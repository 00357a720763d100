"""How Erlang nodes find and trust each other: by a port mapper (epmd) and a cookie, which a cluster's nodes share."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from celery_sharding.testing.processes import (
    end_process,
    exchange_bytes,
    find_program,
    read_pid,
    spawn,
    wait_until,
)

# Nodes get only the path from the caller's environment.
BARE_ENV = {"PATH": os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/bin", "/sbin", "/bin"])}


class PortMapper:
    """The Erlang port mapper (epmd) of one node, or of all nodes of a cluster. Its process id is in `folder`."""

    def __init__(self, folder: Path, port: int) -> None:
        self.port = port
        self._folder = folder

    def start(self) -> None:
        """Start it unless it runs; in the foreground, as otherwise its process id would be unknown."""
        if read_pid(self._folder, "epmd") is not None:
            return
        spawn(
            self._folder, "epmd", [find_program("epmd"), "-address", "127.0.0.1", "-port", str(self.port)], env=BARE_ENV
        )
        wait_until(lambda: exchange_bytes(self.port, b"\x00\x01n") != b"", timeout_seconds=10)

    def stop(self) -> None:
        pid = read_pid(self._folder, "epmd")
        if pid is not None:
            end_process(pid, grace_seconds=5)


def make_cookie() -> str:
    return secrets.token_hex(10).upper()
