"""Ports and processes of private servers: find a free port, wait for an answer, end exactly what was started.

A process is ended by its id only, and counts as ended when it is gone or a zombie.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

# Below the range of outgoing connections on Linux: a port must still be free when its server restarts.
_PORTS = range(20_000, 32_000)
_POLL_SECONDS = 0.05


class ServerMissing(RuntimeError):
    """A server is not installed; the message names its package."""


class ServerNotReady(RuntimeError):
    """A server did not answer in time; the message ends with the last lines of its log."""


def find_free_port() -> int:
    """Return a free port of 127.0.0.1. Another process may still take it first."""
    for _ in range(200):
        port = random.choice(_PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise ServerNotReady("no free port found on 127.0.0.1")


def exchange_bytes(port: int, request: bytes, *, timeout_seconds: float = 2.0) -> bytes:
    """Send `request` to a port of 127.0.0.1 and return the first bytes of the answer, b"" if there is none."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=timeout_seconds) as link:
            link.sendall(request)
            return link.recv(64)
    except OSError:
        return b""


def is_alive(pid: int) -> bool:
    """Say whether `pid` still runs. A zombie does not."""
    with suppress(OSError, IndexError):
        # Our own children must be collected, or they stay zombies.
        os.waitpid(pid, os.WNOHANG)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def wait_until(condition: Callable[[], bool], *, timeout_seconds: float) -> bool:
    """Poll `condition`: return True as soon as it holds, False after `timeout_seconds`."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def end_process(pid: int, *, grace_seconds: float) -> None:
    """Ask `pid` to end, and kill it if it still runs after `grace_seconds`. It may be gone already."""
    if send_signal(pid, signal.SIGTERM) and not wait_until(lambda: not is_alive(pid), timeout_seconds=grace_seconds):
        kill_process(pid)


def kill_process(pid: int) -> None:
    """Kill `pid` at once (SIGKILL) and wait until it is gone."""
    if send_signal(pid, signal.SIGKILL):
        wait_until(lambda: not is_alive(pid), timeout_seconds=10)


def send_signal(pid: int, number: int) -> bool:
    """Send a signal to `pid`; False if it is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def spawn(folder: Path, name: str, command: list[str], *, env: Mapping[str, str]) -> None:
    """Start `command` in a session of its own, with its log in `FOLDER/log/NAME` and its id in `FOLDER/NAME.pid`."""
    with (folder / "log" / name).open("ab") as log:
        process = subprocess.Popen(
            command, env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    (folder / f"{name}.pid").write_text(str(process.pid))
    # The noted id is enough to end it; without this, the Popen object would warn that its process still runs.
    process.returncode = 0


def read_pid(folder: Path, name: str) -> int | None:
    """Return the id of a process that `spawn` started; None if it does not run."""
    try:
        pid = int((folder / f"{name}.pid").read_text())
    except (OSError, ValueError):
        return None
    return pid if is_alive(pid) else None


def find_program(*names: str) -> str:
    """Return the path of the first of `names` that is installed.

    Raises:
        ServerMissing: None is; the message names the package.
    """
    # Debian's /usr/sbin/rabbitmq-server and rabbitmqctl switch to the user rabbitmq and its configuration; the programs
    # themselves are in /usr/lib/rabbitmq/bin.
    folders = ["/usr/lib/rabbitmq/bin", os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]
    for name in names:
        found = shutil.which(name, path=os.pathsep.join(folders))
        if found:
            return found
    package = "rabbitmq-server" if names[0] != "redis-server" else "redis-server"
    raise ServerMissing(f"{names[0]} is not installed; on Debian: apt-get install {package}")


def tail(path: Path, *, lines: int = 15) -> str:
    """Return the last lines of the file at `path`, "" if it cannot be read."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
