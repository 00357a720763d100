"""The servers that a soak runs on, and the links of its workers and publishers to them, which can be broken."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kombu import Connection

from celery_sharding.rabbitmq.connect import close_connection, open_connection
from celery_sharding.testing import Direction, FaultProxy, RabbitCluster, RabbitNode, RedisNode
from celery_sharding.testing.processes import wait_until
from soak.plan import NODE_KINDS, NODES, Kind


@dataclass(frozen=True, slots=True)
class Servers:
    """What a soak runs on.

    Args:
        broker_url: Of all nodes, with ";" between.
        redis: Of our own, for results and claims; it has to be durable, since nobody can do without lost claims.
        restart_command: Restarts the broker and returns when it answers again; None if nobody may.
        broker_folder: Of a node of our own, which may be killed.
        cluster: The broker, if it is a cluster of our own.
    """

    broker_url: str
    redis: RedisNode
    restart_command: str | None = None
    broker_folder: Path | None = None
    cluster: RabbitCluster | None = None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The faults that can be injected here."""
        missing: set[Kind] = set()
        if self.restart_command is None:
            missing.add(Kind.RESTART_BROKER)
        if self.broker_folder is None:
            missing.add(Kind.KILL_BROKER)
        if self.cluster is None:
            missing |= NODE_KINDS
        return tuple(kind for kind in Kind if kind not in missing)

    @contextmanager
    def connected(self) -> Iterator[Any]:
        """Connect to the first node that answers.

        Raises:
            OSError, kombu and amqp errors: None does.
        """
        connection = open_connection(Connection(self.broker_url))
        try:
            yield connection
        finally:
            close_connection(connection)

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

    def node(self, name: str) -> RabbitNode:
        """Return the node "n1", "n2" or "n3" of the cluster."""
        if self.cluster is None:
            raise ValueError("there is no cluster")
        return self.cluster.nodes[NODES.index(name)]

    def is_whole(self) -> bool:
        """Say whether all nodes of the cluster take connections."""
        return self.cluster is not None and all(node.answers() for node in self.cluster.nodes)


class Link:
    """The way of one worker or publisher to a server: a proxy in front of each node. It listens until it is closed.

    Args:
        urls: Of all nodes, with ";" between.
        first: Number of the node that comes first in `url`; beyond the last it goes on with the first.
    """

    def __init__(self, urls: str, *, first: int = 0) -> None:
        nodes = urls.split(";")
        first %= len(nodes)
        self._proxies = [FaultProxy(url).__enter__() for url in nodes[first:] + nodes[:first]]
        self.url = ";".join(proxy.url for proxy in self._proxies)

    def cut(self, *, reset: bool) -> None:
        for proxy in self._proxies:
            proxy.cut(reset=reset)

    def refuse(self) -> None:
        for proxy in self._proxies:
            proxy.refuse()

    def stall(self, *directions: Direction) -> None:
        for proxy in self._proxies:
            proxy.stall(*directions)

    def blackhole(self, *directions: Direction) -> None:
        for proxy in self._proxies:
            proxy.blackhole(*directions)

    def heal(self) -> None:
        for proxy in self._proxies:
            proxy.heal()

    def close(self) -> None:
        for proxy in self._proxies:
            proxy.close()
