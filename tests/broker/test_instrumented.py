"""Instrumentation that wraps kombu's producers sees what is published to groups, and a worker goes on with its trace.

Each case is a process of its own: instrumentation patches classes for good.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from amqp import Message
from kombu import Connection

from celery_sharding.topology import Names
from support.shops import Shop

pytestmark = pytest.mark.timeout(120)

SENTRY = """
import json, sys, warnings
warnings.filterwarnings("ignore")
import sentry_sdk
from sentry_sdk.integrations.celery import CeleryIntegration

seen = []
class Transport(sentry_sdk.transport.Transport):
    def capture_envelope(self, envelope):
        seen.extend(item.payload.json for item in envelope.items if item.type == "transaction")

sentry_sdk.init(
    dsn="http://key@localhost/1", transport=Transport, traces_sample_rate=1.0, integrations=[CeleryIntegration()]
)
from celery import Celery
from celery_sharding import ShardGroup, Sharding

url, group, backend = sys.argv[1:]
app = Celery("instrumented", broker=url, backend=backend)
app.conf.sharding_routes = {"sentry_shop.*": {"group": group, "key": "key"}}
Sharding(app, groups=[ShardGroup(group, shards=4)])
with sentry_sdk.start_transaction(name="request") as request:
    result = app.send_task("sentry_shop.traced", kwargs={"key": "customer-1", "number": 1}, headers={"own": "kept"})
    sent = result.id
sentry_sdk.flush()
(transaction,) = seen
print(json.dumps({
    "id": sent,
    "trace": request.trace_id,
    "spans": [{"op": span["op"], "name": span["description"], "data": span["data"]} for span in transaction["spans"]],
    "result": result.get(timeout=60) if backend != "disabled://" else None,
}))
"""

WRAPPED = """
import sys
import kombu
calls = []
for name in ("publish", "_publish"):
    def wrap(stock, name):
        def wrapped(self, *args, **kwargs):
            calls.append((name, self.connection.transport.driver_type))
            headers = kwargs.get("headers") if name == "publish" else args[4]
            headers[f"x-{name}"] = "added"
            return stock(self, *args, **kwargs)
        return wrapped
    setattr(kombu.Producer, name, wrap(getattr(kombu.Producer, name), name))

from celery import Celery
from celery_sharding import ShardGroup, Sharding
url, group = sys.argv[1:]
app = Celery("wrapped", broker=url)
app.conf.task_send_sent_event = True
Sharding(app, groups=[ShardGroup(group, shards=2)])

@app.task(shard_group=group, shard_key="key", name="step", compression="gzip")
def step(key, number):
    pass

step.delay("a", 1)
assert calls == [("publish", "amqp"), ("_publish", "amqp")] * 2, calls  # the task, and its event
"""


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, check=False, timeout=100, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_who_wraps_a_producer_sees_each_publish_once_and_the_headers_it_adds_arrive(
    group_name: str, broker_url: str
) -> None:
    # When a process publishes whose producers are wrapped
    run(WRAPPED, broker_url, group_name)
    # Then the message carries what was added, and can be read
    found: list[Message] = []
    with Connection(broker_url) as connection:
        channel = connection.channel()
        channel.basic_consume(Names(group_name).limbo(1), callback=found.append, no_ack=True)
        connection.drain_events(timeout=20)
        (message,) = found
        assert {"x-publish": "added", "x-_publish": "added"}.items() <= message.headers.items()
        assert channel.message_to_python(message).decode()[0] == ["a", 1]


def test_sentry_sees_a_publish_and_the_worker_goes_on_with_its_trace(
    group_name: str, broker_url: str, redis_url: str, tmp_path: Path
) -> None:
    # Given a worker under Sentry
    with Shop(group_name, broker_url, tmp_path, app="sentry_shop", backend=redis_url) as shop:
        shop.worker("-c", "1")
        # When a request under Sentry publishes a task
        told = json.loads(run(SENTRY, broker_url, group_name, redis_url).splitlines()[-1])
    # Then there is a span of the publish, which does not tell the key
    (span,) = [span for span in told["spans"] if span["op"] == "queue.publish"]
    assert span["name"] == "sentry_shop.traced"
    assert span["data"]["messaging.message.id"] == told["id"]
    assert "customer-1" not in json.dumps(span)
    # And the run belongs to the same trace
    assert told["result"] == told["trace"]
