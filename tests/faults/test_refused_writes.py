"""What the broker refuses for good: one write is set aside, nothing is lost, and everybody else goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kombu import Connection

from celery_sharding.testing.processes import wait_until
from support.pools import pool_options, pools
from support.raw_messages import publish, task_message
from support.shops import Shop

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo")))
def test_a_letter_with_an_endless_error_is_cut_and_the_others_are_stored(shop: Shop, pool: str) -> None:
    # Given a worker that keeps failures
    env = {"SHOP_ON_FAILURE": "dead-letter"}
    worker = shop.worker(*pool_options(pool, 2), **env)
    # When tasks fail with texts that fit no frame, beside one that retries and good ones of the same keys
    shop.send("shout", "a", 1, characters=140_000)
    shop.send("shout", "b", 2, characters=140_000, text="\ud800ü")
    retried = shop.send("again", "a", 3, times=1)
    good = [shop.send("step", key, 4) for key in ("a", "b", "c")]
    # and a body comes that cannot be decoded, with a representation as long
    with Connection(shop.broker_url) as connection:
        message = task_message("shop.step", {})
        message.body = b"\xff" * 60_000
        publish(connection, shop.names, "b", message)
    # Then all of it is done and stored
    assert retried.get(timeout=60) == 1
    assert [result.get(timeout=60) for result in good] == [4, 4, 4]
    letters = {letter.headers["shard_key"] + str(letter.headers["task"]): letter for letter in shop.dead_letters(3)}
    assert set(letters) == {"ashop.shout", "bshop.shout", "bshop.step"}
    assert "(cut, 140,000 characters)" in letters["ashop.shout"].headers["shard_dead_error"]
    assert letters["bshop.step"].body == b"\xff" * 60_000
    assert "trying again" not in worker.output
    # and a worker that starts anew goes on
    worker.stop()
    shop.worker(*pool_options(pool, 2), **env)
    assert shop.send("step", "a", 5).get(timeout=60) == 5


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo")))
def test_a_letter_whose_headers_fit_no_frame_is_reduced(shop: Shop, pool: str) -> None:
    # Given a message whose headers fill a frame, so that ours do not fit in any more
    shop.worker(*pool_options(pool, 2))
    full = {"small": "kept", **{f"filling-{n}": "x" * 4_000 for n in range(32)}, "argsrepr": "x" * 2_200}
    message = task_message("shop.reject", {"key": "a", "number": 1}, **full)
    # When it is rejected
    with Connection(shop.broker_url) as connection:
        publish(connection, shop.names, "a", message)
    # Then its letter has what is needed to replay it, and names what was left out; the key goes on
    (letter,) = shop.dead_letters(1)
    assert letter.headers["shard_dead_reason"] == "rejected"
    assert letter.headers["small"] == "kept"
    assert {"task", "id"} <= set(letter.headers)
    assert "filling-" in letter.headers["shard_dead_dropped"]
    assert letter.body == message.body.decode()
    assert shop.send("step", "a", 2).get(timeout=60) == 2


@pytest.fixture
def limit_messages(rabbitmqctl: Callable[..., str]) -> Any:
    """Set the size of message that the broker takes on new channels; put back afterwards."""

    def limit(size_bytes: int) -> None:
        rabbitmqctl(
            "eval",
            f"application:set_env(rabbit, max_message_size, {size_bytes}), "
            f"persistent_term:put(max_message_size, {size_bytes}).",
        )

    yield limit
    limit(134_217_728)


@pytest.mark.restarts_broker  # a limit is everybody's
@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo")))
def test_what_is_too_large_for_the_broker_is_held_and_only_its_key_waits(
    shop: Shop, pool: str, limit_messages: Callable[[int], None]
) -> None:
    # Given a large message that waits, and a broker that takes no such message any more
    shop.worker(*pool_options(pool, 2)).stop()
    large = shop.send("reject", "a", 1, filling="x" * 100_000)
    limit_messages(50_000)
    behind = shop.send("step", "a", 2)
    # When it is rejected, beside other letters and retries
    worker = shop.worker(*pool_options(pool, 2))
    retried = shop.send("again", "b", 3, times=1)
    shop.send("reject", "c", 4)
    good = [shop.send("step", key, 5) for key in ("b", "c")]
    # Then the others go on
    assert retried.get(timeout=60) == 1
    assert [result.get(timeout=60) for result in good] == [5, 5]
    (letter,) = shop.dead_letters(1)
    assert letter.headers["shard_key"] == "c"
    # and it is kept at the broker with its successors, which one error says
    assert wait_until(lambda: "cannot be stored in" in worker.output, timeout_seconds=60), worker.output
    assert worker.output.count("cannot be stored in") == 1
    assert not behind.ready()
    # When the limit is raised and the worker starts anew
    limit_messages(134_217_728)
    worker.stop()
    shop.worker(*pool_options(pool, 2))
    # Then it is a dead letter, and its key goes on
    (letter,) = shop.dead_letters(1)
    assert letter.headers["id"] == large.id
    assert behind.get(timeout=60) == 2


@pytest.mark.restarts_broker  # a limit is everybody's
@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo")))
def test_a_retry_that_cannot_be_recorded_is_a_dead_letter(
    shop: Shop, pool: str, limit_messages: Callable[[int], None]
) -> None:
    # Given a broker that takes no large message
    limit_messages(50_000)
    shop.worker(*pool_options(pool, 2))
    # When a task retries with large arguments, and another with what cannot be written at all
    shop.send("grow", "a", 1, characters=100_000)
    shop.send("grow", "b", 2, characters=0)
    after = [shop.send("step", key, 3) for key in ("a", "b")]
    # Then both are dead letters, and their keys go on
    letters = shop.dead_letters(2)
    assert {letter.headers["shard_dead_reason"] for letter in letters} == {"its retry cannot be recorded"}
    assert {json.loads(letter.body)[1]["number"] for letter in letters} == {1, 2}
    assert [result.get(timeout=60) for result in after] == [3, 3]


@pytest.fixture
def small_frames(rabbitmqctl: Callable[..., str]) -> Iterator[None]:
    """Let the broker agree on frames of 8 kB with whoever connects now: the smallest that RabbitMQ 4.3 allows."""
    rabbitmqctl("eval", "application:set_env(rabbit, frame_max, 8192).")
    yield
    rabbitmqctl("eval", "application:set_env(rabbit, frame_max, 131072).")


@pytest.mark.restarts_broker  # a limit is everybody's
@pytest.mark.usefixtures("small_frames")
def test_a_broker_of_small_frames_gets_reduced_letters(shop: Shop) -> None:
    # Given a worker whose connections agreed on small frames
    shop.worker("-c", "2", SHOP_ON_FAILURE="dead-letter")
    # When a task fails with a text that fits none of them
    shop.send("shout", "a", 1, characters=140_000, text="\N{MONEY BAG}")
    # Then its letter is reduced to what fits, and its key goes on
    (letter,) = shop.dead_letters(1)
    assert letter.headers["shard_dead_reason"] == "failed: ValueError"
    assert "shard_dead_dropped" in letter.headers
    assert shop.send("step", "a", 2).get(timeout=60) == 2
