"""The units for systemd: what they start, how they end it, and how they lock it in."""

from __future__ import annotations

import re

import pytest

from support.deployed import HARDENED, SYSTEMD, command_of, read_app, read_unit

UNITS = sorted(SYSTEMD.glob("*.service"))
WORKER = read_unit(SYSTEMD / "celery-sharding-worker@.service")


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_runs_the_app_as_nobody_special_and_is_locked_in(path) -> None:
    unit = read_unit(path)
    assert (unit["User"], unit["Group"], unit["Type"]) == (["celery"], ["celery"], ["simple"])
    assert (unit["Restart"], unit["StartLimitIntervalSec"]) == (["always"], ["0"])
    assert unit["WantedBy"] == ["multi-user.target"]
    # Passwords come from a file; the one of all units comes first, so that the unit's own counts
    assert unit["EnvironmentFile"][0] == "/etc/celery-sharding/shop.env"
    assert command_of(unit, "first")[:3] == ["/srv/shop/.venv/bin/celery", "-A", "shop"]
    # systemd reads a folder for all units whose name has the part before the dash
    assert path.name.startswith(HARDENED.parent.name.removesuffix(".service.d"))


def test_the_locks_leave_a_prefork_pool_what_it_needs() -> None:
    locks = read_unit(HARDENED)
    assert (locks["NoNewPrivileges"], locks["ProtectSystem"], locks["PrivateTmp"]) == (["yes"], ["strict"], ["yes"])
    assert locks["CapabilityBoundingSet"] == [""]
    # The broker is asked over TCP, by IPv4 or IPv6; a pool talks over pipes, and a store may have a local socket
    assert set(locks["RestrictAddressFamilies"][0].split()) == {"AF_UNIX", "AF_INET", "AF_INET6"}
    # Whether a holder of a claim is gone is read from /proc, and what is compiled at run time would be refused
    assert not {"ProcSubset", "MemoryDenyWriteExecute", "PrivateNetwork"} & set(locks)


def test_a_worker_is_stopped_warm_and_given_the_time_of_its_longest_task() -> None:
    assert (WORKER["KillMode"], WORKER["KillSignal"]) == (["mixed"], ["SIGTERM"])
    minutes = int(WORKER["TimeoutStopSec"][0].removesuffix("min"))
    assert minutes * 60 > max(map(int, re.findall(r"time_limit=(\d+)", read_app())))
    # A process of the pool that takes too much memory must not end the others
    assert WORKER["OOMPolicy"] == ["continue"]


def test_workers_of_one_host_share_neither_name_nor_file() -> None:
    names = [command_of(WORKER, name, WORKER_OPTIONS="-c 8") for name in ("first", "second")]
    assert " ".join(names[0]) == "/srv/shop/.venv/bin/celery -A shop worker -n first@%h -E -l INFO -c 8"
    assert names[1][5] == "second@%h"
    assert WORKER["RuntimeDirectory"] == ["celery-sharding-worker-%i"]
    assert WORKER["Environment"] == ["HEARTBEAT_FILE=%t/celery-sharding-worker-%i/heartbeat"]
