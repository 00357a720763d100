"""ARCHITECTURE.md draws the way of a message: to RabbitMQ it goes exactly there."""

from __future__ import annotations

from support.architecture import read_way
from support.calls import Calls, find_missing
from support.shops import Shop


def test_a_publish_goes_the_way_that_is_drawn(shop: Shop) -> None:
    # Given a publisher that is connected, and has declared the group
    shop.send("step", "k", 1)
    # When it publishes
    with Calls() as calls:
        shop.send("step", "k", 2)
    # Then it went through the functions that the page names, in that order
    assert find_missing(read_way()["publisher"], calls.here) == []
