"""Claims in Redis or Valkey.

One hash for each key, changed by the scripts of `redis_scripts`. They can be repeated with the same token: the client
may resend a script when a connection breaks. A claim and a commit are one round trip each.

The main thread, which runs the tasks of a prefork or solo worker, keeps one connection of the client's pool for itself,
and sends and reads on it directly: what redis-py does around a call (the pool, hooks, retries) costs as much as the
call. After any error the connection is closed, so that a late answer is never taken for that of the next call.

A failover loses the claims that the old primary had not replicated yet: Redis promises no more.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from functools import cache
from hashlib import sha1
from typing import Any

from redis.client import NEVER_DECODE
from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from celery_sharding.dedup import claims
from celery_sharding.dedup.claims import Claimed, ClaimStore, Done, Outcome, Running, Shown
from celery_sharding.dedup.owners import Owner
from celery_sharding.dedup.stores import redis_scripts
from celery_sharding.dedup.stores.records import damaged
from celery_sharding.errors import StoreRefused, StoreUnavailable


class RedisStore(ClaimStore):
    """A `ClaimStore` in Redis or Valkey (5 or later).

    Args:
        client: Of redis-py.
        prefix: Begins the name of each record.
    """

    def __init__(self, client: Any, *, prefix: str = "celery-sharding:dedup:") -> None:
        self._client = client
        self._prefix = prefix
        self._kept: Any = None
        self._keeper: int | None = None

    def claim(
        self, key: str, *, owner: Owner, lease_seconds: float, ttl_seconds: float, evict: str | None = None
    ) -> Outcome:
        reply = self._run(
            redis_scripts.CLAIM,
            key,
            owner.run_id,
            owner.task_id,
            owner.to_text(),
            _micros(lease_seconds),
            _millis(ttl_seconds),
            evict or "",
        )
        if isinstance(reply, int):
            return Claimed(owner.run_id, reply)
        kind = reply[0]
        if kind == b"done":
            return Done(reply[1])
        if kind == b"running":
            left_seconds = int(reply[3]) / 1_000_000
            return Running(reply[1].decode(), self._owner(key, reply[2]), left_seconds, reply[4] == b"parked")
        raise damaged(key, reply[1].decode(errors="replace"))

    def renew(self, key: str, token: str, *, lease_seconds: float) -> bool:
        return bool(self._run(redis_scripts.HOLD, key, token, _micros(lease_seconds), claims.RUNNING))

    def park(self, key: str, token: str, *, lease_seconds: float) -> bool:
        return bool(self._run(redis_scripts.HOLD, key, token, _micros(lease_seconds), claims.PARKED))

    def commit(self, key: str, token: str, *, result: bytes, ttl_seconds: float) -> bool:
        return bool(self._run(redis_scripts.COMMIT, key, token, result, _millis(ttl_seconds)))

    def release(self, key: str, token: str) -> bool:
        return bool(self._run(redis_scripts.RELEASE, key, token))

    def show(self, key: str) -> Shown | None:
        reply = self._run(redis_scripts.SHOW, key)
        if not reply:
            return None
        now, version, state, fencing, attempts, lapses, owner = (value.decode() for value in reply[:7])
        if version != str(claims.VERSION) or state not in claims.STATES:
            raise damaged(key, f"its version is {version!r}, its state {state!r}")
        waiting = state in (claims.RUNNING, claims.PARKED)
        return Shown(
            key=key,
            state=state,
            owner=self._owner(key, owner.encode()) if waiting else None,
            task_id=reply[9].decode() or None,
            fencing=int(fencing),
            attempts=int(attempts),
            lease_left_seconds=(int(lapses) - int(now)) / 1_000_000 if waiting else None,
            expires_in_seconds=reply[8] / 1_000,
            result_bytes=reply[7] if state == claims.DONE else None,
        )

    def forget(self, key: str, *, force: bool) -> bool:
        reply = self._run(redis_scripts.FORGET, key, "1" if force else "")
        if reply[0] == b"damaged":
            raise damaged(key, reply[1].decode(errors="replace"))
        return bool(reply[0] == b"forgotten")

    def check(self) -> None:
        try:
            super().check()
        finally:
            # A worker checks before its pool forks, whose children have connections of their own.
            if self._keeper == threading.get_ident():
                self._drop_kept()

    def _run(self, script: str, key: str, *arguments: str | bytes | int) -> Any:
        command: Sequence[Any] = (1, self._prefix + key, *arguments)
        try:
            if self._keeper == threading.get_ident():
                return self._run_kept(script, command)
            if not _may_keep_connection(self._client):
                return _call(self._client, script, command)
            self._kept, self._keeper = self._client.client(), threading.get_ident()
            return self._run_kept(script, command)
        except ResponseError as exc:
            if "WRONGTYPE" in str(exc):
                raise damaged(key, "it is no hash") from exc
            raise _failed(key, exc) from exc
        except AuthenticationError as exc:
            raise _failed(key, exc) from exc
        except (RedisError, OSError) as exc:
            raise StoreUnavailable(f"Redis did not answer for the claim {key!r}: {exc}", key=key) from exc

    def _run_kept(self, script: str, command: Sequence[Any]) -> Any:
        """Run a script on the connection that the main thread keeps."""
        try:
            return _exchange(self._kept.connection, script, command)
        except RedisConnectionError:
            # The server may have closed an idle connection, which a pool would have noticed; scripts may be repeated.
            self._drop_kept()
            return _call(self._client, script, command)
        except BaseException:
            # A time limit, too, may interrupt a call before its answer has come.
            self._drop_kept()
            raise

    def _drop_kept(self) -> None:
        kept, self._keeper, self._kept = self._kept, None, None
        kept.connection.disconnect()
        kept.close()

    def _owner(self, key: str, text: bytes) -> Owner:
        try:
            return Owner.from_text(text.decode())
        except ValueError as exc:
            raise damaged(key, "its owner cannot be read") from exc


def _call(client: Any, script: str, command: Sequence[Any]) -> Any:
    try:
        return client.execute_command("EVALSHA", _digest(script), *command, **{NEVER_DECODE: True})
    except NoScriptError:
        return client.execute_command("EVAL", script, *command, **{NEVER_DECODE: True})


def _exchange(connection: Any, script: str, command: Sequence[Any]) -> Any:
    size = b"*%d\r\n" % (2 + len(command))
    words = _packed(command)
    try:
        connection.send_packed_command([size + _packed_evalsha(script) + words])
        return connection.read_response(disable_decoding=True)
    except NoScriptError:
        connection.send_packed_command([size + _packed(("EVAL", script)) + words])
        return connection.read_response(disable_decoding=True)


def _packed(words: Sequence[str | bytes | int]) -> bytes:
    """Return words in Redis' protocol (RESP, bulk strings)."""
    parts = []
    for word in words:
        data = word if isinstance(word, bytes) else str(word).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)


