"""Runs claimers on one store, starts those that died anew, and judges their logs."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections import Counter
from pathlib import Path

from celery import Celery

from celery_sharding.dedup.stores import store_for
from stress.claimer import claim_in_child, terms_for
from stress.verdict import count, find_violations, read_logs


def stress(
    url: str, folder: Path, *, seconds: float, processes: int = 8, keys: int = 50
) -> tuple[Counter[str], list[str]]:
    """Let `processes` claimers loose on `keys` keys for `seconds`; return what happened, and the violations.

    Raises:
        RuntimeError: A claimer ended by an error.
    """
    prefix = f"stress:{uuid.uuid4().hex}"
    names = [f"{prefix}.{number}" for number in range(keys)]
    # What claimers import is imported once, here: on a busy machine that takes as long as a short run.
    store_for(Celery("stress", backend=url, set_as_current=False))
    # Makes the table of a database, for which the others would wait.
    os.waitpid(claim_in_child(url, folder, names, time.monotonic() + 0.5, 0), 0)
    until = time.monotonic() + seconds
    started = 1
    running: set[int] = set()
    while running or started == 1:
        while len(running) < processes and time.monotonic() < until:
            running.add(claim_in_child(url, folder, names, until, started))
            started += 1
        pid, status = os.wait()
        if pid not in running:
            continue  # a server that ends
        running.discard(pid)
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"a claimer ended with {code}")
    lines = list(read_logs(folder))
    return count(lines), list(find_violations(lines, terms_for(url)))
