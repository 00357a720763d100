"""Where `Sharding(app)` may stand, what it may stand beside, and that copies of an app have it, too."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, _state, shared_task
from celery.app.amqp import AMQP, Queues
from kombu import Connection

from celery_sharding import ShardGroup, Sharding
from celery_sharding.errors import ConfigurationError

ORDERS = ShardGroup("orders", shards=2)
IN_CONF = {
    "sharding_groups": {"mail": {"shards": 2}},
    "sharding_routes": {"mails.*": {"group": "mail", "key": "to"}},
}


def new_app(name: str = "shop", **options: Any) -> Celery:
    return Celery(name, broker="memory://", set_as_current=False, **options)


def add_task(app: Celery) -> None:
    @app.task(shared=False, name="pay", shard_group="orders", shard_key="order_id")
    def pay(order_id: int) -> None:
        pass


def exchange_of(app: Celery, name: str, **kwargs: Any) -> Any:
    app.finalize()
    routed = app.amqp.router.route({}, name, (), kwargs, app.tasks.get(name))
    return routed.get("exchange") or routed["queue"].name


@pytest.mark.parametrize("order", ["sct", "stc", "cst", "cts", "tsc", "tcs", "sctu", "ctus", "tcus", "cuts"])
def test_sharding_may_stand_before_or_after_configuration_tasks_and_first_use(order: str) -> None:
    # Given an app that is set up in this order, with a catch-all of its own
    app = new_app()
    steps = {
        "s": lambda: Sharding(app, groups=[ORDERS]),
        "c": lambda: app.conf.update(IN_CONF, task_routes={"*": {"queue": "catch-all"}}),
        "t": lambda: add_task(app),
        "u": lambda: (app.amqp.queues, app.amqp.router, app.amqp.send_task_message),
    }
    for step in order:
        steps[step]()
    # Then tasks of both kinds are routed, and others are not
    assert exchange_of(app, "pay", order_id=1) == "shards.orders"
    assert exchange_of(app, "mails.send", to="a") == "shards.mail"
    assert exchange_of(app, "plain") == "catch-all"
    assert app.amqp.queues.selection() == {"orders": None, "mail": None}


def test_sharding_neither_reads_the_configuration_nor_makes_the_tasks() -> None:
    # Given a configuration that nobody may read yet
    app = new_app()
    app.config_from_object("no.such.module", silent=False)
    add_task(app)
    # When the app is extended, then neither happened
    Sharding(app, groups=[ORDERS])
    assert not app.configured
    assert not app.finalized


def test_settings_may_be_in_a_namespace() -> None:
    app = new_app(namespace="CELERY")
    Sharding(app)
    settings = type("Settings", (), {
        "CELERY_SHARDING_GROUPS": IN_CONF["sharding_groups"],
        "CELERY_SHARDING_ROUTES": IN_CONF["sharding_routes"],
        "CELERY_SHARDING_PUBLISH_TIMEOUT_SECONDS": 3,
        "SHARDING_GROUPS": {"other": {"shards": 1}},
    })  # fmt: skip
    app.config_from_object(settings, namespace="CELERY")

    assert exchange_of(app, "mails.send", to="a") == "shards.mail"
    assert set(app.sharding.settings.groups) == {"mail"}
    assert app.sharding.settings.publish_timeout_seconds == 3.0


def test_a_wrong_setting_is_an_error_for_every_publish_and_for_no_import() -> None:
    app = new_app()
    app.conf.sharding_groups = {"Mail": {"shards": 2}}
    Sharding(app, groups=[ORDERS])
    add_task(app)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="'Mail'"):
            exchange_of(app, "pay", order_id=1)


def test_a_group_in_code_and_in_settings_is_an_error() -> None:
    app = new_app()
    app.conf.sharding_groups = {"orders": {"shards": 2}}
    Sharding(app, groups=[ORDERS])
    with pytest.raises(ConfigurationError, match="keep one"):
        _ = app.sharding.settings


def test_an_app_has_one_sharding() -> None:
    app = new_app()
    first = Sharding(app, groups=[ORDERS])
    with pytest.raises(ConfigurationError, match="has a Sharding already; give it all groups at once"):
        Sharding(app, groups=[ShardGroup("mail", shards=1)])
    assert app.sharding is first
    assert set(app.sharding.settings.groups) == {"orders"}


def test_groups_that_are_wrong_leave_the_app_as_it_was() -> None:
    app = new_app()
    with pytest.raises(ConfigurationError, match="two shard groups"):
        Sharding(app, groups=[ORDERS, ORDERS])
    assert not hasattr(app, "sharding")
    Sharding(app, groups=[ORDERS])


def test_two_apps_do_not_know_of_each_other() -> None:
    one, two, none = new_app("one"), new_app("two"), new_app("none")
    Sharding(one, groups=[ORDERS])
    Sharding(two, groups=[ShardGroup("mail", shards=1)])
    for app in (one, two, none):
        app.conf.sharding_routes = {"t": {"group": "orders" if app is one else "mail", "key": "k"}}
    assert exchange_of(one, "t", k=1) == "shards.orders"
    assert exchange_of(two, "t", k=1) == "shards.mail"
    assert exchange_of(none, "t", k=1) == "celery"
    assert type(none.amqp) is AMQP


def test_shared_tasks_are_sharded_in_the_apps_that_have_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_state, "_on_app_finalizers", set(_state._on_app_finalizers))

    # Given a library with a shared task, and an app with groups
    @shared_task(name="library.pay", shard_group="orders", shard_key="order_id")
    def pay(order_id: int) -> None:
        pass

    app = new_app()
    Sharding(app, groups=[ORDERS])
    assert exchange_of(app, "library.pay", order_id=1) == "shards.orders"
    # And one without Sharding, which goes on as if nothing was said
    assert exchange_of(new_app(), "library.pay", order_id=1) == "celery"


class OwnQueues(Queues):
    """Queues of the application."""

    def format(self, indent: int = 0, indent_first: bool = True) -> str:
        return f"own {super().format(indent, indent_first)}"


class OwnAMQP(AMQP):
    """An AMQP class of the application."""

    queues_cls = OwnQueues

    def describe(self) -> str:
        return "own"


@pytest.mark.parametrize("used", [False, True])
def test_an_amqp_class_of_the_application_is_extended_not_replaced(used: bool) -> None:
    app = new_app(amqp=OwnAMQP)
    if used:
        assert type(app.amqp.queues) is OwnQueues
    Sharding(app, groups=[ORDERS])
    add_task(app)

    assert exchange_of(app, "pay", order_id=1) == "shards.orders"
    assert app.amqp.describe() == "own"
    assert isinstance(app.amqp, OwnAMQP)
    assert isinstance(app.amqp.queues, OwnQueues)
    assert "own" in app.amqp.queues.format()


def test_an_amqp_class_may_be_given_by_its_name() -> None:
    app = new_app(amqp=f"{AMQP.__module__}:AMQP")
    Sharding(app, groups=[ORDERS])
    add_task(app)
    assert exchange_of(app, "pay", order_id=1) == "shards.orders"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda app: pickle.loads(pickle.dumps(app))])
@pytest.mark.parametrize("used", [False, True])
def test_a_copy_of_an_app_has_its_groups(copied: Any, used: bool) -> None:
    # Given an app with groups in code and configuration
    app = new_app()
    app.conf.update(IN_CONF)
    Sharding(app, groups=[ORDERS])
    add_task(app)
    if used:
        exchange_of(app, "pay", order_id=1)
    # When it is copied, as Celery does for processes that are not forked
    other = copied(app)
    add_task(other)
    # Then the copy routes, and has a Sharding of its own
    assert exchange_of(other, "pay", order_id=1) == "shards.orders"
    assert exchange_of(other, "mails.send", to="a") == "shards.mail"
    assert other.sharding is not app.sharding
    assert other.sharding.app is other
    # And a copy of the copy as well
    assert exchange_of(copied(other), "mails.send", to="a") == "shards.mail"


def test_tasks_can_be_pickled() -> None:
    app = Celery("pickled", broker="memory://")
    Sharding(app, groups=[ORDERS])
    add_task(app)
    app.finalize()
    assert pickle.loads(pickle.dumps(app.tasks["pay"])) is app.tasks["pay"]


@pytest.mark.parametrize(
    ("broker", "connection", "is_own"),
    [
        ("amqp://", "amqp://localhost:5672//", True),
        ("amqp://", "amqp://other:secret@127.0.0.1//", True),
        ("amqp://", "amqp://127.0.0.1:5673//", False),
        ("amqp://", "amqp://localhost/other", False),
        ("amqp://", "amqp://elsewhere", False),
        ("amqp://a;amqp://b:99", "amqp://b:99", True),
        ("amqp://a;amqp://b:99", "amqp://b", False),
        ("pyamqp://a/v", "amqp://a/v", True),
        ("memory://", "memory://", True),
    ],
)
def test_the_broker_of_a_connection_is_told_by_host_port_and_virtual_host(broker, connection, is_own) -> None:
    app = Celery("shop", broker=broker, set_as_current=False)
    sharding = Sharding(app, groups=[ORDERS])
    assert sharding.is_own_broker(Connection(connection)) is is_own


DJANGO = """
import os, sys, types
settings = types.ModuleType("site_settings")
settings.INSTALLED_APPS = []
settings.DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
settings.USE_TZ = True
settings.CELERY_BROKER_URL = "memory://"
settings.CELERY_SHARDING_GROUPS = {"orders": {"shards": 1}}
settings.CELERY_SHARDING_ROUTES = {"old.*": {"group": "orders", "key": "order_id"}}
sys.modules["site_settings"] = settings
os.environ["DJANGO_SETTINGS_MODULE"] = "site_settings"

