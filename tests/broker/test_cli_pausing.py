"""`shards pause`, `resume` and `history` as people and programs run them."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys

import pytest
from kombu import Connection

from celery_sharding.rabbitmq.queues import queue_exists
from support.shops import Shop

pytestmark = pytest.mark.timeout(120)

NO_SHARD_4 = "group '{group}' has the shards 0 to 3; there is no {group}.004"


def celery(shop: Shop, *arguments: str, **env: str) -> tuple[int, str, str]:
    """Run `celery -A shop …`; return its exit status, and what it wrote to stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", shop.module, *arguments],
        env={**os.environ, **shop.env, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def shards(shop: Shop, *arguments: str, **env: str) -> tuple[int, str, str]:
    return celery(shop, "shards", *arguments, **env)


def test_a_shard_is_paused_and_resumed_and_the_history_says_by_whom(shop: Shop) -> None:
    # Given a group that is not declared yet, when it is paused, then that is refused, and nothing of it is made
    name = shop.group
    status, printed, error = shards(shop, "pause", name)
    assert (status, printed) == (1, "")
    assert f"group '{name}' is not declared yet; run `celery shards declare {name}`" in error
    with Connection(shop.broker_url) as connection:
        assert not queue_exists(connection, shop.names.manifest)
    assert shards(shop, "history", name)[0] == 1
    # Given the group, when a shard is paused twice, then the second time says so, and is no error
    assert shards(shop, "declare")[0] == 0
    assert shards(shop, "pause", f"{name}/1") == (0, f"{name}/1: paused\n", "")
    assert shards(shop, "pause", f"{name}.001") == (0, f"{name}/1: already paused\n", "")
    assert shards(shop, "pause", f"{name}/4")[::2] == (2, f"Error: {NO_SHARD_4.format(group=name)}\n")
    # When the group is resumed, then so is the shard
    assert shards(shop, "resume", name) == (0, f"{name}: resumed\n", "")
    assert shards(shop, "resume", f"{name}/1") == (0, f"{name}/1: not paused\n", "")
    # Then the history tells it, for people and for programs
    _, printed, _ = shards(shop, "history", name)
    title, headings, *lines = printed.splitlines()
    assert (title, headings.split()) == (f"{name}:", ["WHEN", "WHO", "WHAT", "RESULT"])
    assert [line.endswith("done") for line in lines] == [True] * len(lines)
    assert "first generation, 4 shards" in printed
    status, printed, error = shards(shop, "history", name, "--json", "--limit", "2")
    (group,) = json.loads(printed)["groups"]
    assert [(entry["event"], entry["what"]) for entry in group["entries"]] == [
        ("pause", f"{name}/1 paused"),
        ("resume", f"{name} resumed"),
    ]
    assert group["entries"][0]["by"].startswith(f"{getpass.getuser()}@")
    assert (status, error) == (0, "")


def test_celerys_command_line_knows_how_to_inspect_shards(shop: Shop) -> None:
    status, printed, _ = celery(shop, "inspect", "--list")
    assert status == 0
    assert "shards" in printed.split()
