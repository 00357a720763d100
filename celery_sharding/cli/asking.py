"""Verbs that destroy something ask first, at a terminal; `--yes` answers for whoever has none."""

from __future__ import annotations

import sys

import click

from celery_sharding.cli.exits import Unhealthy, WrongUsage


def check_can_ask(*, yes: bool) -> None:
    """Refuse, before anything is looked at, if the answer is not given and nobody can be asked.

    Raises:
        WrongUsage: There is no terminal.
    """
    if not yes and not (sys.stdin is not None and sys.stdin.isatty()):  # None: it is closed
        raise WrongUsage("there is no terminal to ask at; say --yes to do it without being asked")


def ask(question: str, *, yes: bool) -> None:
    """Ask, and end the command unless the answer is yes."""
    check_can_ask(yes=yes)
    if not yes:
        click.confirm(question, abort=True, err=True)


def ask_name(name: str, question: str, *, yes: bool) -> None:
    """Ask for a name to be typed, and end the command if it is another."""
    check_can_ask(yes=yes)
    if not yes and click.prompt(question, err=True).strip() != name:
        raise Unhealthy(f"that is not {name}; nothing was done")
