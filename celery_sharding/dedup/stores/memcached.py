"""Claims in Memcached, without its guarantee: it evicts records when its memory is full, and loses all at a restart.

One item for each key, always on the same server: if that server is down, its claims are unavailable instead of being
looked for elsewhere. An item is added if it is absent, and changed by compare-and-swap.

The clock is the server's, which counts whole seconds: a lease may seem up to a second longer to one process than to
another, and a record that Memcached loses in the very second it was written may be followed by a lower fencing token.
"""

from __future__ import annotations

import inspect
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any

from pymemcache.client.base import PooledClient
from pymemcache.client.rendezvous import RendezvousHash
from pymemcache.exceptions import MemcacheError, MemcacheServerError, MemcacheUnexpectedCloseError

from celery_sharding.dedup.claims import Record
from celery_sharding.dedup.stores.records import from_bytes, to_bytes
from celery_sharding.dedup.stores.stepping import Step, SteppingStore, T
from celery_sharding.errors import DeduplicationError, StoreUnavailable

_TIMEOUT_SECONDS = 5.0
_CLOCK_SECONDS = 30.0
_RELATIVE_SECONDS_MAX = 30 * 86_400
_OURS = {"self", "server", "serde", "serializer", "deserializer", "ignore_exc", "key_prefix", "default_noreply"}


class MemcachedStore(SteppingStore):
    """A `ClaimStore` in Memcached.

    Args:
        servers: As pymemcache takes them: "host:port", "unix:/path", or pairs of host and port.
        options: For pymemcache's clients; those that a pooled client does not take are left out.
        namespace: Separates the claims of apps that share the servers.
    """

    caveat = (
        "Memcached forgets claims when its memory is full or when it restarts, and their work may then be done again. "
        "Start it with -M, so that it refuses new claims instead of forgetting old ones, or use another result backend"
    )

    def __init__(self, servers: Sequence[Any], options: Mapping[str, Any], *, namespace: str = "") -> None:
        known = set(inspect.signature(PooledClient.__init__).parameters) - _OURS
        taken = {name: value for name, value in options.items() if name in known}
        taken = {"connect_timeout": _TIMEOUT_SECONDS, "timeout": _TIMEOUT_SECONDS, **taken}
        self.servers = {str(server): _Server(PooledClient(server, **taken)) for server in servers}
        self._ring = RendezvousHash(sorted(self.servers))
        self._namespace = namespace

    def change(self, key: str, step: Step[T]) -> T:
        name = self.name_of(key)
        server = self.servers[self._ring.get_node(name)]
        try:
            return server.call(lambda: self._change(server, key, name, step))
        except MemcacheServerError as exc:
            if "too large" not in str(exc):
                raise _unavailable(key, exc) from exc
            raise DeduplicationError(
                f"the result of {key!r} is too large for an item of Memcached; start it with a higher -I, or return "
                "where the data is",
                key=key,
            ) from exc
        except (MemcacheError, OSError) as exc:
            raise _unavailable(key, exc) from exc

    def discard(self, key: str) -> None:
        name = self.name_of(key)
        server = self.servers[self._ring.get_node(name)]
        try:
            server.call(lambda: server.client.delete(name, noreply=False))
        except (MemcacheError, OSError) as exc:
            raise _unavailable(key, exc) from exc

    def name_of(self, key: str) -> str:
        return "celery-sharding:dedup:" + sha256(f"{self._namespace}{key}".encode()).hexdigest()

    def _change(self, server: _Server, key: str, name: str, step: Step[T]) -> T:
        while True:
            data, version = server.client.gets(name)
            now = server.read_clock()
            record, answer = step(None if data is None else from_bytes(key, data), now)
            if record is None:
                return answer
            item, expire = to_bytes(key, record), _expire(record, now)
            if data is None:
                is_done = server.client.add(name, item, expire=expire, noreply=False)
            else:
                is_done = server.client.cas(name, item, version, expire=expire, noreply=False)
            if is_done:
                return answer


class _Server:
    """One Memcached: its connections, and what is known of its clock."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self._lock = threading.Lock()
        # The server's clock is this host's monotonic one plus something between these two.
        self._offset_min, self._offset_max = -math.inf, math.inf
        self._read_at = -math.inf

    def call(self, work: Callable[[], T]) -> T:
        """Do `work`, and repeat it if the server had closed an idle connection."""
        for _ in self.client.client_pool.free:
            try:
                return work()
            except (MemcacheUnexpectedCloseError, ConnectionError):
                pass  # this connection has left the pool
        return work()

    def read_clock(self) -> float:
        """Return the server's time in seconds, at most a second late. Asks the server from time to time."""
        with self._lock:
            if time.monotonic() - self._read_at > _CLOCK_SECONDS:
                before = time.monotonic()
                answer = float(self.client.stats()[b"time"])
                after = time.monotonic()
                lowest, highest = answer - after, answer + 1 - before
                self._offset_min = max(self._offset_min, lowest)
                self._offset_max = min(self._offset_max, highest)
                if self._offset_min > self._offset_max:  # It is another server by now, or the clocks drift.
                    self._offset_min, self._offset_max = lowest, highest
                self._read_at = after
            return time.monotonic() + self._offset_min


def _expire(record: Record, now: float) -> int:
    seconds = math.ceil(record.expires_at - now) + 1  # Its seconds begin earlier than ours.
    # Memcached takes a longer time for a date.
    return max(seconds, 1) if seconds <= _RELATIVE_SECONDS_MAX else math.ceil(now) + seconds


def _unavailable(key: str, error: Exception) -> StoreUnavailable:
    return StoreUnavailable(f"Memcached did not serve the claim {key!r}: {type(error).__name__}: {error}", key=key)
