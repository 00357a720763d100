"""Anybody may publish to a group: whatever a message says, it is run or a dead letter, and no other is harmed."""

from __future__ import annotations

import json
import uuid
from struct import pack
from typing import Any

import amqp
import pytest
from kombu import Connection

from celery_sharding.operations.dead_letters import read_dead
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.testing.processes import wait_until
from support.commands import run_shards
from support.pools import pool_options, pools
from support.shops import Shop

pytestmark = pytest.mark.timeout(240)

KEYS = ("a", "b", "c")
LONG = "x" * 5_000
# RabbitMQ itself refuses NaN and the infinities.
ODD: list[Any] = [["a"], {"a": 1}, b"\xff\xfe", LONG, 5, -1, 2.5, 1e300, 1 << 62, True, "\x00", "\ud800"]
HEADERS = (
    "shard_key", "shard_group", "shard_sent_at", "shard_control", "shard_message_id", "task", "id", "retries",
    "timelimit", "expires", "eta", "root_id", "parent_id", "group", "shadow", "lang", "argsrepr", "compression",
    "stamps", "stamped_headers", "replaced_task_nesting", "ignore_result", "shard_dead_reason", "shard_unreadable",
)  # fmt: skip
BODIES: list[bytes] = [
    b"",
    b"\x00",
    b"\xff" * 60_000,
    b"null",
    b"5",
    b"[]",
    b'"text"',
    b"[1, 2]",
    b"[[], [], []]",
    b'[5, {"key": 1}, {}]',
    b'[[], {"key": "a"}, 7]',
    b'[[], {}, {"callbacks": 5, "errbacks": 7, "chain": "no"}]',
    b"[" * 50_000,
    b'{"task": 5, "args": 1}',
    b'{"task": "shop.step"}',
    b'{"task": "shop.step", "id": "p1", "args": [], "kwargs": []}',
    b'{"task": "shop.step", "id": "p2", "args": [], "kwargs": {}, "eta": "2030-01-01T00:00:00"}',
    b'{"task": "shop.step", "id": "p3", "args": [], "kwargs": {}, "expires": "no moment"}',
]
PROPERTIES: list[dict[str, Any]] = [
    {"content_type": b"\xff\xfe"},
    {"content_type": "no/such"},
    {"content_type": ""},
    {"content_encoding": "no-such"},
    {"content_encoding": "utf-16"},
    {"content_encoding": "hex"},
    {"correlation_id": b"\xff"},
    {"correlation_id": "c" * 255},
    {"reply_to": b"\xed\xa0\x80"},
    {"reply_to": "r" * 255},
    {"type": b"\xff"},
    {"app_id": b"\xc3\x28"},
    {"delivery_mode": 1},
    {"priority": 255},
]
ROUTING_KEYS: list[str | bytes] = [
    b"\xff",
    b"\xed\xa0\x80",
    b"\xc3\x28" * 100,
    b"\xff" * 255,
    "",
    "k" * 255,
    "\x00",
    "ä",
]


class FarAhead(amqp.Message):
    """A message with a moment in its headers that no calendar has."""

    def _serialize_properties(self) -> bytes:
        return super()._serialize_properties().replace(b"L" + pack(">q", 1 << 62), b"T" + pack(">q", 1 << 62))


