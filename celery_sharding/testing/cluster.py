"""A private cluster of three RabbitMQ nodes on 127.0.0.1.

The nodes share a port mapper and an Erlang cookie, are joined when they first start, and stop serving when they see
less than half of the cluster (`pause_minority`). Each has its own AMQP port, and works like a single node:

    with RabbitCluster() as cluster:
        cluster.nodes[0].kill()
        cluster.nodes[0].start()

    new ─start─▶ joined, running ─stop─▶ stopped (data kept) ─start─▶ running … ─remove─▶ gone

One process at a time may drive a cluster.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from celery_sharding.testing.node import Node
from celery_sharding.testing.port_mapper import PortMapper, make_cookie
from celery_sharding.testing.processes import ServerNotReady, find_free_port, wait_until
from celery_sharding.testing.rabbit_node import RabbitNode

NODES = 3
# A node that boots while a peer still boots may die of it: RabbitMQ 3.10 says `incompatible_feature_flags`.
_BOOTS_MAX = 4
_JOIN_SECONDS = 60.0


class RabbitCluster(Node):
    """Three RabbitMQ nodes that are one broker.

    As a context manager it is started on entry, in half a minute or so, and removed on exit, data and all.

    Args:
        net_tick_seconds: After about how much silence a node counts as gone; 60 is RabbitMQ's default. A killed node
            is missed at once.
    """

    def __init__(self, *, net_tick_seconds: int = 60) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="sharding-cluster-"))
        (self._folder / "log").mkdir()
        self._mapper = PortMapper(self._folder, find_free_port())
        cookie = make_cookie()
        self.nodes = [
            RabbitNode(
                mapper=self._mapper,
                cookie=cookie,
                config=["cluster_partition_handling = pause_minority"],
                net_tick_seconds=net_tick_seconds,
                boots_max=_BOOTS_MAX,
            )
            for _ in range(NODES)
        ]
        self._joined = 1

    @property
    def url(self) -> str:
        """The URLs of all nodes, for clients that fail over."""
        return ";".join(node.url for node in self.nodes)

    def start(self) -> None:
        """Start the nodes that do not run, one after another, and join new ones.

        Raises:
            ServerMissing: There is no rabbitmq-server.
            ServerNotReady: A node does not answer; the log's last lines are in the message.
        """
        self._mapper.start()
        # The node that was stopped last must start first: the others wait for its data.
        for node in self.nodes:
            node.start()
        for node in self.nodes[self._joined :]:
            node.ctl("-q", "stop_app")
            node.ctl("-q", "join_cluster", self.nodes[0].name)
            node.ctl("-q", "start_app")
            if not wait_until(node.answers, timeout_seconds=_JOIN_SECONDS):
                raise ServerNotReady(f"the RabbitMQ node on {node.url} does not answer after it joined the cluster")
            self._joined += 1

    def stop(self) -> None:
        """Stop all nodes as an operator would; their data is kept."""
        for node in reversed(self.nodes):
            node.stop()
        self._mapper.stop()

    def remove(self) -> None:
        """Kill all nodes that run, and delete their data."""
        for node in self.nodes:
            node.remove()
        self._mapper.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def leader_of(self, queue: str) -> RabbitNode | None:
        """Return the node that leads a quorum queue or a stream, by the word of the first node that answers."""
        asked = next((node for node in self.nodes if node.answers()), None)
        if asked is None:
            return None
        for line in asked.ctl("-q", "list_queues", "--no-table-headers", "name", "leader").splitlines():
            name, _, leader = line.partition("\t")
            if name == queue:
                return next((node for node in self.nodes if node.name == leader.strip()), None)
        return None
