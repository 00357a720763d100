"""Eager mode: a call is refused as one that is published would be, wherever `Sharding(app)` stands."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, Task, _state, chain, chord, group, shared_task
from kombu import Connection

from celery_sharding import ShardGroup, Sharding
from celery_sharding.errors import ConfigurationError, ShardKeyError, UnsupportedOption

ORDERS = ShardGroup("orders", shards=1)
SHARDED = {"shard_group": "orders", "shard_key": "order_id"}


def new_app(*, eager: bool = True) -> Celery:
    return Celery("shop", broker="memory://", set_as_current=False, task_always_eager=eager)


def pay(order_id: Any = 0, amount: int = 1) -> tuple[Any, int]:
    return order_id, amount


def decorated(app: Celery) -> Callable[[], Any]:
    task = app.task(shared=False, name="pay", **SHARDED)(pay)
    return lambda: task


def bound(app: Celery) -> Callable[[], Any]:
    def pay_bound(self: Task, order_id: Any = 0, amount: int = 1) -> tuple[Any, int]:
        return order_id, amount

    task = app.task(shared=False, name="pay", bind=True, **SHARDED)(pay_bound)
    return lambda: task


def shared(app: Celery) -> Callable[[], Any]:
    name = f"pay-{uuid.uuid4().hex}"  # every app that is alive gets it
    shared_task(name=name, **SHARDED)(pay)
    return lambda: app.tasks[name]


def class_based(app: Celery) -> Callable[[], Any]:
    class Pay(Task):
        name = "pay"
        shard_group = "orders"
        shard_key = "order_id"

        def run(self, order_id: Any = 0, amount: int = 1) -> tuple[Any, int]:
            return order_id, amount

    task = app.register_task(Pay())
    return lambda: task


def with_base(app: Celery) -> Callable[[], Any]:
    class Base(Task):
        abstract = True

        def apply(self, *args: Any, **options: Any) -> Any:
            return super().apply(*args, **options)

    task = app.task(shared=False, name="pay", base=Base, **SHARDED)(pay)
    return lambda: task


def routed(app: Celery) -> Callable[[], Any]:
    app.conf.sharding_routes = {"pay": {"group": "orders", "key": "order_id"}}
    task = app.task(shared=False, name="pay")(pay)
    return lambda: task


MADE = [decorated, bound, shared, class_based, with_base, routed]
# How a call is made, and what it needs of the task.
CALLS: dict[str, Callable[..., Any]] = {
    "apply_async": lambda task, args, **options: task.apply_async(args, **options),
    "apply": lambda task, args, **options: task.apply(args, **options),
    "signature": lambda task, args, **options: task.signature(args, **options).apply_async(),
    "signature.apply": lambda task, args, **options: task.signature(args, **options).apply(),
    "chain": lambda task, args, **options: chain(task.si(1), task.si(*args).set(**options), app=task.app).apply_async(),
    "group": lambda task, args, **options: group(task.si(*args).set(**options), app=task.app).apply_async(),
    "chord": lambda task, args, **options: chord(
        [task.si(1)], task.si(*args).set(**options), app=task.app
    ).apply_async(),
}
REFUSED: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((None,), {}, ShardKeyError, "the shard key is None"),
    (("",), {}, ShardKeyError, "the shard key is empty"),
    ((1.5,), {}, ShardKeyError, "must be a str, an int or a UUID"),
    ((True,), {}, ShardKeyError, "not a bool"),
    ((1,), {"shard_key": ""}, ShardKeyError, "empty"),
    ((1,), {"countdown": 5}, UnsupportedOption, "eta or countdown"),
    ((1,), {"eta": "2030-01-01T00:00:00"}, UnsupportedOption, "eta or countdown"),
    ((1,), {"priority": 3}, UnsupportedOption, "priority=3"),
    ((1,), {"queue": "elsewhere"}, UnsupportedOption, "queue='elsewhere'"),
    ((1,), {"exchange": "elsewhere"}, UnsupportedOption, "exchange='elsewhere'"),
    ((1,), {"routing_key": "elsewhere"}, UnsupportedOption, "routing_key='elsewhere'"),
    ((1,), {"connection": Connection("amqp://elsewhere")}, UnsupportedOption, "connection=…"),
    ((1,), {"shardkey": "1"}, UnsupportedOption, "did you mean 'shard_key'"),
]


@pytest.fixture(autouse=True)
def _shared_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_state, "_on_app_finalizers", set(_state._on_app_finalizers))


@pytest.mark.parametrize("order", ["sharding first", "tasks first", "tasks made first", "finalized first"])
@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
def test_a_task_without_its_key_is_refused_however_it_was_made(make: Any, order: str) -> None:
    # Given a task and an app, set up in this order
    app = new_app()
    if order == "sharding first":
        Sharding(app, groups=[ORDERS])
    elif order == "finalized first":
        app.finalize()
    find = make(app)
    if order == "tasks made first":
        _ = find().name
    if order != "sharding first":
        Sharding(app, groups=[ORDERS])
    task = find()
    # When it is called with a key, it runs, and without one it does not
    assert task.delay(7).get() == (7, 1)
    assert task.apply_async((7,), shard_key="x").get() == (7, 1)
    for call in (lambda: task.delay(None), lambda: task.apply((None,)), lambda: task.s(None).apply()):
        with pytest.raises(ShardKeyError):
            call()


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize(("args", "options", "error", "text"), REFUSED)
def test_what_a_publish_refuses_is_refused_in_eager_mode(how, args, options, error, text) -> None:
    # Given an app in eager mode
    app = new_app()
    Sharding(app, groups=[ORDERS])
    task = decorated(app)()
    # When a call is wrong, then the caller is told as elsewhere
    with pytest.raises(error, match=text):
        CALLS[how](task, args, **options)


@pytest.mark.parametrize(("args", "options", "error", "text"), REFUSED)
def test_eager_mode_and_a_publish_say_the_same(args, options, error, text) -> None:
    said = []
    for eager in (True, False):
        app = new_app(eager=eager)
        Sharding(app, groups=[ORDERS])
        with pytest.raises(error, match=text) as caught:
            decorated(app)().apply_async(args, **options)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_eager_mode_may_be_set_when_all_else_was_used_already() -> None:
    # Given an app that has published
    app = new_app(eager=False)
    Sharding(app, groups=[ORDERS])
    task = decorated(app)()
    task.delay(1)
    # When a test sets eager mode
    app.conf.task_always_eager = True
    # Then a call is checked, and runs where it is called
    with pytest.raises(ShardKeyError):
        task.delay(None)
    assert task.delay(2).get() == (2, 1)


def test_a_callback_is_checked_like_a_call() -> None:
    app = new_app()
    Sharding(app, groups=[ORDERS])
    task = decorated(app)()
    with pytest.raises(ShardKeyError):
        task.apply_async((1,), link=task.si(None))


def test_a_retry_keeps_its_key_and_may_wait_but_not_move() -> None:
    # Given a task whose key stands at the call only, and which retries
    app = new_app()
    Sharding(app, groups=[ORDERS])

    @app.task(bind=True, shared=False, name="again", shard_group="orders", max_retries=3)
    def again(self: Any, **options: Any) -> int:
        if self.request.retries < 2:
            raise self.retry(countdown=5, **options)
        return int(self.request.retries)

    # Then it comes to its end, and one that would move does not
    assert again.apply_async(shard_key="a").get() == 2
    for options in ({"queue": "elsewhere"}, {"shard_key": "b"}, {"priority": 3}):
        with pytest.raises(UnsupportedOption):
            again.apply_async(kwargs=options, shard_key="a")


def test_a_wrong_configuration_is_told_in_eager_mode() -> None:
    app = new_app()
    Sharding(app, groups=[ORDERS])
    task = app.task(shared=False, name="lost", shard_group="order", shard_key="order_id")(pay)
    with pytest.raises(ConfigurationError, match="did you mean 'orders'"):
        task.delay(1)


def test_ordinary_tasks_run_as_ever_with_all_their_options() -> None:
    app = new_app()
    Sharding(app, groups=[ORDERS])
    plain = app.task(shared=False, name="plain")(pay)
    assert plain.apply_async((None,), countdown=5, queue="anywhere", priority=3).get() == (None, 1)
    with pytest.raises(ShardKeyError, match="is not sharded"):
        plain.apply_async((1,), shard_key="a")


@pytest.mark.parametrize("order", ["sharding first", "tasks first"])
def test_a_method_of_a_task_that_is_called_apply_stays_its_own(order: str) -> None:
    # Given tasks that have one, which Celery never calls outside of eager mode
    app = new_app(eager=False)

    class Discount(Task):
        name = "discount"
        shard_group = "orders"
        shard_key = "order_id"

        def run(self, order_id: Any) -> None: ...

        def apply(self, coupon: str) -> str:
            return coupon

    class Fixed(Task):
        name = "fixed"
        apply = staticmethod(len)

        def run(self) -> None: ...

    if order == "sharding first":
        Sharding(app, groups=[ORDERS])
    discount, fixed = app.register_task(Discount()), app.register_task(Fixed())
    if order == "tasks first":
        Sharding(app, groups=[ORDERS])
    # Then it is called with what it takes
    assert (discount.apply("c"), discount.apply(coupon="c"), fixed.apply([1])) == ("c", "c", 1)


def test_annotations_of_the_application_are_kept() -> None:
    # Given an application that annotates all tasks and one of them, `apply` too
    app = new_app()
    seen: list[str] = []

    def note(apply: Callable[..., Any]) -> Callable[..., Any]:
        def noted(self: Any, *args: Any, **options: Any) -> Any:
            seen.append(self.name)
            return apply(self, *args, **options)

        return noted

    app.conf.task_annotations = {"pay": {"rate_limit": "3/s", "@apply": note}, "*": {"max_retries": 9}}
    Sharding(app, groups=[ORDERS])
    task = decorated(app)()
    # Then they hold, beside our checks
    assert (task.rate_limit, task.max_retries) == ("3/s", 9)
    assert task.delay(1).get() == (1, 1)
    with pytest.raises(ShardKeyError):
        task.delay(None)
    assert seen == ["pay"]


def test_an_app_without_sharding_is_not_touched() -> None:
    plain, other = new_app(), new_app()
    Sharding(other, groups=[ORDERS])
    assert "apply" not in vars(type(decorated(plain)()))
    assert decorated(plain)().apply((None,), countdown=5).get() == (None, 1)


DJANGO = """
import os, sys, types
settings = types.ModuleType("site_settings")
settings.INSTALLED_APPS = []
settings.DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
settings.USE_TZ = True
settings.CELERY_BROKER_URL = "memory://"
settings.CELERY_TASK_ALWAYS_EAGER = True
settings.CELERY_SHARDING_GROUPS = {"orders": {"shards": 1}}
sys.modules["site_settings"] = settings
os.environ["DJANGO_SETTINGS_MODULE"] = "site_settings"

