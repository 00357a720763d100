"""A process that is killed leaves exactly one effect, if that is written in the claim's transaction."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT, TESTS, python_path
from support.shop_databases import DATABASES, url_of

# Through Django a transaction is begun, entered and committed in the same way on each database.
FURTHER = {"django-postgresql", "django-mariadb"}
CASES = [
    pytest.param(*each.values, id=each.id, marks=(*each.marks, *([pytest.mark.slow] if each.id in FURTHER else [])))
    for each in DATABASES
]


@pytest.mark.parametrize("database", CASES)
def test_a_process_killed_after_any_statement_leaves_one_effect(
    database: tuple[str, str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    # Given a database for the effects, in which the claim store keeps its records, too
    kind, name = database
    url = url_of(name, request, tmp_path)
    records = f"sqlite:///{tmp_path / 'records.sqlite'}" if name == "sqlite" else url
    # When a process is killed after its first, second, … statement, and the task is run again after each
    done = subprocess.run(
        [sys.executable, "-m", "support.killed_payer", kind, url, records],
        env=os.environ | {"PYTHONPATH": python_path(TESTS, ROOT)},
        text=True,
        capture_output=True,
        timeout=170,
        check=False,
    )
    # Then each left one effect
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) > 10
