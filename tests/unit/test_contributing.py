"""CONTRIBUTING.md: what it tells to type is there, and does something."""

from __future__ import annotations

import re

from support.paths import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def test_every_target_that_it_names_exists_and_none_is_kept_back() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))
    told = set(re.findall(r"`make ([a-z-]+)", TEXT))
    assert told <= targets
    assert targets - told == {"help", "lint"}


def test_the_example_of_a_single_test_finds_some() -> None:
    # Given a folder and a word, which pytest looks for in the names of files, too
    ((folder, word),) = re.findall(r"^    scripts/with_servers \.venv/bin/pytest (\S+) -k (\w+)$", TEXT, re.MULTILINE)
    # Then there is such a file
    assert list((ROOT / folder).glob(f"test_*{word}*.py"))