from celery import Celery, shared_task
from celery_sharding import Sharding
from celery_sharding.errors import ShardKeyError

app = Celery("site")
%(before)s
app.config_from_object("django.conf:settings", namespace="CELERY")
%(after)s
ran = []

@shared_task(name="pay", shard_group="orders", shard_key="order_id")
def pay(order_id):
    ran.append(order_id)

import django
django.setup()
from celery.contrib.django.task import DjangoTask
from django.db import transaction

assert not app.configured and not app.finalized
assert isinstance(app.tasks["pay"], DjangoTask)
with transaction.atomic():
    pay.delay_on_commit(1)
    pay.apply_async_on_commit((2,), shard_key="x")
    assert ran == []
assert ran == [1, 2]
try:
    with transaction.atomic():
        pay.delay_on_commit(None)
except ShardKeyError:
    ran.append("refused")
assert ran == [1, 2, "refused"]
"""


@pytest.mark.parametrize("stands", ["before", "after"])
def test_in_a_django_project_in_eager_mode_tasks_wait_for_the_commit_and_are_checked(
    stands: str, tmp_path: Path
) -> None:
    places = {"before": "", "after": ""} | {stands: "Sharding(app)"}
    (tmp_path / "program.py").write_text(textwrap.dedent(DJANGO) % places)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"],
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert (done.returncode, done.stdout) == (0, "")
