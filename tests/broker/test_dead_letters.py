"""Dead letters are looked at, replayed and discarded: by several at once, by mistake, and in the middle of things."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import amqp
import pytest
from kombu import Connection

from celery_sharding import ShardGroup
from celery_sharding.errors import DeadLetterError, LockHeld, TopologyError
from celery_sharding.layout.ensure import ensure_group
from celery_sharding.monitoring.history import read_history
from celery_sharding.operations import remove_group as group_removal
from celery_sharding.operations.dead_letters import discard, read_dead, replay
from celery_sharding.operations.pause import pause
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.rabbitmq.streams import publish_confirmed, read_to_end
from celery_sharding.testing.processes import wait_until
from celery_sharding.topology import Names
from support.commands import run_shards
from support.shops import Shop

pytestmark = pytest.mark.timeout(120)

BY = "somebody@here"
# Replays all, and is killed when it is about to acknowledge its second letter, which the broker has confirmed.
KILLED = """
import os, signal, sys
import amqp
from kombu import Connection
from celery_sharding import ShardGroup
from celery_sharding.operations.dead_letters import replay

acknowledge, calls = amqp.Channel.basic_ack, []

def kill_at_the_second(channel, tag, *arguments):
    calls.append(tag)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    acknowledge(channel, tag, *arguments)

