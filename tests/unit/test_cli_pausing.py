"""What `shards pause` says of what cannot be paused, without a broker."""

from __future__ import annotations

import os
import sys

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner

from celery_sharding import ShardGroup, Sharding
from celery_sharding.cli import shards
from celery_sharding.cli.exits import WrongUsage, check_can_ask
from celery_sharding.cli.groups import operator_name

NOWHERE = "amqp://ann:secret@127.0.0.1:1//"


@pytest.mark.parametrize(
    ("verb", "place", "broker", "status", "says"),
    [
        (
            "pause",
            "order/1",
            NOWHERE,
            2,
            "names the shard group 'order', which is not configured (did you mean 'orders'?)",
        ),
        ("pause", "orders/x", NOWHERE, 2, "'orders/x' is no shard of 'orders'; name one as orders/0"),
        ("resume", "orders.", NOWHERE, 2, "'orders.' is no shard of 'orders'"),
        ("pause", "orders", NOWHERE, 69, "could not be reached"),
        ("pause", "orders", f"{NOWHERE};amqp://ann:secret/x@127.0.0.1:1//", 2, "the broker's URL cannot be read"),
        ("resume", "orders/1", "memory://", 2, "`shards resume` needs RabbitMQ"),
        ("history", "orders", "memory://", 2, "`shards history` needs RabbitMQ"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_its_exit_code(verb: str, place: str, broker: str, status: int, says: str):
    # Given an app whose broker does not answer, or lives in its own processes
    app = Celery("shop", broker=broker, set_as_current=False)
    Sharding(app, groups=[ShardGroup("orders", shards=4)])
    # When it is asked for
    done = CliRunner().invoke(shards, [verb, place], obj=CLIContext(app, no_color=True, workdir=None))
    # Then the error is one line on stderr, without the password
    assert (done.exit_code, done.stdout) == (status, "")
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert "secret" not in done.stderr


def test_who_has_closed_the_standard_input_cannot_be_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", None)

    with pytest.raises(WrongUsage, match="use --yes"):
        check_can_ask(yes=False)


def test_an_operator_without_a_name_as_in_a_container_signs_with_a_number(monkeypatch: pytest.MonkeyPatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2_000_000_001)

    assert operator_name().startswith("2000000001@")
