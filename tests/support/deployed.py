"""Reads what is in `deploy`: objects of Kubernetes, units of systemd, and the app that both are written for."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from support.paths import ROOT

KUBERNETES = ROOT / "deploy" / "k8s"
SYSTEMD = ROOT / "deploy" / "systemd"
HARDENED = SYSTEMD / "celery-sharding-.service.d" / "hardened.conf"

Object = dict[str, Any]


def read_app() -> str:
    """Return the source of shop.py, as the how-to has it."""
    page = (ROOT / "docs" / "how-to" / "deploy.md").read_text()
    return re.findall(r"^```python\n(# shop\.py\n.*?)^```$", page, re.MULTILINE | re.DOTALL)[0]


@cache
def read_objects(path: Path) -> list[Object]:
    """Return the objects in a file; not to be changed."""
    return list(yaml.safe_load_all(path.read_text()))


def find_object(kind: str, name: str) -> Object:
    """Return the only object of this kind and name in all files."""
    [found] = [
        each
        for path in KUBERNETES.glob("*/*.yaml")
        for each in read_objects(path)
        if each["kind"] == kind and each.get("metadata", {}).get("name") == name
    ]
    return found


def container_of(workload: Object) -> Object:
    """Return the only container of a workload."""
    [container] = workload["spec"]["template"]["spec"]["containers"]
    return container


def read_unit(path: Path) -> dict[str, list[str]]:
    """Return every setting of a unit with its values, in their order; systemd allows a name more than once."""
    settings: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            name, separator, value = line.partition("=")
            assert separator, f"{path.name}: {line}"
            settings.setdefault(name, []).append(value)
    return settings


def command_of(unit: dict[str, list[str]], instance: str, **env: str) -> list[str]:
    """Return the command line of a unit as systemd makes it: specifiers, then variables that are words of their own."""
    [line] = unit["ExecStart"]
    expanded = re.sub("%(.)", lambda found: {"%": "%", "i": instance}[found[1]], line)
    words: list[str] = []
    for word in shlex.split(expanded):
        words += env.get(word[1:], "").split() if word.startswith("$") else [word]
    return words
