"""What a run hands on when it ends, while its worker cannot reach the broker: it waits, and is not lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from celery import chain, chord
from celery.result import AsyncResult

from celery_sharding.errors import OutcomeUnknown
from celery_sharding.testing import Direction, FaultProxy
from support.shops import Shop

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def proxy(broker_url: str) -> Iterator[FaultProxy]:
    with FaultProxy(broker_url) as proxy:
        yield proxy


@pytest.fixture
def shop(group_name: str, broker_url: str, redis_url: str, tmp_path: Path) -> Iterator[Shop]:
    with Shop(group_name, broker_url, tmp_path, app="onward", backend=redis_url) as shop:
        yield shop


class Work:
    """Work that is held until the gate opens, and then hands on a step of its own number."""

    def __init__(self, shop: Shop) -> None:
        self.shop = shop
        self.gate = shop.folder / "gate"

    def hold(self, name: str = "plain.hold", **kwargs: object):
        return self.shop.app.signature(
            name, kwargs={"gate": str(self.gate), **kwargs}, queue=f"{self.shop.group}-plain", immutable=True
        )

    def step(self, number: int):
        self.shop.published.append((f"k{number}", number))
        return self.shop.app.signature("shop.step", kwargs={"key": f"k{number}", "number": number}, immutable=True)

    def chain(self, number: int) -> AsyncResult:
        return chain(self.hold(), self.step(number), app=self.shop.app).apply_async()

    def link(self, number: int) -> AsyncResult:
        return self.hold().apply_async(link=self.step(number))

    def chord(self, number: int) -> AsyncResult:
        return chord([self.hold(), self.hold()], self.step(number), app=self.shop.app).apply_async()

    def replace(self, number: int) -> AsyncResult:
        self.step(number)
        return self.hold("plain.hold_and_replace", key=f"k{number}", number=number).apply_async()

    def call(self, number: int) -> AsyncResult:
        self.step(number)
        return self.hold("plain.hold_and_call", key=f"k{number}", number=number).apply_async()

    def of_shard(self, number: int) -> AsyncResult:
        held = self.shop.app.signature(
            "onward.hold_sharded", kwargs={"gate": str(self.gate), "key": f"held{number}"}, immutable=True
        )
        return chain(held, self.step(number), app=self.shop.app).apply_async()

    def errback(self, number: int) -> AsyncResult:
        self.shop.published.append(("noted", 0))
        noted = self.shop.app.signature("onward.note_failure")
        return self.hold("plain.hold_and_fail").apply_async(link_error=noted)


ALL = (Work.chain, Work.link, Work.chord, Work.replace, Work.call, Work.errback)
POOLS = [
    pytest.param("prefork", ALL, id="prefork"),
    pytest.param("threads", (*ALL, Work.of_shard), id="threads"),
    pytest.param("gevent", (*ALL, Work.of_shard), id="gevent"),
    pytest.param("solo", (Work.chain,), id="solo-chain"),
    pytest.param("solo", (Work.replace,), id="solo-replace", marks=pytest.mark.slow),
    pytest.param("solo", (Work.of_shard,), id="solo-of_shard", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("pool", "ways"), POOLS)
def test_what_ends_while_the_broker_is_away_hands_on_when_it_is_back(
    shop: Shop, proxy: FaultProxy, pool: str, ways: tuple[Callable[[Work, int], AsyncResult], ...]
) -> None:
    # Given a worker behind a proxy, with runs that are about to end and to hand on
    settings = {"SHOP_BROKER": proxy.url}
    worker = shop.worker("-P", pool, "-c", "1" if pool == "solo" else "10", **settings)
    work = Work(shop)
    results = [way(work, number) for number, way in enumerate(ways, 1)]
    held = len(ways) + (Work.chord in ways)
    assert shop.trace.wait_for(held, kind="held")
    # When they end while the broker is away, and find that it is
    proxy.refuse()
    work.gate.touch()
    worker.wait_for("trying again for 1")  # seconds: it has tried for more than ten
    proxy.heal()
    # Then what they hand on runs when it is back, and nothing of them has failed
    for way, result in zip(ways, results, strict=True):
        if way is Work.errback:
            with pytest.raises(ValueError, match="as it should"):
                result.get(timeout=60)
        else:
            result.get(timeout=60)
    assert shop.trace.wait_for(len(ways), timeout_seconds=60), shop.verdict()
    assert shop.verdict().lost == 0, shop.verdict()


@pytest.mark.parametrize("pool", ["prefork", "threads", pytest.param("gevent", marks=pytest.mark.slow), "solo"])
def test_a_run_that_does_not_know_whether_it_handed_on_fails_and_names_the_child(
    shop: Shop, proxy: FaultProxy, pool: str
) -> None:
    # Given a worker that has handed on before, so that it has a connection to publish on, and a run about to hand on
    worker_settings = '{"sharding_publish_timeout_seconds": 2.0}'
    shop.worker("-P", pool, "-c", "1", SHOP_BROKER=proxy.url, SHOP_SETTINGS=worker_settings)
    work = Work(shop)
    first = work.chain(1)
    work.gate.touch()
    first.get(timeout=60)
    work.gate.unlink()
    child = work.step(2).set(task_id=f"child-of-{shop.group}")
    result = work.hold().apply_async(link=child)
    assert shop.trace.wait_for(2, kind="held")
    # When the broker's answers are held up
    proxy.stall(Direction.TO_CLIENT)
    work.gate.touch()
    # Then the run has failed, and says of what nobody knows the outcome
    with pytest.raises(OutcomeUnknown, match=f"child-of-{shop.group}"):
        result.get(timeout=60)
    # And it was not sent again
    proxy.heal()
    assert shop.trace.wait_for(2, timeout_seconds=60), shop.verdict()
    assert shop.verdict().repeated == 0, shop.verdict()
