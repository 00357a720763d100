"""Where the project's files are, and what processes that tests start can import."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
APPS = TESTS / "support" / "apps"


def python_path(*folders: Path) -> str:
    """Return a PYTHONPATH with `folders` in front of our own, such as `APPS` for a worker of a shop."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
