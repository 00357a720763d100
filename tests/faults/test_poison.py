"""Tasks that kill what runs them: so many runs, then the dead-letter queue, and the others go on in order."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from amqp import Message

from celery_sharding.testing import WorkerNode
from celery_sharding.testing.processes import wait_until
from support.shops import Shop

pytestmark = pytest.mark.timeout(180)

ATTEMPTS = 4
# How long Celery waits for a result of a process that is gone; 10 s unless told otherwise.
ENV = {"SHOP_MAX_ATTEMPTS": str(ATTEMPTS), "SHOP_SETTINGS": json.dumps({"worker_lost_wait": 1})}
CGROUPS = Path("/sys/fs/cgroup/memory")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def send_neighbours(shop: Shop, count: int) -> None:
    """Publish tasks of the poison's key behind it, and of other keys."""
    for number in range(2, 2 + count):
        for key in ("poison", "b", "c", "d"):
            shop.send("step", key, number)


def check_letter(letter: Message, *, sent_at: float, reason: str) -> None:
    """Check what a dead letter says of its message, and that this library put it there, not the broker."""
    headers = letter.headers
    assert headers["shard_dead_reason"].startswith(reason), headers
    assert headers["shard_dead_attempts"] == ATTEMPTS, headers
    assert headers["shard_key"] == "poison"
    assert sent_at <= headers["shard_dead_at"] <= time.time()
    assert sent_at - 1 <= headers["shard_sent_at"] <= headers["shard_dead_at"]
    assert "x-death" not in headers
    assert json.loads(letter.body)[1]["number"] == 1


def check_neighbours(shop: Shop, count: int) -> None:
    """Check that everything but the poison ran once, in order."""
    shop.published.remove(("poison", 1))
    assert shop.trace.wait_for(4 * count), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()


@contextmanager
def memory_killer(workers: list[WorkerNode], *, limit_bytes: int) -> Iterator[None]:
    """Kill pool processes that take more than `limit_bytes`, as a kernel without memory does."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for pid in [pid for worker in workers for pid in worker.children()]:
                try:
                    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                    if pages * PAGE_BYTES > limit_bytes:
                        os.kill(pid, signal.SIGKILL)
                except (OSError, IndexError):
                    continue  # it has ended meanwhile

    thread = threading.Thread(target=watch, name="memory-killer", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_poison_of_its_process_dies_after_max_attempts_and_harms_no_neighbour(shop: Shop) -> None:
    # Given a task that kills its pool process, with tasks of its key behind it and others beside it
    sent_at = time.time()
    poison = shop.send("poison", "poison", 1)
    send_neighbours(shop, 10)
    # When two workers run them
    for _ in range(2):
        shop.worker("-c", "2", **ENV)
    [letter] = shop.dead_letters(1)
    # Then it was begun so often and no more, its letter tells all of it, and the others ran in order
    assert [mark.kind for mark in shop.trace.read()].count("begin") == ATTEMPTS
    check_letter(letter, sent_at=sent_at, reason=f"lost {ATTEMPTS} times")
    assert "signal 9" in letter.headers["shard_dead_error"]
    assert letter.headers["id"] == poison.id
    check_neighbours(shop, 10)


@contextmanager
def memory_limit(worker: WorkerNode, *, limit_bytes: int) -> Iterator[None]:
    """Let the kernel kill in a worker that takes more than `limit_bytes`, all of its processes counted.

    Who may not make a memory cgroup (v1) here gets `memory_killer` with half the limit for one process instead.
    """
    folder = CGROUPS / f"celery-sharding-{worker.pid}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
    except OSError:
        with memory_killer([worker], limit_bytes=limit_bytes // 2):
            yield
        return
    try:
        for pid in (worker.pid, *worker.children()):
            (folder / "cgroup.procs").write_text(str(pid))
        yield
        assert "oom_kill 0" not in (folder / "memory.oom_control").read_text().splitlines()
    finally:
        worker.kill()
        assert wait_until(lambda: not (folder / "cgroup.procs").read_text(), timeout_seconds=10)
        folder.rmdir()


def test_a_task_that_the_kernel_kills_for_its_memory_dies_after_max_attempts(shop: Shop) -> None:
    # Given a worker that may not take more memory, and a task that does
    worker = shop.worker("-c", "2", **ENV)
    sent_at = time.time()
    with memory_limit(worker, limit_bytes=500 << 20):
        # When the kernel has killed its process each time, with tasks of its key behind it and others beside it
        shop.send("gorge", "poison", 1)
        send_neighbours(shop, 10)
        [letter] = shop.dead_letters(1)
        # Then it is a dead letter, the worker lives, and the others ran in order
        assert [mark.kind for mark in shop.trace.read()].count("begin") == ATTEMPTS
        check_letter(letter, sent_at=sent_at, reason=f"lost {ATTEMPTS} times")
        assert "signal 9" in letter.headers["shard_dead_error"]
        check_neighbours(shop, 10)
        assert worker.is_running


def test_a_task_killed_for_its_memory_each_time_dies_after_max_attempts(shop: Shop) -> None:
    # Given a task that fills the memory, and something that kills for it
    sent_at = time.time()
    shop.send("gorge", "poison", 1)
    send_neighbours(shop, 10)
    worker = shop.worker("-c", "2", **ENV)
    # When it was killed so often
    with memory_killer([worker], limit_bytes=200 << 20):
        [letter] = shop.dead_letters(1)
    # Then it is a dead letter, and the others ran in order
    assert [mark.kind for mark in shop.trace.read()].count("begin") == ATTEMPTS
    check_letter(letter, sent_at=sent_at, reason=f"lost {ATTEMPTS} times")
    assert "signal 9" in letter.headers["shard_dead_error"]
    check_neighbours(shop, 10)


@pytest.mark.parametrize(
    "pool",
    [
        ("-c", "2"),
        pytest.param(("-c", "2", "-P", "threads"), marks=pytest.mark.slow),
        pytest.param(("-P", "solo"), marks=pytest.mark.slow),
    ],
    ids=["prefork", "threads", "solo"],
)
def test_a_poison_of_whole_workers_dies_after_max_attempts_over_all_of_them(shop: Shop, pool: tuple[str, ...]) -> None:
    # Given two workers, a task that kills the worker it runs in, with tasks of its key behind it and others beside it
    workers = [shop.worker(*pool, **ENV) for _ in range(2)]
    sent_at = time.time()
    result = shop.send("poison_parent", "poison", 1)
    send_neighbours(shop, 10)
    # When each is started again when it was killed
    starts = 0
    while not shop.trace.wait_for(40, timeout_seconds=0.2):
        for worker in workers:
            if not worker.is_running:
                starts += 1
                assert starts <= ATTEMPTS, shop.trace.read()
                worker.start(wait_seconds=0)
    # Then it was begun so often and no more over all of them, and its letter tells all of it
    [letter] = shop.dead_letters(1)
    assert [mark.kind for mark in shop.trace.read()].count("begin") == ATTEMPTS
    check_letter(letter, sent_at=sent_at, reason=f"begun {ATTEMPTS} times")
    with pytest.raises(Exception, match="never finished"):
        result.get(timeout=20)
    # And the others ran in order; what ended in the last moments before a kill may have been repeated
    shop.published.remove(("poison", 1))
    verdict = shop.verdict()
    assert (verdict.lost, verdict.out_of_order, verdict.overlapping) == (0, 0, 0), verdict
    assert verdict.repeated <= 8 * ATTEMPTS, verdict
