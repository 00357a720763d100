"""`celery -A app shards …` in this process: as fast as a call, and with the same exit codes."""

from __future__ import annotations

from typing import Any

from celery.bin.base import CLIContext
from click.testing import CliRunner, Result

from celery_sharding.cli import shards


def run_shards(app: Any, *arguments: str) -> Result:
    """Run a command on `app`; stdout and stderr are kept apart."""
    context = CLIContext(app=app, no_color=True, workdir=None)
    return CliRunner().invoke(shards, list(arguments), obj=context, prog_name="celery shards", catch_exceptions=False)
