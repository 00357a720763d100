"""Puts the hooks of `table` in, in the order that stands there."""

from __future__ import annotations

import hashlib
import inspect
import textwrap
from importlib import import_module
from typing import Any

from celery_sharding.celery_hooks.table import HOOKS, Hook, Stage


def install_hooks(stage: Stage, *place: Any) -> None:
    """Install the hooks of a stage.

    Args:
        place: Where: the app (`Stage.APP`), nothing (`Stage.COMMANDS`), else the `WorkerSite`.
    """
    for hook in HOOKS[stage]:
        module, _, name = hook.by.partition(":")
        getattr(import_module(f"{__package__}.{module}"), name)(*place)


def read_digest(hook: Hook) -> str:
    """Return the digest of the source that a hook was written against, comments and blank lines left out."""
    code = "\n".join(line for name in (hook.target, *hook.reads) for line in _read_code(name))
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def _read_code(target: str) -> list[str]:
    module, _, name = target.partition(":")
    found: Any = import_module(module)
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    for inside in ("fget", "func", "__func__"):  # of properties and class methods
        found = getattr(found, inside, None) or found
    lines = textwrap.dedent(inspect.getsource(found)).splitlines()
    return [line.rstrip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
