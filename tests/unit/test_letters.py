"""What a dead letter says, whoever wrote it, and what it becomes when it is replayed."""

from __future__ import annotations

import pickle
from datetime import datetime

import amqp
import pytest

from celery_sharding.operations.letters import letter_to_json, read_letter, revive
from celery_sharding.topology import Names

NAMES = Names("orders")
OURS = {"id": "t1", "task": "shop.ship", "argsrepr": "(42,)", "shard_key": "42", "shard_dead_at": 5.0}


def read(body: bytes = b"[[42], {}, {}]", *, content_type: str = "application/json", **headers: object):
    message = amqp.Message(
        body,
        content_type=content_type,
        content_encoding="utf-8",
        priority=5,
        expiration="10",
        message_id="17",
        application_headers=headers,
    )
    return read_letter(message, NAMES)


def death(exchange: str, reason: str = "delivery_limit") -> dict[str, object]:
    return {
        "count": 1,
        "exchange": exchange,
        "queue": "shards.orders.g001.000",
        "reason": reason,
        "routing-keys": ["42"],
        "time": datetime(2026, 1, 2),
    }


def test_an_id_stays_when_the_broker_has_counted_a_look_and_tells_letters_apart():
    assert read(**OURS).id == read(**OURS, **{"x-delivery-count": 3}).id
    others = [read(**{**OURS, "shard_dead_at": 6.0}), read(**{**OURS, "id": "t2"}), read(b"[[43], {}, {}]", **OURS)]
    assert len({read(**OURS).id, *(other.id for other in others)}) == 4


@pytest.mark.parametrize(("exchange", "key"), [("shards.orders", "42"), ("", None)])
def test_the_key_of_what_the_broker_moved_is_known_if_it_came_through_the_group(exchange, key):
    letter = read(**{"x-death": [death(exchange)]})

    assert (letter.key, letter.queue) == (key, "shards.orders.g001.000")
    assert letter.reason.startswith("delivered too often")
    assert letter.dead_at == 1_767_312_000.0


def test_a_worker_knows_better_than_the_broker_why_it_died():
    letter = read(**OURS, shard_dead_reason="rejected", **{"x-death": [death("elsewhere", "expired")]})

    assert (letter.reason, letter.dead_at, letter.key) == ("rejected", 5.0, "42")


def test_what_nobody_explained_has_no_key_and_no_moment():
    letter = read(b"?", content_type="application/octet-stream", **{"x-death": "damaged"})

    assert (letter.key, letter.dead_at, letter.reason[:7]) == (None, None, "unknown")


@pytest.mark.parametrize("at", [1e300, -1.0, float("nan"), True, "soon"])
def test_a_moment_of_no_calendar_is_none(at):
    assert read(**{**OURS, "shard_dead_at": at}).dead_at is None


@pytest.mark.parametrize("key", ["", "k" * 256, "\udcff", None])
def test_a_key_that_cannot_be_published_under_is_none(key):
    assert read(**{**OURS, "shard_key": key}).key is None


def test_a_replay_takes_off_what_was_written_at_the_death_and_keeps_what_is_the_users():
    theirs = {"x-trace": "abc", "compression": "gzip", "retries": 0}
    letter = read(
        **OURS, **theirs, shard_queue="q", shard_dead_reason="r", **{"x-death": [], "x-first-death-queue": "q"}
    )

    again = revive(letter, "orders", at=9.0)

    kept = {"id": "t1", "task": "shop.ship", "argsrepr": "(42,)", "shard_key": "42"} | theirs
    # and it has an id of its own, so that earlier attempts do not count
    assert len(again.headers.pop("shard_message_id")) == 32
    assert again.headers == kept | {"shard_group": "orders", "shard_sent_at": 9.0}
    assert set(again.properties) - {"application_headers"} == {"content_type", "content_encoding", "delivery_mode"}


def test_arguments_are_shown_only_when_asked_for():
    shown = letter_to_json(read(**OURS), details=True)
    assert "42," not in str(shown)
    assert "body" not in shown
    assert letter_to_json(read(**OURS), details=True, body=True)["body"] == [[42], {}, {}]


def test_a_body_that_could_run_code_is_not_decoded():
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("it was decoded",)

    shown = letter_to_json(read(pickle.dumps(Trap()), content_type="application/x-python-serialize"), body=True)

    assert shown["body"] is None
    assert "may run code" in shown["body_problem"]
    assert letter_to_json(read(b"{", **OURS), body=True)["body_base64"] == "ew=="
