"""Private RabbitMQ and Redis nodes: started, killed, restarted and removed, without touching any other server.

A node listens on free ports of 127.0.0.1 only, its own port mapper and distribution included, keeps its data in a
folder of its own, and never starts or stops a service of the system. It runs as whoever starts it.

    new ─start─▶ running ─stop | kill─▶ stopped (data kept) ─start─▶ running … ─remove─▶ gone

A RabbitMQ node's whole state is in its folder, so another process may drive it: `RabbitNode.open(folder)`, or
`python -m celery_sharding.testing restart FOLDER`. One process at a time may do so.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from celery_sharding.testing.processes import (
    ServerMissing,
    ServerNotReady,
    end_process,
    exchange_bytes,
    find_free_port,
    is_alive,
    kill_process,
    tail,
    wait_until,
)

_AMQP_HELLO = b"AMQP\x00\x00\x09\x01"
_PLUGINS = "[rabbitmq_consistent_hash_exchange]."
_START_SECONDS = 90.0
_STOP_SECONDS = 30.0


class RabbitNode:
    """A private RabbitMQ node with the consistent-hash exchange, user guest.

    As a context manager it is started on entry and removed, data and all, on exit.
    """

    def __init__(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="sharding-rabbit-"))
        self._set(folder, ports={name: find_free_port() for name in ("amqp", "dist", "epmd")})
        (folder / "node.json").write_text(json.dumps(self._ports))
        for name in ("home", "mnesia", "log"):
            (folder / name).mkdir()
        cookie = folder / "home" / ".erlang.cookie"
        cookie.touch(mode=0o600)
        cookie.write_text(secrets.token_hex(10).upper())
        cookie.chmod(0o400)
        (folder / "enabled_plugins").write_text(_PLUGINS + "\n")
        (folder / "rabbitmq.conf").write_text(f"listeners.tcp.default = 127.0.0.1:{self._ports['amqp']}\n")

    @classmethod
    def open(cls, folder: Path) -> RabbitNode:
        """Return the node that another process made in `folder`."""
        node = cls.__new__(cls)
        node._set(folder, ports=json.loads((folder / "node.json").read_text()))
        return node

    def _set(self, folder: Path, *, ports: dict[str, int]) -> None:
        self.folder = folder
        self._ports = ports
        self.url = f"amqp://guest:guest@127.0.0.1:{ports['amqp']}//"

    def start(self) -> None:
        """Start the node and return when it answers. A running node is left alone.

        Raises:
            ServerMissing: There is no rabbitmq-server.
            ServerNotReady: It does not answer; the log's last lines are in the message.
        """
        if self.answers():
            return
        self._start_port_mapper()
        # Told that input is allowed, the start script replaces itself with the broker, so that the id is the broker's.
        self._spawn("broker", [_tool("rabbitmq-server"), "-noinput"], RABBITMQ_ALLOW_INPUT="true")
        if not wait_until(self.answers, timeout_seconds=_START_SECONDS):
            raise ServerNotReady(f"RabbitMQ does not answer on {self.url}\n{self._log_tail()}")

    def stop(self) -> None:
        """Stop the node as an operator would; its data is kept."""
        pid = self._pid("broker")
        if pid is not None:
            end_process(pid, grace_seconds=_STOP_SECONDS)
        self._stop_port_mapper()

    def kill(self) -> None:
        """Kill the node (SIGKILL), as a crash of its machine would; what it wrote to disk is kept."""
        pid = self._pid("broker")
        if pid is not None:
            kill_process(pid)
        self._stop_port_mapper()

    def restart(self) -> None:
        """Stop the node, start it on the same data and ports, and return when it answers."""
        self.stop()
        self.start()

    def remove(self) -> None:
        """Kill the node if it runs, and delete its data."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def answers(self) -> bool:
        """Say whether the node takes AMQP connections."""
        # The node's own health check is green before the listener is up; the first frame of the protocol is not.
        return exchange_bytes(self._ports["amqp"], _AMQP_HELLO)[:1] == b"\x01"

    def ctl(self, *arguments: str) -> str:
        """Run `rabbitmqctl` on the node and return what it prints.

        Raises:
            subprocess.CalledProcessError: It failed.
        """
        done = subprocess.run(
            [_tool("rabbitmqctl"), *arguments], env=self._env(), cwd=self.folder, check=True, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        )  # fmt: skip
        return done.stdout

    @property
    def output(self) -> str:
        """What it has logged."""
        return "\n".join(path.read_text(errors="replace") for path in self._logs())

    def _env(self) -> dict[str, str]:
        """Return the whole environment of the node: nothing of the system's configuration reaches it."""
        return {
            "PATH": os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/bin", "/sbin", "/bin"]),
            "LANG": "C.UTF-8",
            "HOME": str(self.folder / "home"),
            "ERL_EPMD_PORT": str(self._ports["epmd"]),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_CRASH_DUMP": str(self.folder / "log" / "erl_crash.dump"),
            "RABBITMQ_NODENAME": f"sharding{self._ports['amqp']}@localhost",
            "RABBITMQ_DIST_PORT": str(self._ports["dist"]),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.folder / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_PID_FILE": str(self.folder / "rabbit.pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_CTL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }

    def _start_port_mapper(self) -> None:
        """Start the Erlang port mapper in the foreground: only so is its process id known."""
        if self._pid("epmd") is not None:
            return
        self._spawn("epmd", [_tool("epmd"), "-address", "127.0.0.1", "-port", str(self._ports["epmd"])])
        wait_until(lambda: exchange_bytes(self._ports["epmd"], b"\x00\x01n") != b"", timeout_seconds=10)

    def _stop_port_mapper(self) -> None:
        pid = self._pid("epmd")
        if pid is not None:
            end_process(pid, grace_seconds=5)

    def _spawn(self, name: str, command: list[str], **env: str) -> None:
        """Start `command` in a session of its own and note its id, so that another process can end it."""
        with (self.folder / "log" / name).open("ab") as log:
            process = subprocess.Popen(
                command, env=self._env() | env, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        (self.folder / f"{name}.pid").write_text(str(process.pid))
        # From here on the noted id is what counts; a Popen object would warn that its process still runs.
        process.returncode = 0

    def _pid(self, name: str) -> int | None:
        try:
            pid = int((self.folder / f"{name}.pid").read_text())
        except (OSError, ValueError):
            return None
        return pid if is_alive(pid) else None

    def _log_tail(self) -> str:
        return "\n".join(tail(path) for path in self._logs())

    def _logs(self) -> list[Path]:
        """Return its log files, the one that was written last at the end."""
        logs = [path for path in (self.folder / "log").glob("*") if path.suffix in ("", ".log")]
        return sorted(logs, key=lambda path: path.stat().st_mtime)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class RedisNode:
    """A private Redis (or Valkey) node that keeps nothing on disk; restarted, it is empty.

    As a context manager it is started on entry and removed on exit.
    """

    def __init__(self) -> None:
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
                _tool("redis-server", "valkey-server"), "--bind", "127.0.0.1", "--port", str(self._port),
                "--dir", str(self.folder), "--logfile", str(log), "--save", "", "--appendonly", "no",
                "--daemonize", "no",
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

    def restart(self) -> None:
        """Stop the node, start it on the same port, empty, and return when it answers."""
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

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _tool(*names: str) -> str:
    """Return the path of the first of `names` that is installed.

    Debian's /usr/sbin/rabbitmq-server and rabbitmqctl switch to the user rabbitmq and its configuration; the programs
    themselves lie in /usr/lib/rabbitmq/bin.
    """
    folders = ["/usr/lib/rabbitmq/bin", os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]
    for name in names:
        found = shutil.which(name, path=os.pathsep.join(folders))
        if found:
            return found
    package = "rabbitmq-server" if names[0] != "redis-server" else "redis-server"
    raise ServerMissing(f"{names[0]} is not installed; on Debian: apt-get install {package}")
