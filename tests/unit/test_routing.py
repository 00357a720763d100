"""What the router answers for sharded tasks, what the sender refuses, and that other tasks are left alone."""

from __future__ import annotations

import datetime
import uuid
from typing import Any

import pytest
from celery import Celery, Task
from celery.signals import before_task_publish
from kombu import Connection, Exchange, Producer, Queue
from kombu.transport.memory import Transport

from celery_sharding import ShardGroup, Sharding
from celery_sharding.errors import ConfigurationError, ShardKeyError, UnknownGroup, UnsupportedOption
from celery_sharding.wire import MARKS

# The same in every process that collects the tests, since it stands in their names.
FUTURE = datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC)


class RecordingProducer:
    """Takes what Celery publishes, in place of a producer with a connection."""

    def __init__(self, app: Celery) -> None:
        self.connection = app.connection_for_write()
        self.published: list[tuple[Any, dict[str, Any]]] = []

    def publish(self, body: Any, **options: Any) -> None:
        self.published.append((body, options))


def make_app(*, sharded: bool = True, **conf: Any) -> Celery:
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.update(conf)
    if sharded:
        Sharding(app, groups=[ShardGroup("orders", shards=1), ShardGroup("mail", shards=1)])
    return app


def make_task(app: Celery, function: Any = None, *, name: str = "shop.pay", **options: Any) -> Task:
    def pay(order_id: int, amount: int = 0) -> None:
        pass

    made = app.task(shared=False, name=name, **options)(function or pay)
    app.finalize()
    return app.tasks[made.name]


def sharded_task(app: Celery, **options: Any) -> Task:
    return make_task(app, **{"shard_group": "orders", "shard_key": "order_id", **options})


def route(app: Celery, task: Task | str, args: Any = (), kwargs: Any = None, **options: Any) -> dict[str, Any]:
    name, task_type = (task, None) if isinstance(task, str) else (task.name, task)
    return app.amqp.router.route(options, name, args, kwargs or {}, task_type)


def waiting(app: Celery, group: str = "orders") -> list[Any]:
    """Take the messages that wait in the one shard of a group on the embedded broker."""
    found = []
    with app.connection_for_read() as connection:
        channel = connection.default_channel
        while (message := channel.basic_get(f"shards.{group}.g001.000", no_ack=True)) is not None:
            found.append(message)
    return found


@pytest.fixture(autouse=True)
def _empty_broker() -> None:
    for group in ("orders", "mail"):
        app = make_app()
        app.sharding.backing().ensure(app.sharding.settings.groups[group], owner="test")
        waiting(app, group)


# --- where a sharded task goes ---------------------------------------------------------------------------------------


def test_a_sharded_task_goes_to_the_exchange_of_its_group_with_its_key() -> None:
    app = make_app()

    routed = route(app, sharded_task(app), (42,), serializer="json")

    assert routed == {
        "exchange": "shards.orders",
        "exchange_type": "fanout",
        "routing_key": "42",
        "headers": {"shard_group": "orders", "shard_key": "42"},
        "serializer": "json",
    }


@pytest.mark.parametrize("queue", ["default", Queue("default")])
def test_a_catch_all_of_the_application_does_not_lead_a_sharded_task_away(queue: Any) -> None:
    # Given a router of the application for everything, set before and after
    for late in (False, True):
        routes = {"*": {"queue": queue, "priority": 3, "serializer": "pickle"}}
        app = make_app(**({} if late else {"task_routes": routes}))
        if late:
            app.conf.task_routes = routes
        # When tasks are routed, then it has the ordinary ones only
        assert route(app, sharded_task(app), (42,))["exchange"] == "shards.orders"
        assert route(app, make_task(app, name="plain"))["queue"].name == "default"


