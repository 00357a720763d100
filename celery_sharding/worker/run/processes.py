"""Processes of the pool that are being ended."""

from __future__ import annotations

import os


def is_gone(pid: int) -> bool:
    """Say whether a child process has ended, without reaping it: the pool does that."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except (ChildProcessError, OverflowError):
        return True
