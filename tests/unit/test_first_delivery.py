"""The way of a first delivery, from the publish to the acknowledgement: who follows it has few hands to pass.

What is followed is a message on `memory://` and a pool of threads. A function is on its way if it is on the stack when
the message is handed on: to the broker, to its lane, to the pool, to the task, and acknowledged to the broker. What
the embedded broker does itself is none of it.
"""

from __future__ import annotations

import sys
import threading
import uuid
from pathlib import Path
from types import CodeType, FrameType

import pytest

import celery_sharding
from support.memory_shop import Shop

ROOT = f"{Path(celery_sharding.__file__).parent}/"
HANDED_ON = {
    "kombu/transport/virtual/base.py": {"Channel.basic_publish"},
    "brokers/embedded/memory.py": {"MemoryShardChannel.basic_ack"},
    "worker/run/lanes.py": {"Lanes.admit", "Lanes.settle"},
    "celery/concurrency/base.py": {"BasePool.apply_async"},
    "tests/support/memory_shop.py": {"Shop.__init__.<locals>.step"},
}

pytestmark = pytest.mark.timeout(60)


class Follower:
    """Follows what runs while it is told to, in all threads that begin after it."""

    def __init__(self) -> None:
        self.is_following = False
        self.called: set[tuple[str, str]] = set()
        self.way: dict[tuple[str, str], None] = {}

    def note(self, frame: FrameType, event: str, _: object) -> None:
        if not self.is_following or event != "call":
            return
        place = place_of(frame.f_code)
        if place is not None:
            self.called.add(place)
        if any(
            frame.f_code.co_filename.endswith(file) and frame.f_code.co_qualname in names
            for file, names in HANDED_ON.items()
        ):
            stack = []
            each = frame.f_back
            while each is not None:
                stack.append(place_of(each.f_code))
                each = each.f_back
            self.way |= dict.fromkeys(place for place in reversed(stack) if place is not None)


def place_of(code: CodeType) -> tuple[str, str] | None:
    """Return the file and the name of a function of the package."""
    name = code.co_qualname
    if not code.co_filename.startswith(ROOT) or name.rpartition(".")[2].startswith("<"):
        return None
    return code.co_filename.removeprefix(ROOT), name


def test_a_first_delivery_passes_few_hands_and_none_of_redelivery() -> None:
    # Given a worker that has run a message
    follower, shop = Follower(), Shop(f"t{uuid.uuid4().hex[:12]}")
    threading.setprofile(follower.note)
    try:
        with shop.worker():
            sys.setprofile(follower.note)
            shop.step.delay("key", 1)
            shop.wait_for(1)
            # When another is followed, and one behind it, which begins when it is acknowledged
            follower.is_following = True
            shop.step.delay("key", 2)
            shop.step.delay("key", 3)
            shop.wait_for(2)
            follower.is_following = False
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    # Then few functions hand it on, and none that knows of redelivery is called
    assert len(follower.way) <= 30, list(follower.way)
    assert len({file for file, _ in follower.way}) <= 14, list(follower.way)
    assert not [place for place in follower.called if place[0].startswith("worker/redelivery/")]
    assert len(follower.called) <= 120, sorted(follower.called)
