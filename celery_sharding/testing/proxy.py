"""A TCP proxy that breaks connections the way networks do.

It stands between clients and one server, listens on a free port of 127.0.0.1, and passes bytes on, unless told
otherwise for one direction or both:

    passing ─stall─▶ stalled         bytes wait, the sender is slowed down; `heal` delivers them, in order
    passing ─blackhole─▶ swallowing  bytes are read and lost; `heal` cuts connections that lost some
    any ─cut─▶                       open connections are closed or reset; new ones work

`refuse` also closes new connections, like a server that is down. A latency delays all bytes, each way, without limiting
how many are on their way. Each direction of each connection has a thread, two with a latency; `_changed` guards the
state.
"""

from __future__ import annotations

import enum
import socket
import struct
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

_CHUNK_BYTES = 65_536
_JOIN_SECONDS = 5.0


class Direction(enum.Enum):
    TO_SERVER = "to server"
    TO_CLIENT = "to client"


BOTH = frozenset(Direction)


class FaultProxy:
    """A proxy in front of the server of `url`; `self.url` is the same URL through the proxy.

    As a context manager it listens on entry, and closes everything on exit.

    Args:
        latency_seconds: Of bytes in each direction.
    """

    def __init__(self, url: str, *, latency_seconds: float = 0.0) -> None:
        self._latency_seconds = latency_seconds
        parts = urlsplit(url)
        self._server = (parts.hostname or "127.0.0.1", parts.port or 5672)
        self._listener = socket.create_server(("127.0.0.1", 0))
        place = f"127.0.0.1:{self._listener.getsockname()[1]}"
        login, at, _ = parts.netloc.rpartition("@")
        self.url = urlunsplit(parts._replace(netloc=f"{login}{at}{place}"))
        self._changed = threading.Condition()
        self._stalled: frozenset[Direction] = frozenset()
        self._swallowing: frozenset[Direction] = frozenset()
        self._refusing = self._closed = False
        self._pairs: set[_Pair] = set()
        # Connections under "taken"; bytes under ("passed", direction) and ("swallowed", direction).
        self._counts: Counter[object] = Counter()
        self._acceptor = threading.Thread(target=self._accept, name="fault-proxy", daemon=True)

    def stall(self, *directions: Direction) -> None:
        """Let bytes wait, by default in both directions."""
        with self._changed:
            self._stalled = frozenset(directions) or BOTH

    def blackhole(self, *directions: Direction) -> None:
        """Read bytes and lose them, by default in both directions."""
        with self._changed:
            self._swallowing = frozenset(directions) or BOTH

    def refuse(self) -> None:
        """Close all connections, and every new one at once."""
        with self._changed:
            self._refusing = True
        self.cut()

    def heal(self) -> None:
        """Pass bytes and accept connections again; cut connections that lost bytes."""
        with self._changed:
            self._stalled = self._swallowing = frozenset()
            self._refusing = False
            holed = [pair for pair in self._pairs if pair.has_hole]
            self._changed.notify_all()
        for pair in holed:
            self._end(pair, reset=True)

    def cut(self, *, reset: bool = False) -> None:
        """Close all open connections, with a reset (RST) if wanted; on return the peers' sockets know it."""
        with self._changed:
            pairs = list(self._pairs)
        for pair in pairs:
            self._end(pair, reset=reset)
        # A thread inside recv() holds its socket open, so the reset leaves only with the last of them.
        for thread in [thread for pair in pairs for thread in pair.threads]:
            thread.join(_JOIN_SECONDS)

    def wait_for(
        self, direction: Direction, *, passed: int = 0, swallowed: int = 0, timeout_seconds: float = 20.0
    ) -> bool:
        """Wait until that many bytes in total went through, or were lost; False after the time-out."""
        counts = self._counts
        with self._changed:
            return self._changed.wait_for(
                lambda: counts["passed", direction] >= passed and counts["swallowed", direction] >= swallowed,
                timeout_seconds,
            )

    def passed(self, direction: Direction) -> int:
        with self._changed:
            return self._counts["passed", direction]

    @property
    def open_connections(self) -> int:
        with self._changed:
            return len(self._pairs)

    @property
    def taken_connections(self) -> int:
        """How many connections it has accepted so far, open or not."""
        with self._changed:
            return self._counts["taken"]

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        # Closing does not wake a thread in accept().
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self._acceptor.join(_JOIN_SECONDS)

    def __enter__(self) -> Self:
        self._acceptor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing:
                client.close()
                continue
            try:
                server = socket.create_connection(self._server)
            except OSError:
                client.close()
                continue
            pair = _Pair(client, server)
            for direction in Direction:
                pair.threads.append(
                    threading.Thread(
                        target=self._pump, args=(pair, direction), name=f"fault-proxy {direction.value}", daemon=True
                    )
                )
            with self._changed:
                self._pairs.add(pair)
                self._counts["taken"] += 1
                for thread in pair.threads:
                    thread.start()

    def _pump(self, pair: _Pair, direction: Direction) -> None:
        source, sink = (pair.client, pair.server) if direction is Direction.TO_SERVER else (pair.server, pair.client)
        line = _Line(sink, self._latency_seconds) if self._latency_seconds else None
        with suppress(OSError):
            while data := source.recv(_CHUNK_BYTES):
                with self._changed:
                    self._changed.wait_for(lambda: direction not in self._stalled or pair.ended or self._closed)
                    swallow = direction in self._swallowing
                if swallow:
                    pair.has_hole = True
                elif line is not None:
                    line.send(data)
                else:
                    sink.sendall(data)
                with self._changed:
                    self._counts["swallowed" if swallow else "passed", direction] += len(data)
                    self._changed.notify_all()
        if line is not None:
            line.close()
        self._end(pair)

    def _end(self, pair: _Pair, *, reset: bool = False) -> None:
        with self._changed:
            self._pairs.discard(pair)
            first, pair.ended = not pair.ended, True
            self._changed.notify_all()
        if not first:
            return
        for sock in (pair.client, pair.server):
            with suppress(OSError):
                if reset:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                # Wakes a reading thread; only then does closing take effect.
                sock.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)
            sock.close()


class _Pair:
    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.threads: list[threading.Thread] = []
        self.has_hole = False
        self.ended = False


class _Line:
    def __init__(self, sink: socket.socket, latency_seconds: float) -> None:
        self._sink = sink
        self._latency_seconds = latency_seconds
        self._on_the_way: deque[tuple[float, bytes]] = deque()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._deliver, name="fault-proxy line", daemon=True)
        self._thread.start()

    def send(self, data: bytes) -> None:
        with self._changed:
            self._on_the_way.append((time.monotonic() + self._latency_seconds, data))
            self._changed.notify()

    def close(self) -> None:
        self.send(b"")
        self._thread.join(self._latency_seconds + _JOIN_SECONDS)

    def _deliver(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._on_the_way)
                due, data = self._on_the_way.popleft()
            time.sleep(max(0.0, due - time.monotonic()))
            if not data:
                return
            with suppress(OSError):
                self._sink.sendall(data)
