"""Claims and results in a database that is killed and started again while messages come."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery

from celery_sharding.testing.processes import wait_until
from support.pools import pool_options, pools
from support.shops import Shop
from support.store_servers import Postgres

pytestmark = pytest.mark.timeout(240)

AWAY_SECONDS = 5.0


@pytest.fixture(scope="module")
def postgresql() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture
def shop(group_name: str, broker_url: str, postgresql: Postgres, tmp_path: Path) -> Iterator[Shop]:
    # Its publisher keeps results elsewhere: Celery asks for them in the backend when it sends.
    with Shop(group_name, broker_url, tmp_path, app="payments") as shop:
        shop.env["SHOP_BACKEND"] = f"db+{postgresql.url}"
        yield shop


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads",)))
def test_a_database_that_is_killed_loses_no_message_no_result_and_no_order(
    shop: Shop, postgresql: Postgres, pool: str
) -> None:
    # Given messages on many keys, of which some have run
    worker = shop.worker(*pool_options(pool))
    sent = [shop.send("once", f"k{number % 40}", number, event=f"{shop.group}-{number}").id for number in range(200)]
    assert shop.trace.wait_for(30, timeout_seconds=60), worker.output[-3000:]
    # When the database is killed, stays away while more come, and is started again
    postgresql.kill()
    sent += [
        shop.send("once", f"k{number % 40}", number, event=f"{shop.group}-{number}").id for number in range(200, 240)
    ]
    assert wait_until(lambda: shop.is_store_away_for(AWAY_SECONDS), timeout_seconds=60), worker.output[-3000:]
    postgresql.start()
    # Then each message runs exactly once, in the order of its key
    assert shop.trace.wait_for(240, timeout_seconds=120), (shop.trace.count(), worker.output[-3000:])
    assert wait_until(shop.has_nothing_left, timeout_seconds=60), worker.output[-3000:]
    assert shop.verdict().is_clean, shop.verdict()
    assert shop.status().dead_letters == 0
    # And each result is there
    results = Celery(backend=shop.env["SHOP_BACKEND"], set_as_current=False)
    states = {task_id: results.AsyncResult(task_id).state for task_id in sent}
    assert set(states.values()) == {"SUCCESS"}, states
