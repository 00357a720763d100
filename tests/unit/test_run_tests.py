"""The script that runs the tests ends with all that it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from celery_sharding.testing.processes import is_alive, wait_until

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import os, pathlib, threading
import pytest

HERE = pathlib.Path(__file__).parent

@pytest.fixture
def server():
    yield
    (HERE / "removed").touch()

def test_that_never_ends(server):
    (HERE / "begun.part").write_text(f"{os.getpid()} {os.getppid()}")
    (HERE / "begun.part").rename(HERE / "begun")
    threading.Event().wait()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_ends_with_the_script_and_fixtures_remove_what_they_have_started(tmp_path: Path, number: int) -> None:
    # Given tests that run in a process beside pytest's
    (tmp_path / "test_long.py").write_text(TESTS)
    env = os.environ | {"PYTEST": str(Path(sys.executable).with_name("pytest")), "TEST_PROCESSES": "1"}
    env |= {"SHARDING_TEST_BROKER_URL": "not asked", "SHARDING_TEST_REDIS_URL": "not asked"}
    script = subprocess.Popen(
        [ROOT / "scripts" / "with_servers", ROOT / "scripts" / "run_tests", tmp_path, "-p", "no:cacheprovider"],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        assert wait_until((tmp_path / "begun").exists, timeout_seconds=80)
    finally:
        # When the script that has started all is told to end, or somebody presses Ctrl-C at its terminal
        if number == signal.SIGINT:
            os.killpg(script.pid, number)
        else:
            script.send_signal(number)
        status = script.wait(80)
    # Then it does when nothing is left
    assert status == 128 + number
    assert (tmp_path / "removed").exists()
    assert not any(is_alive(int(pid)) for pid in (tmp_path / "begun").read_text().split())
