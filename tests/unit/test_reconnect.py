"""What the library reads of Celery and kombu to reconnect sooner: a version that changes it must be noticed here."""

from __future__ import annotations

from types import MethodType, SimpleNamespace

import pytest
from celery import Celery
from celery.worker.consumer import Consumer
from kombu import Connection

from celery_sharding.testing.processes import find_free_port
from celery_sharding.worker.reconnect import reconnect_sooner


def test_the_first_tries_of_a_worker_come_soon_after_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a worker whose broker does not listen, and which gives up after three tries
    url = f"amqp://127.0.0.1:{find_free_port()}//"
    app = Celery("shop", broker=url, set_as_current=False)
    app.conf.update(broker_connection_max_retries=3, broker_connection_retry_on_startup=True)
    consumer = SimpleNamespace(app=app, first_connection_attempt=True, broker_connection_retry_attempt=0)
    consumer.ensure_connected = MethodType(Consumer.ensure_connected, consumer)
    waits: list[float] = []
    monkeypatch.setattr("kombu.utils.functional.sleep", waits.append)
    # When it connects
    reconnect_sooner(consumer)
    with pytest.raises(Exception, match="Connection refused"):
        consumer.ensure_connected(Connection(url))
    # Then it has waited half a second more each time
    total = [sum(waits[:count]) for count in range(1, len(waits) + 1)]
    assert {0.5, 1.5, 3.0} <= {round(seconds, 3) for seconds in total}
