"""The gate of the embedded brokers. That a fork waits for a thread inside is shown on a real file, in `contract`."""

from __future__ import annotations

import os

import pytest

from celery_sharding.embedded.gate import gate

pytestmark = [
    pytest.mark.timeout(20),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def test_a_thread_that_is_inside_forks_at_once_and_its_child_can_leave_and_enter() -> None:
    # Given a thread that is inside, twice
    with gate, gate:
        # When it forks
        child = os.fork()
    # Then it and its child leave, and enter again
    with gate:
        if not child:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
