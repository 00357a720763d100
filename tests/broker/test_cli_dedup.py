"""`celery -A app shards dedup …` as people and programs run it: real processes, a real Redis, a real terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import redis
from celery import Celery

from celery_sharding.dedup.claims import DONE, RELEASED, ClaimStore
from celery_sharding.dedup.owners import new_owner
from celery_sharding.dedup.stores import store_for
from support.paths import python_path

APP = """
import os
from celery import Celery
from celery_sharding import deduplicate

app = Celery("till", backend=os.environ["TILL_BACKEND"])
app.conf.imports = ["celery_sharding.dedup.tasks"]

@app.task
@deduplicate(key="event")
def pay(event):
    pass
"""


class Till:
    """An app without groups, its claims, and what its command line says."""

    def __init__(self, folder: Path, backend: str) -> None:
        (folder / "till.py").write_text(APP)
        path = python_path(folder)
        self.env = {**os.environ, "TILL_BACKEND": backend, "PYTHONPATH": path}
        self.store: ClaimStore = store_for(Celery(backend=backend, set_as_current=False))
        self.key = f"till.pay:{uuid.uuid4().hex}"

    def claim(self, *, ttl_seconds: float = 3_600) -> str:
        """Claim `key` for a run in this process and return its token."""
        owner = new_owner("task-1")
        self.store.claim(self.key, owner=owner, lease_seconds=600, ttl_seconds=ttl_seconds)
        return owner.run_id

    def finish(self, *, ttl_seconds: float = 3_600) -> None:
        assert self.store.commit(self.key, self.claim(), result=b"12345", ttl_seconds=ttl_seconds)

    def state(self) -> str | None:
        shown = self.store.show(self.key)
        return None if shown is None else shown.state

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._command(arguments),
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def run_at_terminal(self, *arguments: str, answer: str) -> tuple[int, str]:
        """Run with a terminal on stdin, where `answer` is typed; return exit code and stdout."""
        ours, theirs = pty.openpty()
        try:
            os.write(ours, f"{answer}\n".encode())
            done = subprocess.run(
                self._command(arguments), env=self.env, stdin=theirs, capture_output=True, text=True, timeout=60
            )
        finally:
            os.close(ours)
            os.close(theirs)
        return done.returncode, done.stdout

    def _command(self, arguments: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", "celery", "-A", "till", "shards", "dedup", *arguments]


@pytest.fixture
def till(tmp_path: Path, redis_url: str) -> Till:
    return Till(tmp_path, redis_url)


def test_show_says_who_holds_a_claim_and_for_how_long(till):
    till.claim()

    done = till.run("show", till.key)

    title, *facts = done.stdout.splitlines()
    assert (done.returncode, done.stderr, title) == (0, "", f"{till.key}: running")
    assert f"task task-1, process {os.getpid()} on" in facts[0]
    assert [line.split()[0] for line in facts] == ["holder", "lease", "attempts", "fencing", "kept"]
    assert "left" in facts[1]


def test_show_says_for_programs_what_a_finished_run_keeps(till):
    till.finish()

    done = till.run("show", till.key, "--json")

    found = json.loads(done.stdout)
    assert (found["state"], found["result_bytes"], found["attempts"]) == (DONE, 5, 1)
    assert (found["holder"], found["lease_left_seconds"], found["task_id"]) == (None, None, "task-1")
    assert 0 < found["expires_in_seconds"] <= 3_600


def test_an_unknown_key_is_no_success_and_a_key_without_its_task_is_completed(till):
    done = till.run("show", "evt-1")

    assert (done.returncode, done.stdout) == (1, "")
    assert "nothing is known of evt-1" in done.stderr
    assert "till.pay:evt-1" in done.stderr
    assert "before the key" not in till.run("show", till.key).stderr


def test_forget_without_a_terminal_needs_yes(till):
    till.finish()

    refused = till.run("forget", till.key)
    assert (refused.returncode, refused.stdout, till.state()) == (2, "", DONE)
    assert "--yes" in refused.stderr

    done = till.run("forget", till.key, "--yes")
    assert (done.returncode, till.state()) == (0, RELEASED)
    assert till.key in done.stdout


@pytest.mark.parametrize(("answer", "code", "state"), [("n", 1, DONE), ("y", 0, RELEASED)])
def test_forget_asks_at_a_terminal(till, answer, code, state):
    till.finish()

    assert till.run_at_terminal("forget", till.key, answer=answer)[0] == code
    assert till.state() == state


def test_forget_refuses_what_is_running_unless_forced_and_its_commit_then(till):
    token = till.claim()

    refused = till.run("forget", till.key, "--yes")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "is running" in refused.stderr
    assert "--force" in refused.stderr
    assert till.store.renew(till.key, token, lease_seconds=600)

    assert till.run("forget", till.key, "--yes", "--force").returncode == 0
    assert not till.store.commit(till.key, token, result=b"1", ttl_seconds=60)


def test_a_damaged_record_is_forgotten_by_force_only(till, redis_url):
    # Given a record that a newer version wrote
    till.finish()
    with redis.Redis.from_url(redis_url) as client:
        client.hset(f"celery-sharding:dedup:{till.key}", "version", 2)
    # When it is shown, or to be forgotten, then its key is named, and it is kept
    for arguments in (("show", till.key), ("forget", till.key, "--yes")):
        done = till.run(*arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert till.key in done.stderr
    # And by force it is gone
    assert till.run("forget", till.key, "--yes", "--force").returncode == 0
    assert till.state() is None


def test_purge_deletes_what_has_expired_in_a_database(tmp_path):
    # Given an expired claim, and one that is not
    till = Till(tmp_path, f"db+sqlite:///{tmp_path}/results.sqlite")
    till.finish(ttl_seconds=1e-6)
    expired, till.key = till.key, "till.pay:other"
    till.finish()
    # When they are purged, then one is deleted
    assert till.run("purge").stdout == "1 expired claims deleted\n"
    assert till.run("purge").stdout == "0 expired claims deleted\n"
    assert (till.store.show(expired), till.state()) == (None, DONE)


def test_a_store_out_of_reach_has_its_own_exit_code_and_no_password_is_shown(till):
    till.env["TILL_BACKEND"] = "redis://:hunter2@127.0.0.1:1/0"

    for arguments in (("show", till.key), ("forget", till.key, "--yes")):
        done = till.run(*arguments)
        assert (done.returncode, done.stdout) == (69, "")
        assert "hunter2" not in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("backend", ["rpc://", "cache+memory://"])
def test_a_backend_whose_claims_no_command_can_see_is_wrong_usage(till, backend):
    till.env["TILL_BACKEND"] = backend

    done = till.run("show", till.key)

    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["show", "forget", "purge"])
def test_every_verb_has_examples_in_its_help(till, verb):
    done = till.run(verb, "--help")

    assert done.returncode == 0
    assert f"celery -A shop shards dedup {verb}" in done.stdout
