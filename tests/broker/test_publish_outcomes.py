"""Each way in which a publish may end, under its own name: the real broker, which is asked for what it refuses."""

from __future__ import annotations

import socket
import ssl
import time
import uuid
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit, urlunsplit

import pytest
from amqp import Message
from celery import Celery, chain, group
from kombu import Connection

from celery_sharding import ShardGroup, Sharding
from celery_sharding.errors import (
    BackendUnavailable,
    BrokerUnavailable,
    PublishError,
    PublishRefused,
    TopologyError,
)
from celery_sharding.testing import FaultProxy
from celery_sharding.topology import Names

pytestmark = pytest.mark.timeout(120)


def make_app(group_name: str, broker_url: str, **conf: object) -> Celery:
    """Return an app with one sharded task, `step`, which takes its key."""
    app = Celery(group_name, broker=broker_url, set_as_current=False)
    app.conf.update({"task_publish_retry_policy": {"max_retries": 1, "interval_start": 0}, **conf})
    Sharding(app, groups=[ShardGroup(group_name, shards=2)])

    @app.task(shared=False, shard_group=group_name, shard_key="key", name="step")
    def step(key, payload=None):
        pass

    return app


def with_login(url: str, user: str, password: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{user}:{password}@{parts.hostname}:{parts.port}"))


def with_host(url: str, virtual_host: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{virtual_host}"))


@pytest.fixture
def user(rabbitmqctl: Callable[..., str]) -> Iterator[Callable[..., tuple[str, str]]]:
    """Make a user with the given rights on the default virtual host: configure, write, read; None: none at all."""
    made: list[str] = []

    def make(*rights: str) -> tuple[str, str]:
        name = f"u{uuid.uuid4().hex[:8]}"
        rabbitmqctl("add_user", name, "secret")
        made.append(name)
        if rights:
            rabbitmqctl("set_permissions", name, *rights)
        return name, "secret"

    yield make
    for name in made:
        rabbitmqctl("delete_user", name)


def test_a_wrong_password_is_named(group_name: str, broker_url: str) -> None:
    app = make_app(group_name, with_login(broker_url, "guest", "wrong"))
    with pytest.raises(PublishRefused, match=r"not stored: .*refuses the login.*password in broker_url") as caught:
        app.tasks["step"].apply_async(("a",), task_id="t1")
    assert (caught.value.task_id, caught.value.group) == ("t1", group_name)
    assert "wrong" not in str(caught.value)


def test_a_virtual_host_that_does_not_exist_is_named(group_name: str, broker_url: str) -> None:
    app = make_app(group_name, with_host(broker_url, "nowhere"))
    with pytest.raises(PublishRefused, match=r"nowhere.*add_vhost"):
        app.tasks["step"].delay("a")


def test_missing_rights_on_the_virtual_host_are_named(group_name: str, broker_url: str, user) -> None:
    app = make_app(group_name, with_login(broker_url, *user()))
    with pytest.raises(PublishRefused, match=r"refuses the connection.*set_permissions"):
        app.tasks["step"].delay("a")


@pytest.mark.parametrize("write", [".*", r"^shards\."])  # the latter is all that who only publishes has
def test_a_missing_right_to_declare_is_named(group_name: str, broker_url: str, user, write: str) -> None:
    app = make_app(group_name, with_login(broker_url, *user("^$", write, ".*")))
    with pytest.raises(TopologyError, match=r"may not touch.*grant it configure"):
        app.tasks["step"].delay("a")


def test_a_missing_right_to_publish_is_named(group_name: str, broker_url: str, user) -> None:
    make_app(group_name, broker_url).tasks["step"].delay("a")
    app = make_app(group_name, with_login(broker_url, *user(".*", "^$", ".*")))
    with pytest.raises(PublishRefused, match=r"not stored.*grant the broker's user write") as caught:
        app.tasks["step"].delay("a")
    assert rf"^shards\.{group_name}(\.|$)" in str(caught.value)


def test_tls_where_the_broker_speaks_none_is_named(group_name: str, broker_url: str) -> None:
    app = make_app(group_name, broker_url, broker_use_ssl={"cert_reqs": ssl.CERT_NONE})
    with pytest.raises(PublishRefused, match=r"no TLS on this port.*broker_use_ssl"):
        app.tasks["step"].delay("a")


def test_a_port_where_something_else_listens_is_named(group_name: str) -> None:
    # Given a server that hangs up on whoever connects
    with socket.create_server(("127.0.0.1", 0)) as server, FaultProxy("amqp://x") as proxy:
        server.close()
        proxy.refuse()
        app = make_app(group_name, proxy.url)
        with pytest.raises(BrokerUnavailable, match="broker_use_ssl fit its port"):
            app.tasks["step"].delay("a")


UNSENDABLE = {
    "large header": {"headers": {"blob": "x" * 200_000}},
    "type": {"headers": {"odd": object()}},
    "nested type": {"headers": {"odd": [{"deep": {1, 2}}]}},
    "large number": {"headers": {"odd": 2**70}},
    "long name": {"headers": {"n" * 300: 1}},
    "long property": {"app_id": "x" * 300},
    "property type": {"timestamp": "yesterday"},
    "long task id": {"task_id": "t" * 300},
}


@pytest.mark.parametrize("options", UNSENDABLE.values(), ids=UNSENDABLE.keys())
def test_what_amqp_cannot_carry_is_refused_before_it_is_sent(
    group_name: str, broker_url: str, options: dict[str, object]
) -> None:
    # Given a publisher at work
    with FaultProxy(broker_url) as proxy:
        app = make_app(group_name, proxy.url)
        app.tasks["step"].delay("a")
        taken = proxy.taken_connections
        # When a message is published that AMQP cannot carry, then the caller hears that it is not stored, and why
        with pytest.raises(PublishRefused, match=r"not sent, and is not stored: "):
            app.tasks["step"].apply_async(("a",), **options)
        # And the next is published on the same connection
        app.tasks["step"].delay("a")
        assert proxy.taken_connections == taken
    assert count(broker_url, group_name) == 2


def test_a_header_that_just_fits_is_sent(group_name: str, broker_url: str) -> None:
    app = make_app(group_name, broker_url)
    app.tasks["step"].apply_async(("a",), headers={"blob": "x" * 120_000})
    assert count(broker_url, group_name) == 1


def limit_messages(rabbitmqctl: Callable[..., str], size_bytes: int) -> None:
    """Limit the messages of new channels: RabbitMQ 3 and 4 keep the limit in different places."""
    rabbitmqctl(
        "eval",
        f"application:set_env(rabbit, max_message_size, {size_bytes}), "
        f"persistent_term:put(max_message_size, {size_bytes}).",
    )


@pytest.mark.restarts_broker  # a limit is everybody's
def test_a_message_that_is_too_large_for_the_broker_is_refused(
    group_name: str, broker_url: str, rabbitmqctl: Callable[..., str]
) -> None:
    # Given a group, and a broker that takes 1 MB
    app = make_app(group_name, broker_url)
    app.tasks["step"].delay("a")
    limit_messages(rabbitmqctl, 1_000_000)
    try:
        # When more is published on a new connection
        app = make_app(group_name, broker_url)
        with pytest.raises(PublishRefused, match=r"is not stored: .*max_message_size"):
            app.tasks["step"].delay("a", "x" * 1_100_000)
        app.tasks["step"].delay("a")
    finally:
        limit_messages(rabbitmqctl, 128 * 1_024 * 1_024)
    assert count(broker_url, group_name) == 2


def test_a_property_that_the_broker_refuses_is_refused(group_name: str, broker_url: str) -> None:
    app = make_app(group_name, broker_url)
    with pytest.raises(PublishRefused, match=r"is not stored: .*user_id"):
        app.tasks["step"].apply_async(("a",), user_id="somebody-else")
    app.tasks["step"].delay("a")
    assert count(broker_url, group_name) == 1


def test_the_first_publish_to_a_new_group_goes_through_at_a_distance(group_name: str, broker_url: str) -> None:
    # Given a broker 200 ms away
    with FaultProxy(broker_url, latency_seconds=0.1) as proxy:
        app = make_app(group_name, proxy.url)
        # When a task is published, then the usual time-out is enough to make the group
        app.tasks["step"].apply_async(("a",), confirm_timeout=20.0)  # twice as long, for a machine under load
    assert count(broker_url, group_name) == 1


def test_a_broker_that_is_too_far_away_is_an_error_in_time_that_says_what_took_it(
    group_name: str, broker_url: str
) -> None:
    # Given a broker 2 s away
    with FaultProxy(broker_url, latency_seconds=1.0) as proxy:
        app = make_app(group_name, proxy.url, sharding_publish_timeout_seconds=3.0, broker_connection_timeout=60)
        # When a task is published, then the caller hears in time what took the time
        started = time.monotonic()
        with pytest.raises(BrokerUnavailable, match=r"not sent: .*connecting took [0-9.]+ s"):
            app.tasks["step"].delay("a")
        assert time.monotonic() - started < 9.0


CALLS = {
    "delay": lambda step: step.delay("a"),
    "apply_async": lambda step: step.apply_async(("a",)),
    "send_task": lambda step: step.app.send_task("step", ("a",), kwargs={}),
    "group": lambda step: group(step.s("a"), step.s("b")).apply_async(),
    "chain": lambda step: chain(step.si("a"), step.si("b")).apply_async(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_result_backend_that_is_down_is_named_and_nothing_is_published(
    group_name: str, broker_url: str, call: Callable[..., object]
) -> None:
    # Given a result backend that is not there, and a caller who is not patient with it
    options = {"retry_policy": {"timeout": 0.1, "interval_max": 0.05}}
    app = make_app(
        group_name, broker_url, result_backend="redis://127.0.0.1:1/0", result_backend_transport_options=options
    )
    step = app.tasks["step"]
    # When the result of a task is wanted, then its error says that nothing was sent, and what is down
    with pytest.raises(BackendUnavailable, match=r"was not sent: the result backend") as caught:
        call(step)
    assert isinstance(caught.value, PublishError)
    assert caught.value.task_id
    assert caught.value.group == group_name
    # And a task whose result nobody wants is published
    step.apply_async(("a",), ignore_result=True)
    assert count(broker_url, group_name) == 1


def count(broker_url: str, group_name: str) -> int:
    """Take what is stored, up to a marker behind it, and return how many messages that was."""
    found: list[Message] = []
    with Connection(broker_url) as connection:
        channel = connection.channel()
        limbo = Names(group_name).limbo(1)
        channel.basic_publish(Message("end", type="end"), routing_key=limbo)
        channel.basic_consume(limbo, callback=found.append, no_ack=True)
        while not found or found[-1].properties.get("type") != "end":
            connection.drain_events(timeout=20)
    return len(found) - 1
