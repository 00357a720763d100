"""The programs of other packages that tests, benchmarks and pictures run, such as databases and a browser.

`make test` has installed all of them by then, in one go. What is run by itself finds its own here: a program that is
missing is installed, if that is allowed, and named if it is not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from celery_sharding.testing import ServerMissing
from support.paths import ROOT

_INSTALL = ROOT / "scripts" / "install_servers"


def find_program(name: str, *, package: str, folders: Sequence[str] = ()) -> str:
    """Return the path of a program, after installing its package if it is missing.

    Args:
        folders: Patterns of folders that are looked into first; the last match in alphabetical order counts.

    Raises:
        ServerMissing: It is missing and cannot be installed; the message says why, and what to do.
    """
    found = _find(name, folders)
    if found is None:
        done = subprocess.run([_INSTALL, package], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        found = _find(name, folders)
        if found is None:
            raise ServerMissing(done.stderr.strip() if done.returncode else f"{package} has no program {name}")
    return found


def _find(name: str, folders: Sequence[str]) -> str | None:
    for folder in folders:
        for place in sorted(Path("/").glob(folder.lstrip("/")), reverse=True):
            if (place / name).exists():
                return str(place / name)
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))
