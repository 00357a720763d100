"""How `celery shards` ends: exit codes, and errors of ours as one line on stderr.

0 ok, 1 something is wrong, or the output cannot be written, 2 usage or configuration, 69 the broker or the claim store
is out of reach.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any

import click

from celery_sharding.errors import (
    BrokerUnavailable,
    ConfigurationError,
    NoUsableStore,
    ShardingError,
    StoreUnavailable,
    UnsupportedBroker,
)

# Of a device that is full or broken. A pipe that is closed is click's own: it ends with 1, and says nothing.
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class Unhealthy(click.ClickException):
    """Something is wrong with a group, or a claim."""

    exit_code = 1


class WrongUsage(click.ClickException):
    """The command line, or the app's configuration, is wrong."""

    exit_code = 2


class Unreachable(click.ClickException):
    """The broker, or the claim store, is out of reach."""

    exit_code = 69


class Verbs(click.Group):
    """Verbs that end with a line on stderr, too, if what they print, their help included, cannot be written."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        with _written():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with _written():
            return super().invoke(ctx)


@contextlib.contextmanager
def _written() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno not in _UNWRITABLE:
            raise
        # What is left of it would be written, and fail, once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Unhealthy(f"the output cannot be written: {exc.strerror}") from exc


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn our errors into a line on stderr and the exit code they mean."""
    try:
        yield
    except (BrokerUnavailable, StoreUnavailable) as exc:
        raise Unreachable(str(exc)) from exc
    except (ConfigurationError, NoUsableStore, UnsupportedBroker) as exc:
        raise WrongUsage(str(exc)) from exc
    except ShardingError as exc:
        raise Unhealthy(str(exc)) from exc
