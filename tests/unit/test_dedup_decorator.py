"""`@deduplicate` on tasks that run eagerly, with claims in memory."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, Task, _state, chain, shared_task
from celery.exceptions import Ignore, Reject, Retry

from celery_sharding import ShardGroup, Sharding
from celery_sharding.celery_hooks.request import adapt_tasks
from celery_sharding.celery_hooks.retry import InPlaceRetry
from celery_sharding.dedup import current_claim, deduplicate
from celery_sharding.dedup.claims import DONE, PARKED, RELEASED, RUNNING, Claimed
from celery_sharding.dedup.mark import is_deduplicated
from celery_sharding.dedup.owners import new_owner
from celery_sharding.dedup.run import outages
from celery_sharding.dedup.stores import check_tasks, store_for
from celery_sharding.dedup.stores.memory import MemoryStore
from celery_sharding.errors import (
    ClaimHeld,
    ClaimLost,
    ConfigurationError,
    DamagedRecord,
    DeduplicationError,
    NoUsableStore,
    StoreUnavailable,
)
from celery_sharding.wire import SHARD_ATTRIBUTE


class Temporary(Exception):
    """An error that a task raises to be retried."""


@pytest.fixture(autouse=True)
def _everything_is_said() -> None:
    """What is said once a minute is said in each test."""
    outages.reset()


@pytest.fixture(autouse=True)
def _shared_tasks_stay_here() -> Iterator[None]:
    """Celery gives shared tasks to every app that is made later."""
    known = set(_state._on_app_finalizers)
    yield
    _state._on_app_finalizers.intersection_update(known)


@pytest.fixture
def app() -> Iterator[Celery]:
    app = Celery("dedup", backend="cache+memory://", set_as_current=False)
    app.conf.update(task_always_eager=True, task_eager_propagates=False)
    yield app
    app.close()
    # Eager tasks of several threads restore this global of Celery's in the wrong order.
    _state._set_task_join_will_block(False)


def test_a_duplicate_gets_the_result_and_does_not_run(app: Celery) -> None:
    # Given a task that counts its runs
    runs = []

    @app.task(shared=False)
    @deduplicate(key="event_id")
    def apply_event(order_id: int, event_id: str) -> dict[str, Any]:
        runs.append(order_id)
        return {"order": order_id, "runs": len(runs)}

    # When two calls have one key
    results = [apply_event.delay(1, "evt-1"), apply_event.delay(1, event_id="evt-1"), apply_event.delay(1, "evt-2")]
    # Then one of them ran, and both succeeded with its result
    assert [result.state for result in results] == ["SUCCESS"] * 3
    assert [result.get()["runs"] for result in results] == [1, 1, 2]


def test_a_chain_goes_on_behind_a_duplicate(app: Celery) -> None:
    @app.task(shared=False)
    @deduplicate(key="number")
    def double(number: int) -> int:
        return number * 2

    @app.task(shared=False)
    def add(number: int, other: int) -> int:
        return number + other

    assert [chain(double.s(4), add.s(1)).apply_async().get() for _ in range(2)] == [9, 9]


def test_without_a_key_the_task_id_is_the_key(app: Celery) -> None:
    runs = []

    @app.task(shared=False)
    @deduplicate()
    def count() -> int:
        runs.append(1)
        return len(runs)

    assert count.apply(task_id="a").get() == 1
    assert count.apply(task_id="a").get() == 1
    assert count.apply(task_id="b").get() == 2


def test_a_callable_key_sees_all_arguments_by_name(app: Celery) -> None:
    seen = []

    @app.task(shared=False)
    @deduplicate(key=lambda a: f"{a['first']}/{a['second']}/{a['third']}")
    def combine(first: int, second: int = 2, *, third: int = 3) -> str:
        seen.append((first, second, third))
        return str(seen[-1])

    results = [combine.delay(1), combine.delay(1, second=2), combine.delay(first=1, third=3), combine.delay(1, 9)]
    assert [result.get() for result in results] == ["(1, 2, 3)"] * 3 + ["(1, 9, 3)"]


def test_bound_tasks_class_tasks_and_shared_tasks_work_too(app: Celery) -> None:
    runs: list[str] = []

    @app.task(shared=False, bind=True, ignore_result=True)
    @deduplicate(key="number")
    def bound(self: Task, number: int) -> str:
        runs.append(self.name)
        return "bound"

    class Counted(Task):  # type: ignore[misc]
        name = "counted"

        @deduplicate(key="number")
        def run(self, number: int) -> str:
            runs.append(self.name)
            return "class"

    counted = app.register_task(Counted())

    @shared_task(name=f"shared-{uuid.uuid4().hex}")
    @deduplicate(key="number")
    def shared(number: int) -> str:
        runs.append("shared")
        return "shared"

    for task, result in ((bound, "bound"), (counted, "class"), (app.tasks[shared.name], "shared")):
        runs.clear()
        assert [task.apply((7,)).get() for _ in range(2)] == [result, result]
        assert len(runs) == 1
        assert is_deduplicated(task)


def test_a_failed_run_is_released_and_the_next_one_runs(app: Celery) -> None:
    outcomes: list[Any] = [ValueError("broken"), 5]

    @app.task(shared=False)
    @deduplicate(key="number")
    def fail_once(number: int) -> int:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    results = [fail_once.delay(1) for _ in range(3)]
    assert [result.state for result in results] == ["FAILURE", "SUCCESS", "SUCCESS"]


def test_a_failure_is_remembered_when_asked_for(app: Celery) -> None:
    runs = []

    @app.task(shared=False)
    @deduplicate(key="number", remember_failures=True)
    def fail(number: int) -> None:
        runs.append(number)
        raise ValueError("broken for good", number)

    results = [fail.delay(1) for _ in range(2)]
    assert len(runs) == 1
    assert [type(result.result) for result in results] == [ValueError, ValueError]
    assert results[1].result.args == ("broken for good", 1)


def test_a_run_keeps_its_claim_through_its_own_retries(app: Celery) -> None:
    # Given a task that retries twice, and looks at its claim in between
    states, fencings = [], []

    @app.task(shared=False, bind=True, max_retries=5, default_retry_delay=7)
    @deduplicate(key="number")
    def persist(self: Task, number: int) -> str:
        fencings.append(current_claim().fencing)
        if self.request.retries < 2:
            raise self.retry()
        return "done"

    def look(sender: Any, request: Any, **_: Any) -> None:
        shown = store_for(app).show(f"{persist.name}:1")
        assert shown is not None
        assert shown.lease_left_seconds is not None
        states.append((shown.state, shown.lease_left_seconds > 60))

    from celery.signals import task_retry

    task_retry.connect(look, weak=False)
    try:
        result = persist.delay(1)
    finally:
        task_retry.disconnect(look)
    # Then it was parked each time for longer than the countdown, and each attempt had a higher fencing token
    assert result.get() == "done"
    assert states == [(PARKED, True)] * 2
    assert fencings == sorted(set(fencings))
    assert len(fencings) == 3


def test_autoretry_keeps_the_claim_until_it_gives_up(app: Celery) -> None:
    states = []

    @app.task(shared=False, autoretry_for=(Temporary,), max_retries=2, retry_backoff=3)
    @deduplicate(key="number")
    def waver(number: int) -> None:
        raise Temporary("again")

    def look(*_: Any, **__: Any) -> None:
        shown = store_for(app).show(f"{waver.name}:1")
        states.append(None if shown is None else shown.state)

    from celery.signals import task_failure, task_retry

    for signal in (task_retry, task_failure):
        signal.connect(look, weak=False)
    try:
        result = waver.delay(1)
    finally:
        for signal in (task_retry, task_failure):
            signal.disconnect(look)
    assert isinstance(result.result, Temporary)
    assert states == [PARKED, PARKED, RELEASED]


@pytest.mark.parametrize("error", [Ignore("not now"), Reject("no", requeue=False)])
def test_ignored_and_rejected_runs_release_their_claim(app: Celery, error: Exception) -> None:
    @app.task(shared=False)
    @deduplicate(key="number")
    def refuse(number: int) -> None:
        raise error

    refuse.delay(1)
    shown = store_for(app).show(f"{refuse.name}:1")
    assert shown is not None
    assert shown.state == RELEASED


def test_tasks_of_one_scope_share_their_keys(app: Celery) -> None:
    @app.task(shared=False)
    @deduplicate(key="number", scope="orders")
    def first(number: int) -> str:
        return "first"

    @app.task(shared=False)
    @deduplicate(key="number", scope="orders")
    def second(number: int) -> str:
        return "second"

    @app.task(shared=False)
    @deduplicate(key="number")
    def alone(number: int) -> str:
        return "alone"

    assert [task.delay(1).get() for task in (first, second, alone)] == ["first", "first", "alone"]


def test_a_direct_call_is_a_plain_call(app: Celery) -> None:
    runs = []

    @app.task(shared=False)
    @deduplicate(key="number")
    def count(number: int) -> int:
        runs.append(number)
        return len(runs)

    assert [count(1), count(1), count.delay(1).get()] == [1, 2, 3]


def test_a_direct_call_inside_another_task_does_not_see_its_claim(app: Celery) -> None:
    @app.task(shared=False)
    @deduplicate(key="number")
    def inner(number: int) -> int:
        return current_claim().fencing

    @app.task(shared=False)
    @deduplicate(key="number")
    def outer(number: int) -> int:
        return inner(number)

    assert isinstance(outer.delay(1).result, DeduplicationError)


def test_a_duplicate_waits_for_the_running_one(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    # Given a run that is held up
    started, go_on, waiting, runs = threading.Event(), threading.Event(), threading.Event(), []

    @app.task(shared=False)
    @deduplicate(key="number")
    def slow(number: int) -> str:
        runs.append(number)
        started.set()
        assert go_on.wait(60)
        return "slow"

    watch("celery_sharding.dedup.run", "waits for the run", waiting, caplog)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: slow.delay(1).result)
        assert started.wait(60)
        # When a duplicate comes
        second = pool.submit(lambda: slow.delay(1).result)
        assert waiting.wait(60)
        assert not second.done()
        # Then it gets the result as soon as there is one
        go_on.set()
        assert [first.result(60), second.result(60)] == ["slow", "slow"]
    assert runs == [1]


def test_a_duplicate_may_be_skipped_or_retried_instead(app: Celery) -> None:
    @app.task(shared=False)
    @deduplicate(key="number", on_running="skip")
    def skipped(number: int) -> str:
        return "ran"

    @app.task(shared=False, bind=True, max_retries=0)
    @deduplicate(key="number", on_running="retry", lease_seconds=40)
    def retried(self: Task, number: int) -> str:
        return "ran"

    # Given claims of another run
    store = store_for(app)
    for task in (skipped, retried):
        store.claim(f"{task.name}:1", owner=new_owner("another"), lease_seconds=40, ttl_seconds=100)
    # When duplicates come, then the one is ignored
    assert skipped.delay(1).state == "IGNORED"
    # And the other asks for a retry when the lease would end, whatever the limit of retries
    seen: list[Retry] = []

    def note(reason: Retry, **_: Any) -> None:
        seen.append(reason)
        other = store.show(f"{retried.name}:1")
        assert other is not None
        assert other.owner is not None
        store.release(f"{retried.name}:1", other.owner.run_id)

    from celery.signals import task_retry

    task_retry.connect(note, weak=False)
    try:
        assert retried.delay(1).get() == "ran"
    finally:
        task_retry.disconnect(note)
    assert 30 < seen[0].when <= 40
    assert not hasattr(retried, "override_max_retries")


def test_a_duplicate_behind_a_long_lease_asks_for_a_retry_that_a_shard_allows(app: Celery) -> None:
    # Given a sharded task whose claim another run holds for hours
    Sharding(app, groups=[ShardGroup("orders", shards=2)])

    @app.task(shared=False, bind=True, shard_group="orders", shard_key="number")
    @deduplicate(key="number", on_running="retry")
    def retried(self: Task, number: int) -> str:
        return "ran"

    adapt_tasks(SimpleNamespace(consumer=SimpleNamespace(app=app), sharded=[retried.name]))
    store_for(app).claim(f"{retried.name}:1", owner=new_owner("another"), lease_seconds=7_200, ttl_seconds=100)
    # When a duplicate comes through a shard
    seen = {"id": "second", "args": (1,), "kwargs": {}, "retries": 0, SHARD_ATTRIBUTE: "orders/0"}
    retried.push_request(**seen, is_eager=False, called_directly=False)
    try:
        with pytest.raises(InPlaceRetry) as caught:
            retried.run(1)
    finally:
        retried.pop_request()
    # Then it looks again within half the consumer time-out
    assert 0 < caught.value.seconds() <= app.sharding.settings.consumer_timeout_seconds / 2


def test_a_taken_over_run_is_no_success(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    # Given a task whose claim is taken over while it runs
    @app.task(shared=False)
    @deduplicate(key="number")
    def slow(number: int) -> str:
        holder = store.show(f"{slow.name}:1")
        assert holder is not None
        assert holder.owner is not None
        taker = store.claim(
            f"{slow.name}:1",
            owner=new_owner("another"),
            lease_seconds=60,
            ttl_seconds=60,
            evict=holder.owner.run_id,
        )
        assert isinstance(taker, Claimed)
        return "stale"

    store = store_for(app)
    # When it returns, then its result is refused
    result = slow.delay(1)
    assert result.state == "FAILURE"
    assert isinstance(result.result, ClaimLost)
    assert "commit was refused" in caplog.text


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_another_one_of_the_same_task_took_over_stores_no_state(app: Celery, fails: bool) -> None:
    # Given a task that another run of the same message takes over while it runs
    @app.task(shared=False)
    @deduplicate(key="number")
    def slow(number: int) -> str:
        holder = store.show(f"{slow.name}:1")
        assert holder is not None
        assert holder.owner is not None
        store.claim(
            f"{slow.name}:1",
            owner=new_owner(holder.owner.task_id),
            lease_seconds=60,
            ttl_seconds=60,
            evict=holder.owner.run_id,
        )
        if fails:
            raise ValueError("broken, and too late")
        return "stale"

    store = store_for(app)
    # When it ends, then it is ignored: the state is that of the other run
    assert slow.delay(1).state == "IGNORED"
    shown = store.show(f"{slow.name}:1")
    assert shown is not None
    assert shown.state == RUNNING


class Unreliable(MemoryStore):
    """A store that does not answer the operations named in `down`."""

    def __init__(self) -> None:
        super().__init__()
        self.down: set[str] = set()

    def claim(self, key: str, **options: Any) -> Any:
        self._answer("claim", key)
        return super().claim(key, **options)

    def commit(self, key: str, token: str, **options: Any) -> bool:
        self._answer("commit", key)
        return super().commit(key, token, **options)

    def _answer(self, operation: str, key: str) -> None:
        if operation in self.down:
            raise StoreUnavailable("the store is down", key=key)


@pytest.mark.parametrize("on_store_error", ["fail", "wait"])
def test_without_its_store_a_task_fails_or_waits_but_never_runs(
    app: Celery, on_store_error: Any, caplog: pytest.LogCaptureFixture
) -> None:
    # Given a store that does not answer
    runs, waiting, store = [], threading.Event(), use_store(app, Unreliable())
    store.down.add("claim")

    @app.task(shared=False)
    @deduplicate(key="number", on_store_error=on_store_error)
    def pay(number: int) -> str:
        runs.append(number)
        return "paid"

    watch("celery_sharding.dedup.run", "waits for the claim store", waiting, caplog)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(lambda: pay.delay(1).result)
        if on_store_error == "fail":
            # Then the task fails, or
            assert isinstance(result.result(60), StoreUnavailable)
            assert runs == []
        else:
            # it waits until the store is back
            assert waiting.wait(60)
            assert runs == []
            store.down.clear()
            assert result.result(60) == "paid"


def test_a_commit_survives_a_hiccup_of_the_store(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    tried, store = threading.Event(), use_store(app, Unreliable())
    store.down.add("commit")

    @app.task(shared=False)
    @deduplicate(key="number")
    def pay(number: int) -> str:
        return "paid"

    watch("celery_sharding.dedup.run", "is tried again", tried, caplog)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(lambda: pay.delay(1).result)
        assert tried.wait(60)
        store.down.clear()
        assert result.result(60) == "paid"


def test_a_task_that_calls_itself_with_its_own_key_is_told(app: Celery) -> None:
    @app.task(shared=False)
    @deduplicate(key="number")
    def recurse(number: int) -> Any:
        return recurse.apply((number,), throw=True).get()

    assert isinstance(recurse.delay(1).result, ClaimHeld)


def test_a_claim_is_known_inside_the_task_only(app: Celery) -> None:
    @app.task(shared=False)
    @deduplicate(key="number")
    def look(number: int) -> list[Any]:
        claim = current_claim()
        return [claim.key, claim.fencing, claim.is_lost]

    key, fencing, is_lost = look.delay(1).get()
    assert (key, is_lost) == (f"{look.name}:1", False)
    assert fencing > 0
    with pytest.raises(DeduplicationError, match="no claim is held here"):
        current_claim()


def test_a_result_that_is_too_large_is_refused_with_advice(app: Celery) -> None:
    @app.task(shared=False)
    @deduplicate(key="number")
    def bulky(number: int) -> str:
        return "x" * 1_100_000

    result = bulky.delay(1)
    assert isinstance(result.result, DeduplicationError)
    assert "return where it is" in str(result.result)


@pytest.mark.parametrize("serializer", ["json", "pickle"])
def test_results_go_through_the_result_serializer(app: Celery, serializer: str) -> None:
    app.conf.update(result_serializer=serializer, result_accept_content=[serializer])

    @app.task(shared=False)
    @deduplicate(key="number")
    def make(number: int) -> Any:
        return {"at": (1, 2), "text": "é"}

    make.delay(1)
    assert make.delay(1).get() == {"at": (1, 2) if serializer == "pickle" else [1, 2], "text": "é"}


def test_a_damaged_result_fails_the_task_and_is_kept(app: Celery) -> None:
    @app.task(shared=False)
    @deduplicate(key="number")
    def make(number: int) -> int:
        return number

    store, key = store_for(app), f"{make.name}:1"
    token = store.claim(key, owner=new_owner("x"), lease_seconds=9, ttl_seconds=99).token  # type: ignore[union-attr]
    store.commit(key, token, result=b"9 rubbish\n", ttl_seconds=99)
    assert isinstance(make.delay(1).result, DamagedRecord)
    shown = store.show(key)
    assert shown is not None
    assert shown.state == DONE


@pytest.mark.parametrize("value", [None, "", True, 1.5, [1], {"a": 1}, "x" * 256, "\udcff"])
def test_a_key_that_cannot_be_used_fails_the_task_before_it_runs(app: Celery, value: Any) -> None:
    runs = []

    @app.task(shared=False)
    @deduplicate(key=lambda arguments: value)
    def never(number: int) -> None:
        runs.append(number)

    result = never.delay(1)
    assert isinstance(result.result, DeduplicationError)
    assert never.name in str(result.result)
    assert runs == []


def test_a_key_callable_that_raises_fails_the_task_and_is_named(app: Celery) -> None:
    @app.task(shared=False)
    @deduplicate(key=lambda arguments: arguments["nothing"])
    def never(number: int) -> None: ...

    result = never.delay(1)
    assert isinstance(result.result, DeduplicationError)
    assert "callable raised KeyError" in str(result.result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ttl_seconds": 0}, "ttl_seconds"),
        ({"ttl_seconds": "1"}, "ttl_seconds"),
        ({"lease_seconds": 0}, "lease_seconds"),
        ({"lease_seconds": True}, "lease_seconds"),
        ({"ttl_seconds": 5, "lease_seconds": 6}, "shorter than lease_seconds"),
        ({"on_running": "wiat"}, "did you mean 'wait'"),
        ({"on_store_error": "skip"}, "on_store_error"),
        ({"remember_failures": 1}, "remember_failures"),
        ({"scope": ""}, "scope"),
        ({"key": 7}, "name of an argument"),
        ({"key": "nubmer"}, "did you mean 'number'"),
        ({"key": "rest"}, "collects many"),
    ],
)
def test_wrong_options_are_refused_when_the_task_is_defined(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):

        @deduplicate(**options)
        def task(number: int, **rest: Any) -> None: ...


def test_the_wrong_order_of_decorators_is_refused_with_the_right_one(app: Celery) -> None:
    for decorate in (app.task(shared=False), shared_task(name=uuid.uuid4().hex)):
        with pytest.raises(ConfigurationError, match=r"@app\.task\n    @deduplicate"):

            @deduplicate(key="number")
            @decorate
            def task(number: int) -> None: ...

    assert not app.finalized


@pytest.mark.parametrize("arguments", [(), (1,), (1, 2)], ids=["none", "one", "two"])
@pytest.mark.parametrize("bind", [False, True], ids=["plain", "bound"])
def test_without_parentheses_copies_of_one_call_run_once(app: Celery, bind: bool, arguments: tuple[int, ...]) -> None:
    # Given a task with the bare decorator
    runs = []

    @deduplicate
    def plain(*numbers: int) -> str:
        runs.append(numbers)
        return "ran"

    @deduplicate
    def bound(self: Any, *numbers: int) -> str:
        runs.append(numbers)
        return "ran"

    task = app.task(bind=bind, shared=False)(bound if bind else plain)
    # When one call comes twice
    results = [task.apply_async(arguments, task_id="one").result for _ in range(2)]
    # Then it ran once, under its own name
    assert (results, runs) == (["ran", "ran"], [arguments])
    assert task.name.endswith("bound" if bind else "plain")
    assert is_deduplicated(task)


def test_without_parentheses_a_method_and_an_object_that_is_called_serve(app: Celery) -> None:
    runs: list[tuple[int, ...]] = []

    class Sum(Task):  # type: ignore[type-arg]
        name = "sum"

        @deduplicate
        def run(self, first: int, second: int) -> int:
            runs.append((first, second))
            return first + second

    class Call:
        def __call__(self, number: int) -> int:
            runs.append((number,))
            return number

    task = app.register_task(Sum())
    other = app.task(shared=False, name="call")(deduplicate(Call()))
    assert [task.apply_async((1, 2), task_id="a").result for _ in range(2)] == [3, 3]
    assert [other.apply_async((4,), task_id="b").result for _ in range(2)] == [4, 4]
    assert runs == [(1, 2), (4,)]


def test_what_stands_in_place_of_the_task_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="key=…"):
        deduplicate(lambda arguments: arguments["event"])
    with pytest.raises(ConfigurationError, match="key=…"):
        deduplicate("event")  # type: ignore[type-var]
    for decorate in (deduplicate, deduplicate()):
        with pytest.raises(ConfigurationError, match="def run"):

            @decorate
            class Broken: ...


def test_defining_a_task_does_not_look_for_the_backend() -> None:
    app = Celery("web", broker="memory://", backend="nonsense://", set_as_current=False)

    @app.task(shared=False)
    @deduplicate(key="number")
    def task(number: int) -> None: ...

    assert is_deduplicated(task)
    app.close()


def test_publishing_needs_no_backend() -> None:
    app = Celery("web", broker="memory://localhost", set_as_current=False)

    @app.task(shared=False)
    @deduplicate(key="number")
    def task(number: int) -> None: ...

    assert task.delay(1).id
    app.close()


@pytest.mark.parametrize(
    "backend",
    [
        *("rpc://", None, "disabled://", "celery.backends.base:KeyValueStoreBackend", "file:///none"),
        "mongodb://me:secret@no-driver/?password=secret",
    ],
)
def test_a_worker_without_a_store_does_not_start(backend: str | None) -> None:
    app = Celery("worker", broker="memory://", backend=backend, set_as_current=False)
    check_tasks(app)

    @app.task(shared=False, name="shop.pay")
    @deduplicate(key="number")
    def pay(number: int) -> None: ...

    with pytest.raises(NoUsableStore, match=r"redis://.*shop\.pay") as refused:
        check_tasks(app)
    assert "secret" not in str(refused.value)
    app.close()


def test_memory_serves_one_process_only(app: Celery) -> None:
    @app.task(shared=False, name="shop.pay")
    @deduplicate(key="number")
    def pay(number: int) -> None: ...

    check_tasks(app, has_child_processes=False)
    with pytest.raises(NoUsableStore, match="child process"):
        check_tasks(app, has_child_processes=True)


def test_eager_tasks_of_an_app_without_backend_are_deduplicated_in_memory() -> None:
    app = Celery("eager", set_as_current=False)

    @app.task(shared=False)
    @deduplicate(key="number")
    def make(number: int) -> str:
        return uuid.uuid4().hex

    assert make.apply((1,)).get() == make.apply((1,)).get()
    app.close()


def watch(logger: str, text: str, event: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    """Set `event` when `logger` says `text`."""

    class Watcher(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            if text in record.getMessage():
                event.set()
            return True

    caplog.set_level(logging.DEBUG, logger)
    caplog.handler.addFilter(Watcher())


def use_store(app: Celery, store: Unreliable) -> Unreliable:
    """Let `app` keep its claims in `store`."""
    app._celery_sharding_store = (os.getpid(), store)
    return store
