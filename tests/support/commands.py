"""Commands of `celery -A app shards …`: run as people and programs run them, or called in this process."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from celery.bin.base import CLIContext
from click.testing import CliRunner, Result

from celery_sharding.cli import shards


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


def call_shards(app: Any, *arguments: str) -> Result:
    """Call a command in this process: as fast as a call, and with the same exit codes; stdout and stderr are apart."""
    context = CLIContext(app=app, no_color=True, workdir=None)
    return CliRunner().invoke(shards, list(arguments), obj=context, prog_name="celery shards", catch_exceptions=False)
