"""How `celery shards` ends: exit codes, and errors of ours as one line on stderr.

0 ok, 1 something is wrong, 2 usage or configuration, 69 the broker or the claim store is out of reach.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import click

from celery_sharding.errors import (
    BrokerUnavailable,
    ConfigurationError,
    NoUsableStore,
    ShardingError,
    StoreUnavailable,
    UnsupportedBroker,
)


class Unhealthy(click.ClickException):
    """Something is wrong with a group, or a claim."""

    exit_code = 1


class WrongUsage(click.ClickException):
    """The command line, or the app's configuration, is wrong."""

    exit_code = 2


class Unreachable(click.ClickException):
    """The broker, or the claim store, is out of reach."""

    exit_code = 69


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