@cache
def _packed_evalsha(script: str) -> bytes:
    return _packed(("EVALSHA", _digest(script)))


@cache
def _digest(script: str) -> str:
    return sha1(script.encode(), usedforsecurity=False).hexdigest()


def _may_keep_connection(client: Any) -> bool:
    """Say whether this thread may keep a connection: the main thread may, unless the pool is small on purpose."""
    if threading.current_thread() is not threading.main_thread():
        return False
    return getattr(client.connection_pool, "max_connections", 0) >= _SMALL_POOL


_SMALL_POOL = 10


def _micros(seconds: float) -> int:
    return max(1, int(seconds * 1_000_000))


def _millis(seconds: float) -> int:
    return max(1, int(seconds * 1_000))


def _failed(key: str, error: RedisError) -> StoreUnavailable:
    text = str(error)
    # Before Redis 7 the error of a command within a script is only a text.
    if isinstance(error, AuthenticationError | NoPermissionError | ReadOnlyError) or _REFUSAL.search(text):
        return StoreRefused(
            f"Redis refused the claim {key!r}: {text}. Its user needs +eval, +evalsha, +hset, +hmget, +hdel, +hstrlen, "
            "+del, +exists, +type, +time, +pexpire and +pttl on keys that begin with celery-sharding:dedup: (behind "
            "global_keyprefix), on a primary",
            key=key,
        )
    return StoreUnavailable(f"Redis refused to serve the claim {key!r}: {text}", key=key)


_REFUSAL = re.compile("NOPERM|READONLY|NOAUTH|WRONGPASS|no permissions|can't run this command|can't access", re.I)