def test_the_rules_for_the_key_go_by_their_order() -> None:
    # Given all four: the call, a message being re-sent, the task, the configuration
    routes = {"shop.pay": {"group": "orders", "key": "amount"}, "shop.mail": {"group": "orders", "key": "amount"}}
    app = make_app(sharding_routes=routes)
    task = sharded_task(app)
    again = {"headers": {"shard_group": "orders", "shard_key": "from-header"}, "exchange": "shards.orders"}
    # Then the first that is there decides
    assert route(app, task, (1, 2), shard_key="call", **again)["routing_key"] == "call"
    assert route(app, task, (1, 2), **again)["routing_key"] == "from-header"
    assert route(app, task, (1, 2), **again, routing_key="x")["routing_key"] == "from-header"
    assert route(app, task, (1, 2))["routing_key"] == "1"
    assert route(app, make_task(app, name="shop.mail"), (1, 2))["routing_key"] == "2"


@pytest.mark.parametrize("group", ["orders", "mail", "unknown"])
@pytest.mark.parametrize("is_sharded", [True, False])
def test_headers_that_a_call_is_handed_say_nothing_and_do_not_leave_with_it(group: str, is_sharded: bool) -> None:
    # Given all headers of a sharded run, among those of its publisher
    app = make_app()
    handed = dict.fromkeys(MARKS, "other") | {"shard_group": group, "trace": "1"}
    task = sharded_task(app) if is_sharded else make_task(app, name="plain")
    # When a task is called with them, then only those of the publisher leave with it
    routed = route(app, task, (1,), headers=dict(handed))
    own = {"shard_group": "orders", "shard_key": "1"} if is_sharded else {}
    assert routed["headers"] == {"trace": "1", **own}


def test_a_message_of_another_group_is_not_sent_again_by_its_header() -> None:
    app = make_app()
    sent = {"shard_group": "mail", "shard_key": "other"}
    routed = route(app, sharded_task(app), (1,), headers=sent, exchange="shards.orders")
    assert routed["headers"] == {"shard_group": "orders", "shard_key": "1"}


def test_headers_that_are_handed_on_lead_no_call_past_the_router() -> None:
    # Given a router of the caller's own
    app = make_app()
    elsewhere = Celery(set_as_current=False).amqp.router
    handed = {"shard_group": "orders", "shard_key": "other"}
    # When a sharded task is called with it, then it is refused
    with pytest.raises(UnsupportedOption, match="past the app's router"):
        sharded_task(app).apply_async((1,), headers=handed, router=elsewhere)
    # and an ordinary one leaves without them
    producer = RecordingProducer(app)
    make_task(app, name="plain").apply_async((1,), headers=handed, router=elsewhere, producer=producer, countdown=5)
    ((_, publish),) = producer.published
    assert MARKS.isdisjoint(publish["headers"])
    assert waiting(app) == []


def test_each_publish_has_an_id_of_its_own_whatever_it_was_handed() -> None:
    # Given a task that is called twice under one task id, with the id of another message
    app = make_app()
    task = sharded_task(app)
    handed = {"shard_message_id": "old", "shard_group": "orders", "shard_key": "1", "shard_sent_at": 1.0}
    task.apply_async((1,), task_id="same", headers=handed)
    task.apply_async((1,), task_id="same", headers=handed, exchange="shards.orders")
    # Then each message has its own
    ids = [message.headers["shard_message_id"] for message in waiting(app)]
    assert len({"old", *ids}) == 3
    assert all(len(each) == 32 for each in ids)


def test_the_group_of_the_task_wins_over_that_of_the_configuration() -> None:
    app = make_app(sharding_routes={"shop.*": {"group": "mail", "key": "order_id"}})
    assert route(app, sharded_task(app), (1,))["exchange"] == "shards.orders"
    assert route(app, make_task(app, name="shop.other"), (1,))["exchange"] == "shards.mail"


