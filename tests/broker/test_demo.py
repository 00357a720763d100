"""`make demo`, small, on the broker under test."""

from __future__ import annotations

import os
import subprocess
import sys

from support.paths import ROOT


def _run_demo(*options: str, broker_url: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "BROKER_URL": broker_url, "PYTHONPATH": str(ROOT / "examples" / "demo"), "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-m", "demo", *options], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_the_demo_keeps_order_through_the_kill_of_a_worker(broker_url: str):
    # When 300 real events are replayed
    done = _run_demo("--limit", "300", broker_url=broker_url)
    # Then a worker was killed, and the shards lost, reordered and doubled nothing
    assert done.returncode == 0, done.stdout
    assert "killed" in done.stdout
    (row,) = [line for line in done.stdout.splitlines() if "celery-sharding" in line and "300" in line]
    assert row.split()[1:5] == ["300", "0", "0", "0"]


def test_the_demo_refuses_a_broker_that_is_no_rabbitmq():
    done = _run_demo("--limit", "5", broker_url="redis://127.0.0.1:1/0")
    assert done.returncode == 1
    assert "the demo needs a RabbitMQ" in done.stdout


def test_the_demo_says_that_a_broker_does_not_answer():
    done = _run_demo("--limit", "5", broker_url="amqp://guest:secret@127.0.0.1:1//")
    assert done.returncode == 1
    assert "does not answer" in done.stdout
    assert "secret" not in done.stdout
