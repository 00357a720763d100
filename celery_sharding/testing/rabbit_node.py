"""A private RabbitMQ node: started, killed, restarted and removed, without touching any other server.

It listens on free ports of 127.0.0.1 only, its own port mapper and distribution included, keeps its data in a folder of
its own, and never starts or stops a service of the system. It runs as whoever starts it. Stopped or killed, it keeps
its data.

A node's whole state is in its folder, so another process may drive it: `RabbitNode.open(folder)`, or
`python -m celery_sharding.testing restart FOLDER`. One process at a time may do so.
Nodes that share a port mapper and a cookie can be joined to a cluster; `RabbitCluster` does that.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from celery_sharding.testing.node import ServerNode
from celery_sharding.testing.port_mapper import BARE_ENV, PortMapper, make_cookie
from celery_sharding.testing.processes import (
    ServerNotReady,
    exchange_bytes,
    find_free_port,
    find_program,
    spawn,
    wait_until,
)

_AMQP_HELLO = b"AMQP\x00\x00\x09\x01"
_PLUGINS = ("rabbitmq_consistent_hash_exchange",)
_MANAGEMENT = "rabbitmq_management"
_START_SECONDS = 90.0


class RabbitNode(ServerNode):
    """A private RabbitMQ node with the consistent-hash exchange, user guest.

    As a context manager it is started on entry and removed, data and all, on exit.

    Args:
        mapper: A port mapper that others start and stop; None: one of its own.
        cookie: The Erlang cookie, equal on nodes to be joined; None: a new one.
        config: More lines of rabbitmq.conf.
        net_tick_seconds: After about how much silence another node counts as gone; equal on joined nodes.
        boots_max: How often `start` tries if it ends while it boots.
        management: Serve the management API.
    """

    process_name = "broker"

    def __init__(
        self,
        *,
        mapper: PortMapper | None = None,
        cookie: str | None = None,
        config: Sequence[str] = (),
        net_tick_seconds: int = 60,
        boots_max: int = 1,
        management: bool = False,
    ) -> None:
        folder = Path(tempfile.mkdtemp(prefix="sharding-rabbit-"))
        facts: dict[str, Any] = {
            "amqp": find_free_port(),
            "dist": find_free_port(),
            "epmd": find_free_port() if mapper is None else mapper.port,
            "owns_epmd": mapper is None,
            "net_tick_seconds": net_tick_seconds,
            "boots_max": boots_max,
            "management": find_free_port() if management else None,
        }
        self._set(folder, facts)
        (folder / "node.json").write_text(json.dumps(facts))
        for name in ("home", "mnesia", "log"):
            (folder / name).mkdir()
        cookie_file = folder / "home" / ".erlang.cookie"
        cookie_file.touch(mode=0o600)
        cookie_file.write_text(cookie or make_cookie())
        cookie_file.chmod(0o400)
        plugins = [*_PLUGINS, *([_MANAGEMENT] if management else [])]
        (folder / "enabled_plugins").write_text(f"[{','.join(plugins)}].\n")
        lines = [f"listeners.tcp.default = 127.0.0.1:{facts['amqp']}", *config]
        if management:
            lines += ["management.tcp.ip = 127.0.0.1", f"management.tcp.port = {facts['management']}"]
        (folder / "rabbitmq.conf").write_text("\n".join(lines) + "\n")

    @classmethod
    def open(cls, folder: Path) -> RabbitNode:
        """Return the node that another process made in `folder`."""
        node = cls.__new__(cls)
        node._set(folder, json.loads((folder / "node.json").read_text()))
        return node

    def _set(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        self._facts = facts
        self._mapper = PortMapper(folder, facts["epmd"]) if facts["owns_epmd"] else None
        self.name = f"sharding{facts['amqp']}@localhost"
        self.url = f"amqp://guest:guest@127.0.0.1:{facts['amqp']}//"
        management = facts.get("management")
        self.management_url = None if management is None else f"http://127.0.0.1:{management}"

    def start(self) -> None:
        """Start the node and return when it answers. A running node is left alone.

        Raises:
            ServerMissing: There is no rabbitmq-server.
            ServerNotReady: It does not answer; the log's last lines are in the message.
        """
        if self.answers():
            return
        if self._mapper is not None:
            self._mapper.start()
        for _ in range(self._facts["boots_max"]):
            # If input is allowed, the start script replaces itself with the broker, so that the id is the broker's.
            env = self._env() | {"RABBITMQ_ALLOW_INPUT": "true"}
            if self._pid() is None:
                spawn(self.folder, self.process_name, [find_program("rabbitmq-server"), "-noinput"], env=env)
            wait_until(lambda: self.answers() or self._pid() is None, timeout_seconds=_START_SECONDS)
            if self.answers():
                return
            if self._pid() is not None:
                break
        raise ServerNotReady(f"RabbitMQ does not answer on {self.url}\n{self.log_tail()}")

    def stop(self) -> None:
        super().stop()
        self._stop_mapper()

    def kill(self) -> None:
        super().kill()
        self._stop_mapper()

    def answers(self) -> bool:
        # The node's own health check passes before the listener is up; an AMQP handshake does not.
        return exchange_bytes(self._facts["amqp"], _AMQP_HELLO)[:1] == b"\x01"

    def ctl(self, *arguments: str) -> str:
        """Run `rabbitmqctl` on the node and return its output.

        Raises:
            subprocess.CalledProcessError: It failed.
        """
        done = subprocess.run(
            [find_program("rabbitmqctl"), *arguments], env=self._env(), cwd=self.folder, check=True, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        )  # fmt: skip
        return done.stdout

    def _env(self) -> dict[str, str]:
        """Return the node's whole environment, without the system's configuration."""
        interface = "-kernel inet_dist_use_interface {127,0,0,1}"
        return BARE_ENV | {
            "LANG": "C.UTF-8",
            "HOME": str(self.folder / "home"),
            "ERL_EPMD_PORT": str(self._facts["epmd"]),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_CRASH_DUMP": str(self.folder / "log" / "erl_crash.dump"),
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_DIST_PORT": str(self._facts["dist"]),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.folder / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_PID_FILE": str(self.folder / "rabbit.pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                f"{interface} -kernel net_ticktime {self._facts['net_tick_seconds']}"
            ),
            "RABBITMQ_CTL_ERL_ARGS": interface,
        }

    def _stop_mapper(self) -> None:
        if self._mapper is not None:
            self._mapper.stop()