@pytest.mark.parametrize("key", ["order_id", lambda a: a["order_id"]])
def test_tasks_named_in_the_configuration_need_no_change_and_no_presence(key: Any) -> None:
    app = make_app(sharding_routes={"elsewhere.*": {"group": "orders", "key": key}})
    # When they are sent by name, then keyword arguments, or a key at the call, do
    assert route(app, "elsewhere.pay", (), {"order_id": 7})["routing_key"] == "7"
    assert route(app, "elsewhere.pay", (7,), shard_key="k")["routing_key"] == "k"
    with pytest.raises(ShardKeyError, match="keyword"):
        route(app, "elsewhere.pay", (7,))


def test_a_route_without_a_key_needs_one_at_the_call() -> None:
    app = make_app(sharding_routes={"shop.pay": {"group": "orders"}})
    assert route(app, "shop.pay", shard_key=5)["routing_key"] == "5"
    with pytest.raises(ShardKeyError, match="give shard_key=… at the call"):
        route(app, "shop.pay", (), {"order_id": 1})


def of_order(arguments):
    return f"order-{arguments['order_id']}"


class ByClass(Task):
    """A task as a class, with a plain function as its rule."""

    name = "by.class"
    shard_group = "orders"
    shard_key = of_order

    def run(self, order_id, amount=0):
        pass


class ByStaticMethod(ByClass):
    name = "by.static"

    @staticmethod
    def shard_key(arguments):
        return arguments["order_id"]


def test_callables_get_the_arguments_and_never_the_task() -> None:
    app = make_app()
    assert route(app, sharded_task(app, shard_key=of_order), (3,))["routing_key"] == "order-3"
    assert route(app, app.register_task(ByClass()), (3,))["routing_key"] == "order-3"
    assert route(app, app.register_task(ByStaticMethod()), (3,))["routing_key"] == "3"

    def bound(self, order_id):
        pass

    for rule in ("order_id", of_order):
        task = make_task(app, bound, name=f"bound {rule}", bind=True, shard_group="orders", shard_key=rule)
        assert route(app, task, (3,))["routing_key"].endswith("3")


def test_a_base_class_may_shard_all_its_tasks() -> None:
    app = make_app()
    base = type("Base", (Task,), {"shard_group": "mail", "shard_key": "order_id", "abstract": True})
    assert route(app, make_task(app, base=base), (3,))["exchange"] == "shards.mail"


def test_a_task_that_retries_by_itself_is_still_read_by_its_own_arguments() -> None:
    app = make_app()
    assert route(app, sharded_task(app, autoretry_for=(ValueError,)), (3,))["routing_key"] == "3"


def test_headers_of_the_caller_are_kept_and_never_written_to() -> None:
    # Given a signature, whose headers all its calls share
    app = make_app()
    headers = {"trace": {"id": 1}}
    signature = sharded_task(app).s(42).set(headers=headers)
    # When it is published twice
    signature.apply_async()
    signature.apply_async(shard_key="other")
    # Then each message has them with its own key, and they are as they were
    found = waiting(app)
    assert [message.headers["shard_key"] for message in found] == ["42", "other"]
    assert all(message.headers["trace"] == {"id": 1} for message in found)
    assert headers == {"trace": {"id": 1}}
    assert signature.options == {"headers": {"trace": {"id": 1}}}


