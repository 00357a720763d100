"""What Celery can read, a shard can: every serializer and compression, in every pool, to the end and back."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection
from kombu.compression import encoders

from celery_sharding.operations.dead_letters import read_dead
from celery_sharding.rabbitmq.streams import read_to_end
from celery_sharding.testing.processes import wait_until
from support.commands import run_shards
from support.pools import pool_options, pools
from support.raw_messages import publish, task_message
from support.shops import Shop

pytestmark = pytest.mark.timeout(240)

SERIALIZERS = ("json", "pickle", "yaml", "msgpack")
COMPRESSIONS = (None, *sorted(encoders()))
COMBINATIONS = list(itertools.product(SERIALIZERS, COMPRESSIONS))
# Celery runs pickles as root only if it is told to, and containers run tests as root.
ROOT = {"C_FORCE_ROOT": "1"}
ACCEPT_ALL = {
    **ROOT,
    "SHOP_SETTINGS": json.dumps({"accept_content": list(SERIALIZERS), "result_accept_content": ["json"]}),
}


def task_kwargs(number: int, **kwargs: Any) -> dict[str, Any]:
    return {"key": f"k{number}", "number": number, **kwargs}


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo")))
def test_every_serializer_and_compression_runs_retries_changed_dies_and_is_replayed(shop: Shop, pool: str) -> None:
    # Given a worker that accepts all serializers, and something that is broken
    broken = Path(f"{shop.trace.path}.broken")
    broken.touch()
    shop.worker(*pool_options(pool, 2), **ACCEPT_ALL)
    # When tasks of all serializers and compressions come: good ones, some that change their arguments, broken ones
    results, letters = {}, {}
    with Connection(shop.broker_url) as connection:
        for number, (serializer, compression) in enumerate(COMBINATIONS):
            options = {"serializer": serializer, "compression": compression}
            for task, kwargs in (("step", {"seconds": 0}), ("changed", {})):
                sent = shop.app.send_task(f"shop.{task}", kwargs=task_kwargs(number, **kwargs), **options)
                results[task, number] = sent
            message = task_message("shop.fragile", task_kwargs(number, how="reject"), **options)
            letters[message.application_headers["id"]] = message
            publish(connection, shop.names, f"k{number}", message)
    # Then they ran, and those that asked for it ran with the changed arguments
    expected = {(task, n): n if task == "step" else "second" for task, n in results}
    assert {place: result.get(timeout=60) for place, result in results.items()} == expected
    # and the broken ones are dead letters with the bodies as they were, which can be looked at
    found: list[Any] = []

    def look() -> bool:
        found[:] = read_dead(lambda: Connection(shop.broker_url), shop.group, limit=200).letters
        return len(found) >= len(letters)

    assert wait_until(look, timeout_seconds=60), len(found)
    assert {letter.task_id for letter in found} == set(letters)
    for letter in found:
        sent = letters[str(letter.task_id)]
        assert letter.reason == "rejected"
        assert letter.body == sent.body
        for name in ("content_type", "content_encoding"):
            assert letter.properties[name] == sent.properties[name]
        assert letter.headers.get("compression") == sent.application_headers.get("compression")
    some = next(letter for letter in found if letter.headers.get("compression") and "msgpack" in str(letter.properties))
    shown = run_shards("shop", "dead-letters", "show", shop.group, some.id, "--body", "--json", env=shop.env).stdout
    assert json.loads(shown)["body"][1]["how"] == "reject"
    # and run when they are replayed
    broken.unlink()
    run_shards("shop", "dead-letters", "replay", shop.group, "--all", "--yes", env=shop.env)
    ended = [shop.app.AsyncResult(task_id).get(timeout=60) for task_id in letters]
    assert sorted(ended) == list(range(len(COMBINATIONS)))


@pytest.mark.parametrize("serializer", SERIALIZERS)
def test_a_retry_with_changed_arguments_goes_on_elsewhere_in_every_serializer(shop: Shop, serializer: str) -> None:
    # Given a task that waits for its retry with other arguments
    settings = {"accept_content": list(SERIALIZERS), "task_serializer": serializer}
    env = {**ROOT, "SHOP_SETTINGS": json.dumps(settings)}
    first = shop.worker("-c", "1", **env)
    kwargs = {"key": "k", "number": 1, "countdown": 3}
    sent = shop.app.send_task("shop.changed", kwargs=kwargs, serializer=serializer, compression="gzip")

    def is_recorded() -> bool:
        with Connection(shop.broker_url) as connection:
            return any(event["event"] == "retry" for _, event in read_to_end(connection, shop.names.attempts))

    assert wait_until(is_recorded, timeout_seconds=40)
    # When its worker is killed
    first.kill()
    shop.worker("-c", "1", **env)
    # Then the next one runs it with them
    assert sent.get(timeout=60) == "second"


def test_what_is_not_accepted_or_cannot_be_read_is_a_dead_letter_as_it_was(shop: Shop) -> None:
    # Given a worker that accepts JSON alone
    shop.worker("-c", "2")
    refused = {
        "content type is not in accept_content": task_message("shop.step", task_kwargs(1), serializer="pickle"),
        "cannot be decoded": task_message("shop.step", task_kwargs(2), compression="gzip"),
    }
    refused["cannot be decoded"].body = b"\x1f\x8b this is no gzip"
    # When what it may not or cannot read comes, and something good of the same key
    with Connection(shop.broker_url) as connection:
        for message in refused.values():
            publish(connection, shop.names, "k", message)
    good = shop.send("step", "k", 3)
    # Then that runs, and the others are dead letters with their reasons
    assert good.get(timeout=30) == 3
    letters = {letter.headers["shard_dead_reason"]: letter for letter in shop.dead_letters(2)}
    assert set(letters) == set(refused)
    for reason, letter in letters.items():
        assert (letter.body if isinstance(letter.body, bytes) else letter.body.encode()) == refused[reason].body
        assert letter.headers.get("compression") == refused[reason].application_headers.get("compression")