def hostile(number: int) -> list[tuple[str | bytes, amqp.Message]]:
    """Return hostile messages and their routing keys; each says in its headers, or its body, which it is."""
    made: list[tuple[str | bytes, amqp.Message]] = []

    def add(key: str | bytes | None = None, body: bytes | None = None, headers: Any = (), **properties: Any) -> None:
        who = f"who-{number}-{len(made)}"
        told = {"task": "shop.step", "id": who, "retries": 0, "who": who} | dict(headers)
        told = {name: value for name, value in told.items() if value != "absent"}
        call = [[], {"key": f"hostile-{len(made)}", "number": len(made), "seconds": 0}, {}]
        text = json.dumps(call).encode() if body is None else body
        if properties.get("content_encoding") == "utf-16":
            text = text.decode().encode("utf-16")
        described = {"content_type": "application/json", "content_encoding": "utf-8", "delivery_mode": 2}
        message = amqp.Message(text, application_headers=told, **(described | properties))
        made.append((KEYS[len(made) % 3] if key is None else key, message))

    for name in HEADERS:
        for value in ODD:
            add(headers={name: value})
    for body in BODIES:
        add(body=body)
        add(body=body, headers={"task": "absent", "id": "absent"})
    for properties in PROPERTIES:
        add(**properties)
    for key in ROUTING_KEYS:
        add(key=key)
    add(headers={f"h{n}": LONG for n in range(20)})
    add(headers={"shard_key": ["a"], "deep": {"a": [{"b": [b"\xff", None, 1.5]}]}})
    call = json.dumps([[], {"key": "far-ahead", "number": 1}, {}])
    headers = {"task": "shop.step", "id": "far", "who": "far", "when": 1 << 62}
    made.append(("a", FarAhead(call.encode(), content_type="application/json", application_headers=headers)))
    return made


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo")))
def test_hostile_messages_are_run_or_dead_letters_and_good_ones_run_in_order(shop: Shop, pool: str) -> None:
    # Given a worker
    worker = shop.worker(*pool_options(pool, 2))
    # When hundreds of hostile messages come between good ones of the same keys
    messages = hostile(1)
    good = []
    with Connection(shop.broker_url) as connection, brief_channel(connection) as channel:
        for number, (key, message) in enumerate(messages):
            channel.basic_publish(message, exchange=shop.names.publish, routing_key=key)
            if number % 10 == 0:
                good += [shop.send("step", each, number, seconds=0) for each in KEYS]
    good += [shop.send("step", each, len(messages), seconds=0) for each in KEYS]
    # Then all good ones run, in order
    numbers = [number for number in range(0, len(messages), 10) for _ in KEYS] + [len(messages)] * 3
    assert [result.get(timeout=60) for result in good] == numbers
    assert worker.is_running
    ours = [mark for mark in shop.trace.read() if mark.key in KEYS and mark.kind == "start"]
    for key in KEYS:
        assert [mark.number for mark in ours if mark.key == key] == sorted(set(numbers)), key
    # and each hostile one is accounted for: it came to an end, or is a dead letter with its reason
    assert wait_until(shop.has_nothing_left, timeout_seconds=60)
    letters = read_dead(lambda: Connection(shop.broker_url), shop.group, limit=1_000).letters
    assert all(letter.reason for letter in letters)
    told = {str(letter.headers.get("who")) for letter in letters}
    bodies = {letter.body for letter in letters}
    ran = {mark.key for mark in shop.trace.read()}
    missing = []
    for number, (key, message) in enumerate(messages):
        headers, body = message.application_headers, message.body
        has_ended = headers.get("id") == headers["who"] and shop.app.AsyncResult(headers["who"]).ready()
        if not (headers["who"] in told or body in bodies or f"hostile-{number}" in ran or has_ended):
            missing.append((key, headers, message.properties.get("content_type"), body[:50]))
    assert not missing, missing
    if pool == "prefork":
        check_faces(shop, len(letters))


def check_faces(shop: Shop, count: int) -> None:
    """Check that what died can be listed, shown and replayed."""
    listed = run_shards("shop", "dead-letters", "list", shop.group, "--limit", "1000", "--json", env=shop.env)
    assert listed.returncode == 0, listed.stderr
    letters = json.loads(listed.stdout)["groups"][0]["letters"]
    assert len(letters) == count
    odd = next(letter for letter in letters if letter["task_id"] and "ud800" in letter["task_id"])
    for chosen, options in ((odd, ()), (letters[-1], ("--body", "--json"))):
        shown = run_shards("shop", "dead-letters", "show", shop.group, chosen["id"], *options, env=shop.env)
        assert shown.returncode == 0, shown.stderr
    replayed = run_shards("shop", "dead-letters", "replay", shop.group, "--all", "--yes", env=shop.env)
    assert replayed.returncode == 0, replayed.stderr
    assert shop.send("step", uuid.uuid4().hex, 1, seconds=0).get(timeout=60) == 1
