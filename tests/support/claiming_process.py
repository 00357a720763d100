"""Processes that claim: python -m support.claiming_process URL hold KEY | race KEY COUNT PROCESSES

Says "ready", waits for a line on stdin, then acts and prints one line for each claim that it got. `hold` claims KEY and
waits to be killed; `race` claims and commits KEY.0 to KEY.COUNT-1 in each of PROCESSES processes, which begin together.
"""

from __future__ import annotations

import os
import sys

from celery import Celery

from celery_sharding.dedup.claims import Claimed, ClaimStore
from celery_sharding.dedup.owners import new_owner
from celery_sharding.dedup.stores import store_for


def main(url: str, action: str, key: str, count: str = "1", processes: str = "1") -> None:
    if action == "hold":
        store = open_store(url)
        say("ready")
        sys.stdin.readline()
        outcome = store.claim(key, owner=new_owner("a task"), lease_seconds=600, ttl_seconds=3_600)
        assert isinstance(outcome, Claimed), outcome
        say(f"{key} {outcome.token} {outcome.fencing}")
        sys.stdin.read()
        return
    ready, start = os.pipe(), os.pipe()
    children = [fork_racer(url, key, int(count), ready, start) for _ in range(int(processes))]
    os.close(start[0])
    for _ in children:
        os.read(ready[0], 1)
    say("ready")
    sys.stdin.readline()
    os.close(start[1])  # which lets all of them go
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


def fork_racer(url: str, key: str, count: int, ready: tuple[int, int], start: tuple[int, int]) -> int:
    child = os.fork()
    if child:
        return child
    os.close(start[1])
    store = open_store(url)
    store.show(key)  # connects
    os.write(ready[1], b".")
    os.read(start[0], 1)
    for number in range(count):
        name = f"{key}.{number}"
        outcome = store.claim(name, owner=new_owner("a task"), lease_seconds=600, ttl_seconds=3_600)
        if isinstance(outcome, Claimed):
            if not store.commit(name, outcome.token, result=b"done", ttl_seconds=3_600):
                say(f"refused {name}")
            say(f"{name} {outcome.token} {outcome.fencing}")
    os._exit(0)


def open_store(url: str) -> ClaimStore:
    return store_for(app_for(url))


def app_for(url: str) -> Celery:
    """Return an app with the result backend `url`; for Django with the alias of a database or cache: django-db/ALIAS"""
    backend, _, alias = url.partition("/") if url.startswith("django-") else (url, "", "")
    app = Celery("claiming", backend=backend, set_as_current=False)
    if backend == "django-cache":
        app.conf.cache_backend = alias
    os.environ["DJANGO_CLAIMS_DATABASE"] = alias if backend == "django-db" else "default"
    if backend.startswith("sentinel:"):
        app.conf.result_backend_transport_options = {"master_name": "claims"}
    if alias:
        import django

        django.setup()
    return app


def say(line: str) -> None:
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
