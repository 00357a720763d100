"""The script that runs the tests: it misses no failure, and ends with all that it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from celery_sharding.testing.processes import is_alive, wait_until
from support.paths import ROOT

TESTS_FAILED = 1
TESTS = """
import pathlib
import pytest

HERE = pathlib.Path(__file__).parent

@pytest.mark.xdist_group("some")
def test_that_always_fails():
    assert (HERE / "mended").exists()

@pytest.mark.parametrize("address", ["a@b"])
def test_that_fails_once(address):
    seen = (HERE / "seen").exists()
    (HERE / "seen").touch()
    assert seen
"""
CRASHING_TEST = """
import os, pathlib

HERE = pathlib.Path(__file__).parent

def test_that_ends_its_process_once():
    if not (HERE / "seen").exists():
        (HERE / "seen").touch()
        os._exit(1)
"""
GROUPED_TESTS = """
import os, pathlib
import pytest

@pytest.mark.xdist_group("some")
@pytest.mark.parametrize("number", range(8))
def test_of_a_group(number):
    (pathlib.Path(__file__).parent / f"process-{os.getpid()}").touch()
"""
LONG_TEST = """
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


def start(
    folder: Path, script: str, *, processes: int = 1, process_group: int | None = None
) -> subprocess.Popen[bytes]:
    """Start the script on a file of tests."""
    (folder / "test_some.py").write_text(script)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SHARDING_TEST_", "PYTEST_"))}
    env |= {"PYTEST": str(Path(sys.executable).with_name("pytest")), "TEST_PROCESSES": str(processes)}
    env |= {"SHARDING_TEST_BROKER_URL": "not asked", "SHARDING_TEST_REDIS_URL": "not asked"}
    return subprocess.Popen(
        [ROOT / "scripts" / "with_servers", ROOT / "scripts" / "run_tests", folder],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=process_group,
    )


@pytest.fixture
def inside() -> Iterator[Path]:
    """A folder inside the project, as all tests are, where nobody looks for tests."""
    (ROOT / ".pytest_cache").mkdir(exist_ok=True)
    with TemporaryDirectory(dir=ROOT / ".pytest_cache") as folder:
        yield Path(folder)


@pytest.mark.parametrize("is_mended", [False, True])
def test_every_test_that_failed_runs_once_more_and_counts(inside: Path, is_mended: bool) -> None:
    # Given a test that passes the second time, and one of a group that does not, or does, too
    if is_mended:
        (inside / "mended").touch()
    # When they run
    status = start(inside, TESTS).wait(80)
    # Then the script fails if one does at last
    assert status == (0 if is_mended else TESTS_FAILED)


def test_a_process_that_crashes_is_a_failure(inside: Path) -> None:
    # Given a test that ends the process it runs in, and passes when it is run again
    # When it runs, then the script fails
    assert start(inside, CRASHING_TEST).wait(80) == TESTS_FAILED


def test_the_tests_of_a_group_run_in_one_process(inside: Path) -> None:
    # Given tests of one group, and what our own tests are divided by
    (inside / "conftest.py").write_text("from support.groups import pytest_collection_finish\n")
    # When two processes share the tests
    status = start(inside, GROUPED_TESTS, processes=2).wait(80)
    # Then one of them ran them all
    assert status == 0
    assert len(list(inside.glob("process-*"))) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_ends_with_the_script_and_fixtures_remove_what_they_have_started(tmp_path: Path, number: int) -> None:
    # Given a test that runs in a process beside pytest's
    script = start(tmp_path, LONG_TEST, process_group=0)
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