def test_who_wraps_kombus_producer_may_ask_where_the_channel_leads_to(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given instrumentation that asks for it before the message leaves, as Datadog's does
    app = make_app()
    task = sharded_task(app)
    stock, hosts = Producer._publish, []

    def traced(self: Producer, *args: Any, **options: Any) -> Any:
        if "shards.orders" in args:
            hosts.append(self.channel.connection.host)
        return stock(self, *args, **options)

    monkeypatch.setattr(Producer, "_publish", traced)
    # When a sharded task is published, then it is told, and the message leaves
    task.delay(1)
    [host] = hosts
    assert host.startswith("localhost:")
    assert len(waiting(app)) == 1


def test_the_event_of_a_task_that_was_sent_may_fail_as_its_transport_does(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a transport with errors of its own, as those of databases have
    class Lost(Exception): ...

    class Failing(RecordingProducer):
        def publish(self, body: Any, **options: Any) -> None:
            raise Lost

    monkeypatch.setattr(Transport, "connection_errors", (Lost,))
    app = make_app(task_send_sent_event=True)
    # When a task is stored, and the event is not, then the caller does not take the task for lost
    sharded_task(app).apply_async((1,), producer=Failing(app))
    assert len(waiting(app)) == 1


@pytest.mark.parametrize("option", ["award_group", "card_group", "smart_group", "share_key", "shared_key", "hard_key"])
def test_options_and_attributes_that_are_words_of_their_own_are_nothing_to_us(option: str) -> None:
    app = make_app()
    base = type("Base", (Task,), {option: "gold", "abstract": True})
    for task in (make_task(app, name="decorated", **{option: "gold"}), make_task(app, name="based", base=base)):
        task.apply_async((1,), queue=f"plain-{uuid.uuid4().hex}")


def test_an_ordinary_task_may_have_a_header_named_as_our_key() -> None:
    app = make_app()
    task, sent = make_task(app, name="plain"), []
    before_task_publish.connect(lambda headers, **_: sent.append(headers), weak=False, dispatch_uid="own header")
    try:
        task.apply_async((1,), headers={"shard_key": "eu"}, queue=f"plain-{uuid.uuid4().hex}")
    finally:
        before_task_publish.disconnect(dispatch_uid="own header")
    assert sent[0]["shard_key"] == "eu"


def test_an_applications_own_router_and_task_class_may_speak_of_shards() -> None:
    # Given an application that spreads ordinary tasks over databases by itself
    def by_database(name: str, args: Any, kwargs: Any, options: dict[str, Any], task: Any = None) -> Any:
        return {"queue": f"db-{options['shard']}"}

    app = make_app(task_routes=(by_database,))
    base = type("Base", (Task,), {"shard_count": 1, "abstract": True})
    task = make_task(app, name="based", base=base, shard_count=4)
    # Then it goes on; what is nearly ours, or an option of a sharded task, is still refused
    assert route(app, task, (1,), shard="eu")["queue"].name == "db-eu"
    for each, option in ((task, "shardkey"), (sharded_task(app), "shard")):
        with pytest.raises(UnsupportedOption, match=rf"called with {option}=… *"):
            route(app, each, (1,), **{option: "eu"})
    with pytest.raises(ConfigurationError, match="'shard_count', which is unknown"):
        route(app, make_task(app, name="lost", shard_count=4), (1,), shard="eu")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "", True, 1.5, ["a"], "x" * 256])
def test_a_call_with_a_bad_key_raises_and_nothing_is_published(key: Any) -> None:
    app = make_app()
    task = sharded_task(app)
    for call in (
        lambda: task.delay(key),
        lambda: task.delay(order_id=key),
        lambda: task.apply_async((1,), shard_key=key),
        lambda: task.s(key).apply_async(),
        lambda: app.send_task("shop.pay", (key,)),
        lambda: app.send_task("shop.pay", (1,), shard_key=key),
    ):
        with pytest.raises(ShardKeyError, match=r"shop\.pay"):
            call()
    assert waiting(app) == []


