"""What the files for systemd and Kubernetes start does run, is found alive and ready by their probes, and ends warm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from celery_sharding.testing.processes import find_free_port, tail, wait_until
from support.deployed import SYSTEMD, command_of, container_of, find_object, read_app, read_unit

pytestmark = pytest.mark.timeout(120)

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def folder(tmp_path: Path, group_name: str) -> Path:
    """Where the app of the how-to is, with a group of its own."""
    (tmp_path / "shop.py").write_text(read_app().replace('"orders"', f'"{group_name}"'))
    return tmp_path


@pytest.fixture
def start(folder: Path, broker_url: str, redis_url: str) -> Iterator[Start]:
    """Starts a command line as its service does: in the app's folder, with its environment."""
    started: list[subprocess.Popen[bytes]] = []

    def start(command: list[str], **env: str) -> subprocess.Popen[bytes]:
        assert Path(command[0]).name == "celery"
        with (folder / f"{len(started)}.log").open("wb") as log:
            process = subprocess.Popen(
                [str(Path(sys.executable).with_name("celery")), *command[1:]],
                cwd=folder,
                env={**os.environ, "BROKER_URL": broker_url, "RESULT_URL": redis_url, **env},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def answers(port: int, path: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False


def end(process: subprocess.Popen[bytes]) -> int:
    """Stop it as services are stopped: the main process alone gets the signal."""
    process.send_signal(signal.SIGTERM)
    return process.wait(60)


def test_the_worker_of_systemd_consumes_and_stops_warm(start: Start, folder: Path) -> None:
    # Given the template's command line for a worker called "first", with options of its own
    heartbeat = folder / "heartbeat"
    unit = read_unit(SYSTEMD / "celery-sharding-worker@.service")
    worker = start(command_of(unit, "first", WORKER_OPTIONS="-c 1"), HEARTBEAT_FILE=str(heartbeat))
    # When it is started, then its file says that it consumes
    assert wait_until(lambda: heartbeat.exists() and heartbeat.read_text() == "consuming\n", timeout_seconds=60), tail(
        folder / "0.log"
    )
    assert "first@" in (folder / "0.log").read_text()
    # And it stops warm
    assert end(worker) == 0
    assert not heartbeat.exists()


def test_flower_and_the_exporter_answer_their_probes_and_stop_warm(start: Start, folder: Path) -> None:
    # Given both of them, for systemd and for Kubernetes
    started = []
    for name in ("flower", "exporter"):
        container = container_of(find_object("Deployment", f"shop-{name}"))
        path = container["livenessProbe"]["httpGet"]["path"]
        [offered] = [str(each["containerPort"]) for each in container["ports"]]
        for command in (container["command"], command_of(read_unit(SYSTEMD / f"celery-sharding-{name}.service"), "")):
            port = find_free_port()
            own = [word.replace(offered, str(port)) for word in command]
            assert own != command
            started.append((start(own, FLOWER_BASIC_AUTH="ann:secret"), port, path))
    # When they are started, then they answer without a login
    for number, (_, port, path) in enumerate(started):
        log = folder / f"{number}.log"
        assert wait_until(lambda port=port, path=path: answers(port, path), timeout_seconds=60), tail(log)
    # And stop when they are told to
    assert [end(process) for process, _, _ in started] == [0] * 4


def test_the_probes_of_kubernetes_find_a_worker_alive_and_ready(start: Start, folder: Path) -> None:
    # Given a worker as its container starts it
    container = container_of(find_object("StatefulSet", "shop-workers"))
    heartbeat = folder / "heartbeat"

    def passes(probe: str) -> bool:
        command = container[probe]["exec"]["command"]
        own = [word.replace("/tmp/heartbeat", str(heartbeat)) for word in command]
        return subprocess.run(own, stderr=subprocess.DEVNULL).returncode == 0

    assert not passes("startupProbe")
    worker = start(container["command"], HEARTBEAT_FILE=str(heartbeat))
    # When it consumes, then all probes pass
    assert wait_until(lambda: passes("readinessProbe"), timeout_seconds=60), tail(folder / "0.log")
    assert passes("startupProbe")
    assert passes("livenessProbe")
    # And when it is halted, and its file is older than a minute, it is not alive; nor ready, whatever the file says
    worker.send_signal(signal.SIGSTOP)
    os.waitpid(worker.pid, os.WUNTRACED)
    os.utime(heartbeat, (0, 0))
    assert heartbeat.read_text() == "consuming\n"
    assert not passes("livenessProbe")
    assert not passes("readinessProbe")
    # And when it goes on but only connects, it is alive and not ready
    heartbeat.write_text("reconnecting\n")
    assert passes("livenessProbe")
    assert not passes("readinessProbe")
    # And it stops warm
    worker.send_signal(signal.SIGCONT)
    assert end(worker) == 0
