"""What verbs print on a device that is full. A real process: Python writes once more when it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

APP = """
from celery import Celery
from celery_sharding import ShardGroup, Sharding

app = Celery("shop", broker="amqp://")
Sharding(app, groups=[ShardGroup("orders", shards=8)])
"""


OTHERS = ["export --format definitions", "dead-letters list --help", "dead-letters --help"]


@pytest.mark.parametrize("verb", ["list", "--help", *(pytest.param(verb, marks=pytest.mark.slow) for verb in OTHERS)])
def test_an_output_that_cannot_be_written_is_one_line_and_exit_code_1(tmp_path: Path, verb: str) -> None:
    (tmp_path / "shop.py").write_text(APP)

    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "celery", "-A", "shop", "shards", *verb.split()]
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False)

    assert (done.returncode, done.stderr) == (1, "Error: the output cannot be written: No space left on device\n")