def test_a_key_for_a_task_that_is_not_sharded_is_an_error() -> None:
    app = make_app()
    with pytest.raises(ShardKeyError, match="is not sharded; set shard_group"):
        make_task(app).apply_async((1,), shard_key="a")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shard_group": "orderz"}, UnknownGroup, "did you mean 'orders'"),
        ({"shard_group": ["orders"]}, UnknownGroup, "not configured"),
        ({"shard_group": None}, ConfigurationError, "shard_key but no shard_group"),
        ({"shard_key": "oder_id"}, ShardKeyError, "did you mean 'order_id'"),
        ({"shard_key": 5}, ConfigurationError, "name of an argument or a callable"),
        ({"shard_key": None}, ShardKeyError, "has no shard key"),
        ({"acks_late": False}, ConfigurationError, "remove acks_late=False"),
        ({"priority": 5}, UnsupportedOption, "remove priority"),
        ({"queue": "fast"}, UnsupportedOption, "remove queue"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
def test_a_task_with_options_that_do_not_fit_raises_at_its_first_call(options, error, message) -> None:
    app = make_app()
    task = sharded_task(app, **options)
    for _ in range(2):
        with pytest.raises(error, match=rf"shop\.pay.*{message}"):
            task.delay(1)
    assert waiting(app) == []


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("queue", "fast"),
        ("queue", Queue("fast")),
        ("exchange", "other"),
        ("exchange", Exchange("other")),
        ("routing_key", "x"),
        ("priority", 0),
        ("priority", 9),
        ("countdown", 5),
        ("countdown", -5),
        ("countdown", 0.5),
        ("eta", FUTURE),
        ("eta", FUTURE.isoformat()),
        ("eta", FUTURE - datetime.timedelta(days=1)),
        ("router", Celery(set_as_current=False).amqp.router),
        ("connection", Connection("memory://elsewhere")),
    ],
)
@pytest.mark.parametrize("quorum", [False, True])
def test_an_option_that_breaks_the_order_raises_and_nothing_is_published(option: str, value: Any, quorum: bool) -> None:
    # Given an app with and without quorum queues of its own, which make Celery delay messages by another exchange
    app = make_app(task_default_queue_type="quorum" if quorum else "classic")
    task = sharded_task(app)
    # When the task is called by itself and by its name
    for call in (task.apply_async, lambda args, **options: app.send_task("shop.pay", args, **options)):
        with pytest.raises(UnsupportedOption, match=r"shop\.pay.*sharded|shop\.pay.*group") as caught:
            call((1,), **{option: value})
        assert caught.value.task == "shop.pay"
    # Then it says which option, and nothing has left
    assert caught.value.option in (option, "eta", "router")
    assert waiting(app) == []


def test_a_native_delay_of_a_sharded_task_is_refused_although_celery_has_changed_its_exchange() -> None:
    # Given a queue of the app that makes Celery use delayed delivery on RabbitMQ
    app = make_app(task_queues=[Queue("q", Exchange("t", type="topic"), queue_arguments={"x-queue-type": "quorum"})])
    task = sharded_task(app)
    app.amqp.queues.select(["q"])
    message = app.amqp.create_task_message("id", "shop.pay", (1,), {}, countdown=60)
    headers = {"shard_group": "orders", "shard_key": "1"}
    # When the message comes as Celery has rewritten it
    with pytest.raises(UnsupportedOption, match="eta or countdown"):
        app.amqp.send_task_message(
            RecordingProducer(app), task.name, message,
            exchange=Exchange("celery_delayed_27", type="topic"), routing_key="0.0.1", headers=headers,
        )  # fmt: skip
    assert waiting(app) == []


@pytest.mark.parametrize("protocol", [1, 2])
def test_both_message_protocols_are_checked(protocol: int) -> None:
    app = make_app(task_protocol=protocol)
    task = sharded_task(app)
    task.delay(1)
    with pytest.raises(UnsupportedOption):
        task.apply_async((1,), countdown=5)
    (message,) = waiting(app)
    assert message.headers["shard_key"] == "1"


def test_a_countdown_of_nothing_is_none() -> None:
    app = make_app()
    sharded_task(app).apply_async((1,), countdown=0)
    assert len(waiting(app)) == 1


# --- what is dropped or moved ----------------------------------------------------------------------------------------


def test_a_priority_from_the_defaults_is_dropped() -> None:
    app = make_app(task_default_priority=5)
    task = sharded_task(app)
    task.delay(1)
    app.send_task("shop.pay", (1,))
    task.s(1).apply_async()
    found = waiting(app)
    assert len(found) == 3
    assert all(message.properties.get("priority") in (None, 0) for message in found)


