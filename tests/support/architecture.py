"""Reads ARCHITECTURE.md: what it names, its floors, and the way of a message."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from support.paths import ROOT

PACKAGE = ROOT / "celery_sharding"
PAGE = (ROOT / "ARCHITECTURE.md").read_text()
_ROW = re.compile(r"^\| (?P<floor>\d+) \| (?P<rooms>[^|]+) \|", re.MULTILINE)
_PATH = re.compile(r"`(?P<path>[\w./-]*(?:/|\.\w+))(?:::(?P<place>[\w.]+))?`")
_STEP = re.compile(r"^\d+\. `(?P<step>[\w/]+\.py::[\w.]+)`", re.MULTILINE)


def read_paths() -> set[str]:
    """Return all paths that the page names; folders end with a slash."""
    return {found["path"] for found in _PATH.finditer(PAGE)}


def read_places() -> list[tuple[str, str]]:
    """Return all places that the page names, as (path, dotted name)."""
    return [(found["path"], found["place"]) for found in _PATH.finditer(PAGE) if found["place"]]


def read_floors() -> dict[str, int]:
    """Return module, below the package, → the floor that it is on; one inside `worker` is called `worker.…`."""
    return {
        path.removesuffix(".py").strip("/").replace("/", "."): int(row["floor"])
        for row in _ROW.finditer(PAGE)
        for path in re.findall(r"`([\w/.]+)`", row["rooms"])
    }


def read_way() -> dict[str, list[str]]:
    """Return the functions that a message passes in its publisher, and those in its worker, as `file.py::name`."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)[2]
    publisher, worker = section.split("The broker:")
    return {"publisher": _STEP.findall(publisher), "worker": _STEP.findall(worker)}


def find(path: str) -> Path | None:
    """Return where a path leads, in the package or in the project; None: nowhere."""
    return next((place for place in (PACKAGE / path, ROOT / path) if place.exists()), None)


@cache
def names_in(path: Path) -> frozenset[str]:
    """Return the functions and classes of a file, those in classes as `Class.name`; none if there is no such file."""
    tree = ast.parse(path.read_text() if path.is_file() else "")
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return frozenset(names)
