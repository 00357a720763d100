"""How a verb ends: exit codes, errors as one line on stderr, and the question before something is destroyed.

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

# A device that is full or broken. Click handles a closed pipe itself: it exits with 1, and says nothing.
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class Unhealthy(click.ClickException):
    exit_code = 1


class WrongUsage(click.ClickException):
    exit_code = 2


class Unreachable(click.ClickException):
    exit_code = 69


class Verbs(click.Group):
    """Verbs that end with one line on stderr, whatever goes wrong: also if their output or help cannot be written."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        with _explain():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with _explain():
            return super().invoke(ctx)


@contextlib.contextmanager
def _explain() -> Iterator[None]:
    """Turn our errors, and those of a full disk, into a line on stderr and the exit code they mean."""
    try:
        yield
    except (BrokerUnavailable, StoreUnavailable) as exc:
        raise Unreachable(str(exc)) from exc
    except (ConfigurationError, NoUsableStore, UnsupportedBroker) as exc:
        raise WrongUsage(str(exc)) from exc
    except ShardingError as exc:
        raise Unhealthy(str(exc)) from exc
    except OSError as exc:
        if exc.errno not in _UNWRITABLE:
            raise
        # What is left of the output would be written once more when Python ends, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Unhealthy(f"the output cannot be written: {exc.strerror}") from exc


yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


def check_can_ask(*, yes: bool) -> None:
    """Refuse, before anything is looked at, if `--yes` is not given and there is no terminal to ask at.

    Raises:
        WrongUsage: There is no terminal.
    """
    if not yes and not (sys.stdin is not None and sys.stdin.isatty()):  # None: it is closed
        raise WrongUsage("there is no terminal to ask at; use --yes to go on without being asked")


def ask(question: str, *, yes: bool) -> None:
    """Ask, and end the command unless the answer is yes."""
    check_can_ask(yes=yes)
    if not yes:
        click.confirm(question, abort=True, err=True)


def ask_name(name: str, question: str, *, yes: bool) -> None:
    """Ask the operator to type a name, and end the command if it is another."""
    check_can_ask(yes=yes)
    if not yes and click.prompt(question, err=True).strip() != name:
        raise Unhealthy(f"that is not {name}; nothing was done")
