"""Claims in files of a local disk, for the workers of one machine.

    FOLDER/ab/cdef…   one record; the 64 digits of the SHA-256 of its key, of which the first two name the folder
    FOLDER/ab/lock    locked (flock) while a record beside it is changed; the kernel unlocks it when a process dies
    FOLDER/ab/new     the new content of a record, which is then renamed into place

A process that is killed at any instruction leaves the old record or the new one. A step returns only when its data is
on the disk, so a power failure loses nothing either. The modification time of a file is when its record expires, so
that a purge need not read it.

The clock is that of the machine. Not for network file systems, where locks may not hold.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from celery_sharding.dedup.claims import StoreClock
from celery_sharding.dedup.stores.records import from_bytes, to_bytes
from celery_sharding.dedup.stores.stepping import Step, SteppingStore, T
from celery_sharding.errors import StoreRefused, StoreUnavailable

_LOCK, _NEW = "lock", "new"


class FilesystemStore(SteppingStore):
    """A `ClaimStore` in files below `folder`, which it makes at the first use. `clock` returns seconds since 1970."""

    def __init__(self, folder: Path, clock: StoreClock = time.time) -> None:
        self._folder = folder
        self._clock = clock

    def change(self, key: str, step: Step[T]) -> T:
        path = self.path_of(key)
        try:
            with _locked(path.parent):
                data = _read(path)
                record, answer = step(None if data is None else from_bytes(key, data), self._clock())
                if record is not None:
                    _replace(path, to_bytes(key, record), expires_at=record.expires_at)
                return answer
        except OSError as exc:
            raise _failed(key, exc) from exc

    def discard(self, key: str) -> None:
        path = self.path_of(key)
        try:
            with _locked(path.parent):
                path.unlink(missing_ok=True)
        except OSError as exc:
            raise _failed(key, exc) from exc

    def purge(self) -> int:
        deleted = 0
        try:
            for folder in sorted(self._folder.glob("[0-9a-f][0-9a-f]")):
                for path in sorted(folder.iterdir()):
                    if path.name not in (_LOCK, _NEW) and self._has_expired(path):
                        with _locked(folder):
                            if self._has_expired(path):  # and has not been claimed again
                                path.unlink()
                                deleted += 1
        except OSError as exc:
            raise StoreUnavailable(f"the claims in {self._folder} were not all purged: {exc}") from exc
        return deleted

    def path_of(self, key: str) -> Path:
        name = sha256(key.encode()).hexdigest()
        return self._folder / name[:2] / name[2:]

    def _has_expired(self, path: Path) -> bool:
        with suppress(FileNotFoundError):
            return path.stat().st_mtime <= self._clock()
        return False


def _failed(key: str, error: OSError) -> StoreUnavailable:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StoreRefused(f"the claim {key!r} may not be written: {error}; let the user write there", key=key)
    return StoreUnavailable(f"the files did not serve the claim {key!r}: {error}", key=key)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        # Closing is not enough if another thread has forked meanwhile: its child has the same lock open.
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _replace(path: Path, data: bytes, *, expires_at: float) -> None:
    new = path.with_name(_NEW)
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.utime(file.fileno(), (expires_at, expires_at))
        os.fsync(file.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
