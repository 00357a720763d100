"""ARCHITECTURE.md is true: what it names is there, nothing is left out, and its floors are those of import-linter."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from itertools import pairwise

import pytest

from support.architecture import PACKAGE, PAGE, find, names_in, read_floors, read_paths, read_places, read_way
from support.paths import APPS, ROOT, TESTS, python_path

CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


def test_it_is_one_page() -> None:
    assert len(PAGE.splitlines()) <= 150


def test_every_path_that_it_names_exists() -> None:
    assert [path for path in sorted(read_paths()) if find(path) is None] == []


def test_every_package_is_named() -> None:
    packages = {f"{path.parent.relative_to(PACKAGE)}/" for path in PACKAGE.rglob("__init__.py")} - {"./"}
    assert packages - read_paths() == set()


def test_every_function_that_it_names_is_in_that_file() -> None:
    missing = [f"{path}::{name}" for path, name in read_places() if name not in names_in(PACKAGE / path)]
    assert missing == []


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract["name"])
def test_its_floors_are_the_layers_of_import_linter(contract: dict[str, object]) -> None:
    # Given the layers, highest first, and what the page says of their modules
    containers = contract.get("containers", [""])
    layers = [[_name(module, containers[0]) for module in layer.split(":")] for layer in contract["layers"]]
    floors = read_floors()
    # Then it knows all of them, each below those of the layer above it
    assert [module for layer in layers for module in layer if module not in floors] == []
    for above, below in pairwise(layers):
        assert min(floors[module] for module in above) > max(floors[module] for module in below), (above, below)


def test_the_way_of_a_message_is_short() -> None:
    way = [step for steps in read_way().values() for step in steps]
    assert 10 <= len(way) <= 30
    assert len({step.partition("::")[0] for step in way}) <= 14


def test_a_first_delivery_goes_the_way_that_is_drawn() -> None:
    # Given a worker that has run a message, and so has all that it makes once; when it runs another
    environment = {**os.environ, "PYTHONPATH": python_path(TESTS)}
    command = [sys.executable, str(APPS / "followed.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    # Then that goes through the functions that the page names, in that order
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def _name(module: str, container: str) -> str:
    inside = container.removeprefix("celery_sharding").strip(".")
    name = module.strip(" ()").removeprefix("celery_sharding.")
    return f"{inside}.{name}".strip(".")
