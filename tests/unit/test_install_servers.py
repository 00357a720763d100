"""The script that installs what the tests run: in one go, and without asking for anything when all is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from support.paths import ROOT

SCRIPT = ROOT / "scripts" / "install_servers"
PROGRAMS = (
    "rabbitmq-server", "redis-server", "initdb", "mariadbd", "mariadb-install-db", "memcached", "prometheus",
    "promtool", "chromium", "chromedriver",
)  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder of programs, beside which the script finds none but those of administrators."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def add_programs(folder: Path, *names: str) -> None:
    for name in names:
        program = folder / name
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)


def install(folder: Path, *packages: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["/bin/sh", SCRIPT, *packages], env={"PATH": str(folder)}, capture_output=True, text=True)


def test_nothing_is_asked_for_when_all_programs_are_there(path: Path) -> None:
    # Given a system that has all programs, wherever they came from, and no package manager
    add_programs(path, *PROGRAMS)
    # When it is told to install what the tests need
    done = install(path)
    # Then there is nothing to do
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_all_that_is_missing_is_named_at_once_when_it_cannot_be_installed(path: Path) -> None:
    # Given a system without a package manager, and with one program of three
    add_programs(path, "present")
    # When all three are wanted
    done = install(path, "absent-server", "present", "other-server")
    # Then one line says which are missing, and that they are to be installed by hand
    assert done.returncode == 1
    assert done.stderr.startswith("missing: absent-server other-server.")
    assert len(done.stderr.splitlines()) == 1


def test_all_that_a_test_looks_for_is_installed_at_the_start() -> None:
    # Given what tests ask for when it is missing
    texts = [file.read_text() for file in (ROOT / "tests").rglob("*.py") if file != Path(__file__).resolve()]
    wanted = {name for text in texts for name in re.findall(r'\bpackage ?= ?"([\w-]+)"', text)}
    # Then it is part of what the start of `make test` installs, beside RabbitMQ and Redis
    (first,) = re.findall(r"set -- (rabbitmq-server .*)", SCRIPT.read_text())
    assert wanted | {"rabbitmq-server", "redis-server"} == set(first.split())
