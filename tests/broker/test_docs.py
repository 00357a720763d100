"""The documentation does what it says: every page is followed from its first block to its last, on real servers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from kombu import Connection

from celery_sharding.testing.processes import find_free_port
from support.pages import Reader
from support.paths import ROOT

pytestmark = pytest.mark.timeout(400)

PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in [
        ROOT / "README.md",
        *ROOT.glob("docs/**/*.md"),
        *(page for page in ROOT.glob("examples/*/README.md") if page.parent.name not in ("demo", "data")),
    ]
)


@pytest.fixture
def reader(tmp_path: Path, group_name: str, broker_url: str, redis_url: str) -> Iterator[Reader]:
    """Somebody who follows a page, with a group, a queue and event ids of their own."""
    names = {
        r"\borders\b": group_name,
        r"\bevents\b": f"{group_name}-events",
        r"\bevt-": f"{group_name}-evt-",
        '"amqp://"': f'"{broker_url}"',
        '"amqp://guest:guest@localhost/%2F"': f'"{re.sub("//$", "/%2F", broker_url)}"',
        '"redis://"': f'"{redis_url}"',
        r"\b9808\b": str(find_free_port()),
        r"\b5555\b": str(find_free_port()),
    }
    commands = tmp_path / "bin"
    commands.mkdir()
    rabbitmqctl = commands / "rabbitmqctl"
    rabbitmqctl.write_text(f'#!/bin/sh\nexec {os.environ.get("SHARDING_TEST_BROKER_CTL", "rabbitmqctl")} "$@"\n')
    rabbitmqctl.chmod(0o755)
    folder = tmp_path / "page"
    folder.mkdir()
    reader = Reader(folder, names, commands)
    yield reader
    reader.kill_workers()
    with Connection(broker_url) as connection:
        connection.channel().queue_delete(f"{group_name}-events")


@pytest.mark.parametrize("page", PAGES)
def test_the_page_does_what_it_says(reader: Reader, page: str) -> None:
    path = ROOT / page
    if path.parent.parent.name == "examples":
        reader.take_folder(path.parent)
    reader.follow(path)
    reader.stop_workers()