@pytest.mark.parametrize("expires", [60, FUTURE, FUTURE.isoformat(), -60])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_expiry_stays_with_the_message_and_away_from_the_broker(expires: Any) -> None:
    # For the broker would drop the message where the worker stores REVOKED
    app = make_app()
    sharded_task(app).apply_async((1,), expires=expires)
    sharded_task(app, name="always", expires=expires).delay(1)
    for message in waiting(app):
        assert message.headers["expires"]
        assert message.properties.get("expiration") is None


# --- other tasks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"queue": "fast"},
        {"queue": Queue("own", Exchange("own"), routing_key="own")},
        {"exchange": "other", "routing_key": "x"},
        {"priority": 5},
        {"countdown": 5},
        {"eta": FUTURE},
        {"expires": 60},
        {"headers": {"trace": "1"}},
        {"retry": False, "serializer": "json", "compression": "gzip"},
        {"mandatory": True, "confirm_timeout": 3, "delivery_mode": 1},
    ],
)
@pytest.mark.parametrize(
    "conf",
    [
        {},
        {"task_default_priority": 5, "task_send_sent_event": True},
        {"task_routes": {"shop.*": {"queue": "routed", "priority": 1}}},
        {"task_protocol": 1},
    ],
)
def test_other_tasks_leave_exactly_as_without_the_library(options: dict, conf: dict) -> None:
    # Given the same ordinary task in an app with groups and in one without
    sent = []
    for sharded in (True, False):
        app = make_app(sharded=sharded, **conf)
        task = make_task(app)
        producer = RecordingProducer(app)
        # When it is called in every way
        ids = {"task_id": "id", "root_id": "id"}
        task.apply_async((1,), {"amount": 2}, producer=producer, **ids, **options)
        app.send_task("shop.pay", (1,), producer=producer, **ids, **options)
        app.send_task("unknown.task", (1,), producer=producer, **ids, **options)
        task.s(1).set(link=task.s()).apply_async(producer=producer, **ids)
        sent.append([plain_form(body, publish) for body, publish in producer.published])
    # Then what is published is the same, byte for byte
    with_library, without = sent
    assert len(without) >= 4
    assert with_library == without


def test_an_ordinary_task_does_not_inherit_the_headers_of_a_sharded_one() -> None:
    # Given a call that hands on all headers of the sharded task that makes it
    app = make_app()
    task, producer = make_task(app), RecordingProducer(app)
    headers = {"trace": "1", "shard_group": "orders", "shard_key": "k", "shard_sent_at": 1.0}
    # When an ordinary task is called with them, then it leaves as ordinary tasks do
    task.apply_async((1,), headers=headers, producer=producer, priority=3, expires=60)
    ((_, publish),) = producer.published
    assert publish["headers"]["trace"] == "1"
    assert not any(name.startswith("shard_") for name in publish["headers"])
    assert (publish["priority"], publish["expiration"]) == (3, 60)
    assert len(headers) == 4


def plain_form(body: Any, publish: dict[str, Any]) -> str:
    """Return everything that leaves as text, without what differs from call to call."""
    volatile = ("eta", "expires", "chain", "id")
    headers = {name: value for name, value in publish.get("headers", {}).items() if name not in volatile}
    publish = {**publish, "headers": headers, "reply_to": bool(publish.get("reply_to"))}
    if isinstance(body, dict):
        body = {name: value for name, value in body.items() if name not in ("eta", "expires", "timestamp", "uuid")}
    else:
        body = (body[0], body[1], {name: bool(value) for name, value in body[2].items()})
    for name in ("correlation_id", "declare"):
        publish[name] = bool(publish.get(name))
    return repr((body, sorted(publish.items(), key=lambda item: item[0])))


def test_a_queue_with_the_name_of_a_group_is_refused_when_an_ordinary_task_is_sent_there() -> None:
    # For nobody would consume it
    app = make_app()
    for name in ("orders", "orders.000", "orders/0"):
        with pytest.raises(ConfigurationError, match=r"is the shard group 'orders', not a queue.*shard_group"):
            make_task(app, name=str(uuid.uuid4())).apply_async((1,), queue=name)
