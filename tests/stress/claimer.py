"""One process that claims: it takes keys at random, and does with them what runs do, and what goes wrong with runs.

It writes what it asked the store for, and what it was told, as JSON lines to a log of its own, with the monotonic time
of the machine before and after. What it wrote is there, however it ends.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from celery import Celery

from celery_sharding.dedup.claims import Claimed, ClaimStore, Done, Running
from celery_sharding.dedup.owners import Owner, is_provably_gone, new_owner
from celery_sharding.dedup.stores import store_for

FATES = {"commit": 60, "release": 10, "renew": 10, "park": 5, "pause": 8, "die": 2, "commit and die": 1}


@dataclass(frozen=True, slots=True)
class Terms:
    """How long claims and results live, and by how much the clocks of store and machine may differ meanwhile."""

    lease_seconds: float = 1.0
    ttl_seconds: float = 2.0
    slack_seconds: float = 0.05


def terms_for(url: str) -> Terms:
    """Return the terms on which the result backend `url` is tried."""
    # Memcached tells whole seconds, so two processes may differ by one of them.
    return Terms(3.0, 5.0, 1.05) if "memcache" in url else Terms()


class Claimer:
    """Claims until `until` (monotonic); see `run`."""

    def __init__(self, store: ClaimStore, terms: Terms, log: int, chance: random.Random) -> None:
        self._store = store
        self._terms = terms
        self._log = log
        self._chance = chance

    def run(self, keys: list[str], until: float) -> None:
        while time.monotonic() < until:
            key = self._chance.choice(keys)
            owner = new_owner(f"task-{self._chance.randrange(3)}")
            outcome = self._claim(key, owner, evict=None)
            if isinstance(outcome, Running) and not outcome.parked and is_provably_gone(outcome.owner):
                outcome = self._claim(key, owner, evict=outcome.token)
            if isinstance(outcome, Claimed):
                self._meet_fate(key, owner.run_id)

    def _claim(self, key: str, owner: Owner, *, evict: str | None) -> Claimed | Running | Done:
        begun = time.monotonic()
        outcome = self._store.claim(
            key,
            owner=owner,
            lease_seconds=self._terms.lease_seconds,
            ttl_seconds=self._terms.ttl_seconds,
            evict=evict,
        )
        if isinstance(outcome, Claimed):
            self._note("claim", key, owner.run_id, begun, fencing=outcome.fencing, task=owner.task_id)
        elif isinstance(outcome, Done):
            self._note("done", key, outcome.result.decode(), begun)
        return outcome

    def _meet_fate(self, key: str, token: str) -> None:
        fate = self._chance.choices(list(FATES), list(FATES.values()))[0]
        if fate == "die":
            self._die(key, token)
        if fate == "pause":
            time.sleep(self._terms.lease_seconds * self._chance.uniform(0.9, 2.0))
        if fate == "renew":
            for _ in range(3):
                time.sleep(self._terms.lease_seconds / 4)
                self._act("renew", key, token, lease_seconds=self._terms.lease_seconds)
        if fate == "park":
            self._act("park", key, token, lease_seconds=self._terms.lease_seconds)
        elif fate == "release":
            self._act("release", key, token)
        else:
            self._act("commit", key, token, result=token.encode(), ttl_seconds=self._terms.ttl_seconds)
        if fate == "commit and die":
            self._die(key, token)

    def _act(self, action: str, key: str, token: str, **options: object) -> None:
        begun = time.monotonic()
        is_done = getattr(self._store, action)(key, token, **options)
        self._note(action, key, token, begun, ok=is_done)

    def _die(self, key: str, token: str) -> None:
        self._note("die", key, token, time.monotonic())
        os.kill(os.getpid(), signal.SIGKILL)

    def _note(self, what: str, key: str, token: str, begun: float, **facts: object) -> None:
        line = {"what": what, "key": key, "token": token, "from": begun, "to": time.monotonic(), **facts}
        os.write(self._log, f"{json.dumps(line)}\n".encode())


def claim_in_child(url: str, folder: Path, keys: list[str], until: float, number: int) -> int:
    """Fork a claimer of the result backend `url` and return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(folder / f"{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        store = store_for(Celery("stress", backend=url, set_as_current=False))
        Claimer(store, terms_for(url), log, random.Random(number)).run(keys, until)
        code = 0
    finally:
        os._exit(code)
