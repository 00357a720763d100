"""What claim stores in files promise beyond what every store does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import celery_sharding
from celery_sharding.dedup.claims import Claimed, Done
from celery_sharding.dedup.owners import new_owner
from celery_sharding.dedup.stores import store_for
from celery_sharding.dedup.stores.filesystem import FilesystemStore
from celery_sharding.errors import DamagedRecord, StoreUnavailable
from support.claiming_process import app_for

# Commits a claim in one child after the other; each kills itself three lines of the store later than the one before.
_DIE_EVERYWHERE = """
import os, signal, sys
from itertools import count
from pathlib import Path
from celery_sharding.dedup.owners import new_owner
from celery_sharding.dedup.stores.filesystem import FilesystemStore

store = FilesystemStore(Path(sys.argv[1]))
for lines in count(1, 3):
    key = f"key {lines}"
    token = store.claim(key, owner=new_owner("t"), lease_seconds=60, ttl_seconds=60).token
    child = os.fork()
    if not child:
        left = lines

        def trace(frame, event, argument):
            global left
            if event == "line":
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace if "filesystem" in frame.f_code.co_filename or "pathlib" in frame.f_code.co_filename else None

        sys.settrace(trace)
        store.commit(key, token, result=b"x" * 100_000, ttl_seconds=60)
        sys.settrace(None)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    # Whatever it left is the old record or the new one, and no lock.
    assert store.show(key).state in ("running", "done")
    assert store.commit(key, token, result=b"", ttl_seconds=60)
print(lines)
"""


@pytest.fixture
def files(tmp_path: Path) -> FilesystemStore:
    return FilesystemStore(tmp_path)


def test_a_process_killed_at_any_line_leaves_a_sound_record_and_no_lock(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _DIE_EVERYWHERE, str(tmp_path)], capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(Path(celery_sharding.__file__).parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:40],
        lambda data: data[:-1],
        lambda data: data.replace(b'"state": "done"', b'"state": "dine"'),
        lambda data: data.replace(b'"version": 1', b'"version": 2'),
        lambda data: data.replace(b'"fencing": ', b'"fencing": "x", "": '),
        lambda data: data.replace(b'"attempts"', b'"attempt"'),
        lambda data: b"[]\n",
        lambda data: b"\xff\xfe\n",
    ],
)
def test_a_damaged_record_is_named_and_kept(files: FilesystemStore, damage) -> None:
    # Given a finished record whose file was damaged
    _commit(files, "a key", ttl_seconds=60)
    path = files.path_of("a key")
    damaged = damage(path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    # When it is claimed, then the error names its key
    with pytest.raises(DamagedRecord) as caught:
        files.claim("a key", owner=new_owner("t"), lease_seconds=60, ttl_seconds=60)
    assert caught.value.key == "a key"
    # And the file is as it was
    assert path.read_bytes() == damaged


def test_expired_files_are_purged(tmp_path: Path) -> None:
    store = store_for(app_for(f"file://{tmp_path}"))
    for number in range(5):
        _commit(store, f"old {number}", ttl_seconds=1e-6)
    _commit(store, "new", ttl_seconds=60)
    assert store.purge() == 5
    assert store.purge() == 0
    assert store.claim("new", owner=new_owner("t"), lease_seconds=60, ttl_seconds=60) == Done(b"1")
    # Two files for each folder that was ever used, and the record
    left = [path.name for path in (tmp_path / "celery-sharding-dedup").glob("??/*") if path.name not in ("lock", "new")]
    assert len(left) == 1


def test_a_folder_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable) as caught:
        _commit(FilesystemStore(tmp_path / "file"), "a key", ttl_seconds=60)
    assert caught.value.key == "a key"


def _commit(store, key: str, *, ttl_seconds: float) -> None:
    outcome = store.claim(key, owner=new_owner("t"), lease_seconds=60, ttl_seconds=60)
    assert isinstance(outcome, Claimed)
    assert store.commit(key, outcome.token, result=b"1", ttl_seconds=ttl_seconds)