amqp.Channel.basic_ack = kill_at_the_second
replay(lambda: Connection(sys.argv[1]), ShardGroup(sys.argv[2], 2), None, by="killed")
"""


@pytest.fixture
def group(connect, group_name) -> ShardGroup:
    """A declared group that nobody consumes."""
    made = ShardGroup(group_name, 2)
    ensure_group(connect, made, owner="test")
    return made


def bury(connection: Connection, names: Names, *letters: tuple[str | None, int, float]) -> None:
    """Put dead letters into the queue as a worker does: (key, number, when it died)."""
    with brief_channel(connection) as channel:
        for key, number, dead_at in letters:
            headers: dict[str, Any] = {"id": f"t{number}", "task": "shop.step", "retries": 0, "expires": "2020-01-01"}
            headers |= {"shard_dead_reason": "lost 5 times", "shard_dead_attempts": 5, "shard_dead_at": dead_at}
            if key is not None:
                headers |= {"shard_key": key, "shard_sent_at": 1.0, "shard_message_id": f"m{number}"}
            message = amqp.Message(
                json.dumps([[], {"key": key, "number": number}, {}]),
                content_type="application/json",
                content_encoding="utf-8",
                correlation_id=f"t{number}",
                delivery_mode=2,
                application_headers=headers,
            )
            publish_confirmed(channel, message, names.dead, timeout_seconds=10)


def take_replayed(connection: Connection, names: Names, count: int) -> list[amqp.Message]:
    """Take `count` messages out of the live shards, and see that there are no more."""
    found: list[amqp.Message] = []

    def take(message: amqp.Message) -> None:
        if "shard_control" not in message.headers:
            found.append(message)

    with brief_channel(connection) as channel:
        for index in range(2):
            channel.basic_consume(names.shard(1, index), callback=take, no_ack=True)
        while len(found) < count:
            connection.drain_events(timeout=20)
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.5)
    return found


def notes(connection: Connection, names: Names) -> list[tuple[str, str, int, str]]:
    events = [event for _, event in read_to_end(connection, names.manifest) if event["event"] == "operated"]
    ended = [event for event in events if event["result"] != "begun"]
    return [(event["verb"], event["by"], event["count"], event["result"]) for event in ended]


def test_what_went_wrong_is_replayed_when_it_is_put_right_and_runs_in_order(shop: Shop) -> None:
    # Given tasks that died in every way, three of them of one key
    broken = Path(f"{shop.trace.path}.broken")
    broken.touch()
    settings = {"SHOP_ON_FAILURE": "dead-letter", "SHOP_SETTINGS": json.dumps({"worker_lost_wait": 1})}
    shop.worker("-c", "2", SHOP_MAX_ATTEMPTS="2", **settings)
    sent = [
        shop.send("fragile", key, number, how=how)
        for number, (key, how) in enumerate([("a", "die"), ("a", "fail"), ("a", "reject"), ("b", "fail")])
    ]
    connect = lambda: Connection(shop.broker_url)  # noqa: E731
    listed: list[Any] = []

    def look() -> bool:
        listed[:] = read_dead(connect, shop.group, limit=10).letters
        return len(listed) == 4

    assert wait_until(look, timeout_seconds=60), listed
    assert [letter.task_id for letter in listed if letter.key == "a"] == [result.id for result in sent[:3]]
    # When somebody looks at them
    done = run_shards("shop", "dead-letters", "list", shop.group, "--limit", "3", "--json", env=shop.env)
    (found,) = json.loads(done.stdout)["groups"]
    assert (done.returncode, done.stderr, len(found["letters"]), found["more"]) == (0, "", 3, 1)
    poison = next(letter for letter in listed if letter.task_id == sent[0].id)
    assert (poison.attempts, poison.reason) == (2, "lost 2 times")
    shown = run_shards("shop", "dead-letters", "show", shop.group, poison.id, env=shop.env).stdout
    assert "lost 2 times" in shown
    assert "'how': 'die'" not in shown  # its arguments may be secret
    shown = run_shards("shop", "dead-letters", "show", shop.group, poison.id, "--body", "--json", env=shop.env).stdout
    assert json.loads(shown)["body"][1]["how"] == "die"
    # and puts right what was wrong, and replays them
    broken.unlink()
    done = run_shards("shop", "dead-letters", "replay", shop.group, "--all", "--yes", env=shop.env)
    # Then they run, those of one key in their order, and nothing is left
    assert (done.returncode, done.stdout) == (0, f"{shop.group}: 4 replayed\n"), done.stderr
    assert "out of the order of their keys" in done.stderr
    assert [result.get(timeout=30) for result in sent] == [0, 1, 2, 3]
    assert [mark.number for mark in shop.trace.read() if mark.kind == "end" and mark.key == "a"] == [0, 1, 2]
    done = run_shards("shop", "dead-letters", "replay", shop.group, poison.id, "--yes", env=shop.env)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"no such dead letter in {shop.group}: {poison.id}" in done.stderr
    done = run_shards("shop", "dead-letters", "list", env=shop.env)
    assert (done.returncode, done.stdout) == (0, f"{shop.group}: no dead letters\n")


def test_a_replay_keeps_the_order_of_death_of_each_key_and_starts_from_nothing(connect, connection, group, names):
    # Given letters of three keys that do not stand in the order in which they died
    letters = [(f"k{number % 3}", number, 1_000.0 + number) for number in range(30)]
    random.Random(1).shuffle(letters)
    bury(connection, names, *letters)
    # When they are replayed
    told: list[tuple[int, int]] = []
    done = replay(connect, group, None, by=BY, progress=SimpleNamespace(note=lambda *progress: told.append(progress)))
    # Then each key has its order again, and the messages are as they were published, but sent just now
    assert [letter.task_id for letter in done] == [f"t{number}" for number in range(30)]
    assert told[-1] == (30, 30)
    found = take_replayed(connection, names, 30)
    for key in ("k0", "k1", "k2"):
        numbers = [json.loads(m.body)[1]["number"] for m in found if m.delivery_info["routing_key"] == key]
        assert numbers == sorted(numbers)
        assert len(numbers) == 10
    assert {name for message in found for name in message.headers} == {
        "id", "task", "retries", "expires", "shard_key", "shard_sent_at", "shard_group", "shard_message_id"
    }  # fmt: skip
    assert all(message.headers["expires"] is None for message in found)
    assert all(abs(message.headers["shard_sent_at"] - time.time()) < 60 for message in found)
    assert {message.properties["correlation_id"] for message in found} == {f"t{number}" for number in range(30)}
    # each under an id of its own, so that no earlier attempt counts
    ids = {message.headers["shard_message_id"] for message in found}
    assert len(ids - {f"m{number}" for number in range(30)}) == 30
    # and the history says who did it, without a key
    assert notes(connection, names) == [("replay", BY, 30, "30 of 30 done")]
    assert read_dead(connect, group.name, limit=1).letters == ()


def test_what_the_broker_moved_is_told_and_replayed_too(connect, connection, group, names):
    # Given a message of a foreign publisher that expired in its shard
    with brief_channel(connection) as channel:
        message = amqp.Message(b"{}", content_type="application/json", delivery_mode=2, expiration="1")
        publish_confirmed(channel, message, "key-1", exchange=names.publish, timeout_seconds=10)
    found: list[Any] = []

    def look() -> bool:
        found[:] = read_dead(connect, group.name, limit=10).letters
        return bool(found)

    assert wait_until(look, timeout_seconds=30)
    (letter,) = found
    assert (letter.key, letter.reason, letter.task_id) == ("key-1", "expired in its queue", None)
    assert letter.queue in (names.shard(1, 0), names.shard(1, 1))
    assert abs(letter.dead_at - time.time()) < 60
    # When it is replayed, then it waits in its shard, without what the broker wrote, and does not expire again
    replay(connect, group, [letter.id], by=BY)
    (again,) = take_replayed(connection, names, 1)
    assert set(again.headers) == {"shard_key", "shard_sent_at", "shard_group", "shard_message_id"}
    assert (again.delivery_info["routing_key"], "expiration" in again.properties) == ("key-1", False)


def test_one_that_cannot_be_done_lets_nothing_be_done(connect, connection, group, names):
    # Given two letters, one of which has no key
    bury(connection, names, ("a", 1, 1.0), (None, 2, 2.0))
    good, keyless = read_dead(connect, group.name, limit=10).letters
    assert keyless.key is None
    # When they are replayed together, or with one that is not there
    with pytest.raises(DeadLetterError, match=f"{keyless.id}: without a shard key"):
        replay(connect, group, [good.id, keyless.id], by=BY)
    with pytest.raises(DeadLetterError, match=r"no such dead letter.*nobody"):
        replay(connect, group, [good.id, "nobody"], by=BY)
    # Then both are there still, and the history says nothing
    assert [letter.id for letter in read_dead(connect, group.name, limit=10).letters] == [good.id, keyless.id]
    assert notes(connection, names) == []
    # and what has no key can be discarded
    assert [letter.id for letter in discard(connect, group.name, [keyless.id], by=BY)] == [keyless.id]
    assert [letter.id for letter in read_dead(connect, group.name, limit=10).letters] == [good.id]
    assert notes(connection, names) == [("discard", BY, 1, "1 of 1 done")]


def test_letters_that_differ_in_nothing_have_ids_of_their_own(connect, connection, group, names):
    bury(connection, names, ("a", 1, 1.0), ("a", 1, 1.0))
    first, second = (letter.id for letter in read_dead(connect, group.name, limit=10).letters)
    assert second == f"{first}.2"

    discard(connect, group.name, [second], by=BY)

    assert [letter.id for letter in read_dead(connect, group.name, limit=10).letters] == [first]


def test_several_at_once_replay_each_letter_once(connect, connection, group, names):
    # Given many letters, and three operators, one of whom names some, while a worker writes on
    bury(connection, names, *((f"k{number % 7}", number, float(number)) for number in range(300)))
    some = [letter.id for letter in read_dead(connect, group.name, limit=50).letters]
    replayed: list[str] = []
    errors: list[Exception] = []

    def act(ids: list[str] | None) -> None:
        try:
            replayed.extend(str(letter.task_id) for letter in replay(connect, group, ids, by=BY))
        except Exception as exc:
            errors.append(exc)

    threads = [threading.Thread(target=act, args=(ids,)) for ids in (some, None, None)]
    # When they replay them at the same time
    for thread in threads:
        thread.start()
    bury(connection, names, *((f"k{number % 7}", number, float(number)) for number in range(300, 310)))
    for thread in threads:
        thread.join(60)
    act(None)
    # Then each letter was replayed once, and who came too late with a name was told
    assert sorted(replayed) == sorted(f"t{number}" for number in range(310))
    assert all(isinstance(error, DeadLetterError) for error in errors), errors
    assert len(take_replayed(connection, names, 310)) == 310


def test_what_another_reader_holds_for_a_moment_is_waited_for(connect, connection, group, names, broker_url):
    bury(connection, names, ("a", 1, 1.0))
    (letter,) = read_dead(connect, group.name, limit=10).letters
    # Given somebody who looks at it with other means
    other = Connection(broker_url)
    assert other.channel().basic_get(names.dead) is not None
    timer = threading.Timer(0.7, other.release)
    timer.start()
    # When it is replayed, then that is done when they have given it back
    assert len(replay(connect, group, [letter.id], by=BY)) == 1
    timer.join()


def test_a_replay_that_is_cut_short_leaves_the_rest(connect, connection, group, names):
    # Given a replay that ends after its first letter, as by Ctrl-C
    bury(connection, names, *(("a", number, float(number)) for number in range(5)))

    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replay(connect, group, None, by=BY, progress=SimpleNamespace(note=stop))
    # When the rest is replayed, then all have been, once and in order
    assert len(replay(connect, group, None, by=BY)) == 4
    found = take_replayed(connection, names, 5)
    assert [json.loads(message.body)[1]["number"] for message in found] == [0, 1, 2, 3, 4]


def test_a_replay_that_is_killed_before_it_acknowledges_loses_nothing_and_repeats_what_it_had_published(
    connect, connection, group, names, broker_url
):
    # Given a replay of five letters of two keys, killed when it has published two and acknowledged one
    bury(connection, names, *((f"k{number % 2}", number, float(number)) for number in range(5)))
    command = [sys.executable, "-c", KILLED, broker_url, group.name]
    assert subprocess.run(command, env=os.environ, timeout=60).returncode == -signal.SIGKILL
    assert wait_until(lambda: len(read_dead(connect, group.name, limit=9).letters) >= 4, timeout_seconds=20)
    # When all that is left is replayed
    left = [letter.task_id for letter in replay(connect, group, None, by=BY)]
    # Then nothing is lost; the one that was published and not acknowledged comes twice, and the order of keys is kept
    assert left[-4:] == ["t1", "t2", "t3", "t4"]
    found = take_replayed(connection, names, 2 + len(left))
    counts = Counter(message.properties["correlation_id"] for message in found)
    assert counts == Counter({"t0": 1, "t1": 2, "t2": 1, "t3": 1, "t4": 1}) + Counter(left[:-4])
    for key in ("k0", "k1"):
        of_key = [m.properties["correlation_id"] for m in found if m.delivery_info["routing_key"] == key]
        assert of_key == sorted(of_key)
    assert read_dead(connect, group.name, limit=1).letters == ()
    # and the history tells of both
    told = [(entry.by, entry.what, entry.result) for entry in read_history(connection, group.name)[-2:]]
    assert told == [("killed", "replay", "begun"), (BY, "replay", f"{len(left)} of {len(left)} done")]


def test_a_replay_holds_up_no_pause_and_a_group_is_not_removed_under_it(connect, connection, group, names, monkeypatch):
    monkeypatch.setattr(group_removal, "_LOCK_SECONDS", 0.2)
    bury(connection, names, ("a", 1, 1.0), ("a", 2, 2.0))
    seen: list[object] = []

    def act(done: int, of: int) -> None:
        if done == 1:
            seen.append(pause(connect, group, None, by=BY))
            with pytest.raises(LockHeld, match=names.dead_admin):
                group_removal.check_removable(connect, group.name)

    assert len(replay(connect, group, None, by=BY, progress=SimpleNamespace(note=act))) == 2
    assert seen == [True]


@pytest.mark.parametrize("damage", ["exchange", "bindings"])
def test_a_letter_that_the_group_does_not_take_stays(connect, connection, group, names, damage):
    # Given a group that cannot take anything
    bury(connection, names, ("a", 1, 1.0))
    with brief_channel(connection) as channel:
        if damage == "exchange":
            channel.exchange_delete(names.publish)
        else:
            channel.exchange_delete(names.ring(1))
            channel.queue_unbind(names.limbo(2), names.unrouted, "")
    # When a letter is replayed, then it stays, and whoever does it is told what to do
    with pytest.raises(TopologyError, match=r"[rR]un `celery shards declare`"):
        replay(connect, group, None, by=BY)
    assert len(read_dead(connect, group.name, limit=10).letters) == 1
    ((verb, _, count, result),) = notes(connection, names)
    assert (verb, count, result.startswith("0 of 1 done, then: ")) == ("replay", 1, True)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("replay", "{group}"), 2, "use --all"),
        (("replay", "{group}", "abc", "--all", "--yes"), 2, "use --all"),
        (("discard", "{group}", "--reason", "x", "--yes"), 2, "use --all"),
        (("discard", "{group}", "--all"), 2, "use --yes"),
        (("discard", "{group}", "abc", "--yes"), 1, "no such dead letter in {group}: abc"),
        (("list", "{group}x"), 2, "did you mean '{group}'"),
        (("show", "{group}", "abc"), 1, "no such dead letter"),
    ],
)
def test_bad_input_is_one_clear_line(shop, group, arguments, code, text):
    arguments = [argument.format(group=group.name) for argument in arguments]

    done = run_shards("shop", "dead-letters", *arguments, env=shop.env)

    assert (done.returncode, done.stdout) == (code, "")
    assert text.format(group=group.name) in done.stderr
    assert "Traceback" not in done.stderr


def test_discard_asks_and_takes_those_whose_reason_is_named(shop, connect, connection, group, names):
    bury(connection, names, ("a", 1, 1.0), ("b", 2, 2.0))
    with brief_channel(connection) as channel:
        publish_confirmed(channel, amqp.Message(b"?", delivery_mode=2), names.dead, timeout_seconds=10)

    def discard_lost(answer: str) -> tuple[int, str, int]:
        arguments = ("dead-letters", "discard", group.name, "--all", "--reason", "lost")
        done = run_shards("shop", *arguments, env=shop.env, answer=answer)
        return done.returncode, done.stdout, len(read_dead(connect, group.name, limit=10).letters)

    assert discard_lost("n") == (1, "", 3)
    assert discard_lost("y") == (0, f"{group.name}: 2 discarded\n", 1)


def test_an_embedded_broker_has_no_dead_letters_to_operate_on(shop):
    done = run_shards("shop", "dead-letters", "list", env={**shop.env, "SHOP_BROKER": "memory://"})

    assert (done.returncode, done.stdout) == (2, "")
    assert "needs RabbitMQ" in done.stderr
