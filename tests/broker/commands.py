"""Commands of `celery -A app shards …`, run as people and programs run them."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Mapping


def run_shards(
    app: str, *arguments: str, env: Mapping[str, str], answer: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command without a terminal, or at one where `answer` is typed."""
    command = [sys.executable, "-m", "celery", "-A", app, "shards", *arguments]
    stdin, ours = subprocess.DEVNULL, None
    if answer is not None:
        ours, stdin = pty.openpty()
        os.write(ours, f"{answer}\n".encode())
    try:
        return subprocess.run(
            command, env={**os.environ, **env}, stdin=stdin, capture_output=True, text=True, timeout=60
        )
    finally:
        if ours is not None:
            os.close(ours)
            os.close(stdin)