from celery import Celery, shared_task
from celery_sharding import Sharding

app = Celery("site")
%(before)s
app.config_from_object("django.conf:settings", namespace="CELERY")
%(after)s

@shared_task(name="pay", shard_group="orders", shard_key="order_id")
def pay(order_id):
    pass

@shared_task(name="old.pay")
def old(order_id):
    pass

import django
django.setup()
from celery.contrib.django.task import DjangoTask
from django.db import connection, transaction

def waiting():
    with app.connection_for_read() as broker:
        found = []
        while (message := broker.default_channel.basic_get("shards.orders.g001.000", no_ack=True)) is not None:
            found.append(message.headers["shard_key"])
        return found

assert isinstance(app.tasks["pay"], DjangoTask)
pay.delay(1)
old.delay(order_id=2)
assert waiting() == ["1", "2"]
with transaction.atomic():
    pay.delay_on_commit(3)
    pay.apply_async_on_commit((4,), shard_key="four")
    assert waiting() == []
assert waiting() == ["3", "four"]
try:
    with transaction.atomic():
        pay.delay_on_commit(5)
        raise KeyError
except KeyError:
    pass
assert waiting() == []
"""


@pytest.mark.parametrize("stands", ["before", "after"])
def test_in_a_django_project_tasks_keep_their_class_and_wait_for_the_commit(stands: str, tmp_path: Path) -> None:
    # Given a Django project whose settings name a group, when tasks are published inside transactions
    places = {"before": "", "after": ""} | {stands: "Sharding(app)"}
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(DJANGO) % places)
    # Then they leave with the commit, by their keys
    done = subprocess.run(
        [sys.executable, program], check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert (done.returncode, done.stdout) == (0, "")
