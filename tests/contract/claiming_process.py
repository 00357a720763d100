"""A process that claims: python claiming_process.py URL hold KEY | race KEY COUNT

Says "ready", waits for a line on stdin, then acts and prints one line for each claim that it got. `hold` claims KEY and
waits to be killed; `race` claims and commits KEY.0 to KEY.COUNT-1.
"""

from __future__ import annotations

import sys

from celery import Celery

from celery_sharding.dedup.claims import Claimed
from celery_sharding.dedup.owners import new_owner
from celery_sharding.dedup.stores import store_for


def main(url: str, action: str, key: str, count: str = "1") -> None:
    app = Celery("claiming", backend=url, set_as_current=False)
    store = store_for(app)
    say("ready")
    sys.stdin.readline()
    names = [key] if action == "hold" else [f"{key}.{number}" for number in range(int(count))]
    for name in names:
        outcome = store.claim(name, owner=new_owner("a task"), lease_seconds=600, ttl_seconds=3_600)
        if isinstance(outcome, Claimed):
            if action == "race" and not store.commit(name, outcome.token, result=b"done", ttl_seconds=3_600):
                say(f"refused {name}")
            say(f"{name} {outcome.token} {outcome.fencing}")
    if action == "hold":
        sys.stdin.read()


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
