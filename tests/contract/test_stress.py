"""A short stress of the claim stores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import TESTS


@pytest.mark.parametrize("store", ["redis", "sqlite"])
def test_eight_processes_on_few_keys_have_no_two_holders(store: str, redis_url: str, tmp_path: Path) -> None:
    url = redis_url if store == "redis" else f"db+sqlite:///{tmp_path}/claims.sqlite"
    command = [sys.executable, "-m", "stress", url, "--seconds", "6", "--keys", "30"]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 violations; claim " in done.stdout
    assert ", commit " in done.stdout
