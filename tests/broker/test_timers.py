"""What waits for its moment begins then. How late it is, is measured by `benchmarks timers`; these limits are wide."""

from __future__ import annotations

import time

import pytest

from support.pools import pool_options, pools
from support.shops import Shop

pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize("pool", pools("prefork", "threads", slow=("solo", "gevent")))
def test_a_rate_limit_is_used_to_the_full_whatever_the_number_of_keys(shop: Shop, pool: str) -> None:
    # Given an idle worker, and a task of five a second
    shop.worker(*pool_options(pool))
    # When fifteen of it come, of as many keys, and fifteen of one
    results = [shop.send("limited", f"k{number}", number) for number in range(15)]
    results += [shop.send("limited", "one", number) for number in range(15, 30)]
    began = time.monotonic()
    for result in results:
        result.get(timeout=90, interval=0.1)
    # Then they take about six seconds, and not one a second
    assert time.monotonic() - began < 20
    assert shop.verdict().is_clean, shop.verdict()
    starts = sorted(mark.at for mark in shop.trace.read() if mark.kind == "start")
    assert starts[-1] - starts[0] > 29 / 5 - 0.5


@pytest.mark.parametrize("pool", pools("prefork", "solo", "gevent", slow=("threads",)))
def test_short_retries_of_a_key_do_not_wait_for_whole_seconds(shop: Shop, pool: str) -> None:
    # Given an idle worker
    shop.worker(*pool_options(pool))
    # When fifteen tasks of one key retry twice each, soon
    results = [shop.send("again", "one", number, times=2, countdown=0.02) for number in range(15)]
    began = time.monotonic()
    for result in results:
        result.get(timeout=90, interval=0.1)
    # Then thirty retries do not take thirty times up to a second
    assert time.monotonic() - began < 15
