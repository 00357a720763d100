"""Spans of sharded tasks say where the messages went and who took them: a real publish, a real worker."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
from celery import Celery, current_app
from celery.app.trace import build_tracer
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Tracer

from celery_sharding import Sharding
from celery_sharding.errors import ConfigurationError
from celery_sharding.otel import KEY_HASH, instrument
from support.shops import Shop

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def spans(shop: Shop) -> Iterator[tuple[Tracer, InMemorySpanExporter]]:
    """What this process traces, with Celery's instrumentation; it ends spans at once of tasks that are not its own."""
    before = current_app._get_current_object()
    shop.app.set_current()
    register_step(shop.app)
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    CeleryInstrumentor().instrument(tracer_provider=provider)
    yield provider.get_tracer("test"), exporter
    CeleryInstrumentor().uninstrument()
    before.set_current()


def register_step(app: Celery) -> None:
    @app.task(name="shop.step", shared=False)
    def step(key, number):
        pass


def test_a_task_can_be_followed_from_its_publisher_into_its_shard(shop: Shop, spans, tmp_path):
    tracer, exporter = spans
    instrument(shop.app, key_secret="pepper")
    shop.module = "traced"
    shop.worker("-c", "1", SHOP_KEY_SECRET="pepper")
    shop.module = "shop"

    # When a request publishes a task
    with tracer.start_as_current_span("request"):
        result = shop.send("step", "customer-1", 0)
        shop.app.send_task("celery.ping", queue=f"{shop.group}-plain")
    result.get(timeout=30)
    shop.workers[0].stop()

    # Then the span of the publish says where to, and the request's own says nothing of it
    publish, ping, request = sorted(
        exporter.get_finished_spans(), key=lambda span: span.name.replace("apply_async/s", "a")
    )
    common = {
        "messaging.system": "rabbitmq",
        "messaging.destination.name": shop.names.publish,
        "messaging.message.id": result.id,
    }
    expected = {**common, "messaging.operation.name": "publish", "messaging.operation.type": "send"}
    assert dict(publish.attributes) | expected == dict(publish.attributes)
    assert not any(name.startswith("messaging.dest") for name in {**request.attributes})
    assert "messaging.destination.name" not in ping.attributes
    # And that of the run says which shard, and goes on in the same trace
    runs = [json.loads(line) for line in shop.trace.path.with_suffix(".spans").read_text().splitlines()]
    (run,) = [run for run in runs if run["name"] == "run/shop.step"]
    index = run["attributes"]["messaging.destination.partition.id"]
    expected = {**common, "messaging.operation.name": "run", "messaging.operation.type": "process"}
    expected |= {"messaging.consumer.group.name": shop.group, KEY_HASH: publish.attributes[KEY_HASH]}
    assert run["attributes"] | expected == run["attributes"]
    assert index in {"0", "1", "2", "3"}
    assert int(run["context"]["trace_id"], 16) == publish.context.trace_id == request.context.trace_id
    # And nowhere does the key stand in clear
    assert "customer-1" not in str([dict(publish.attributes), run["attributes"]])


def test_a_key_is_left_out_unless_asked_for(shop: Shop, spans):
    instrument(shop.app)
    shop.send("step", "customer-1", 0)

    (publish,) = spans[1].get_finished_spans()
    assert publish.attributes["messaging.destination.name"] == shop.names.publish
    assert KEY_HASH not in publish.attributes
    assert "customer-1" not in str(dict(publish.attributes))


def test_a_run_is_described_also_if_its_span_is_older_than_its_shard(shop: Shop, spans):
    # Given that Celery's instrumentation was there first, so its span begins before and ends before ours is asked
    instrument(shop.app)
    run = build_tracer("shop.step", shop.app.tasks["shop.step"], app=shop.app)
    info = {"exchange": shop.names.publish, "routing_key": "customer-1"}
    run("id-1", ("customer-1", 0), {}, {"id": "id-1", "shard_label": f"{shop.group}/3", "delivery_info": info})

    (span,) = spans[1].get_finished_spans()
    assert span.attributes["messaging.destination.partition.id"] == "3"
    assert "customer-1" not in str(dict(span.attributes))


def test_a_span_of_the_callers_own_is_left_alone(shop: Shop, spans):
    tracer, exporter = spans
    instrument(shop.app)
    CeleryInstrumentor().uninstrument()
    with tracer.start_as_current_span("request"):
        shop.send("step", "customer-1", 0)

    (request,) = exporter.get_finished_spans()
    assert not request.attributes
    CeleryInstrumentor().instrument()


def test_without_the_package_nothing_of_it_is_imported():
    modules = "celery_sharding.extension, celery_sharding.publish.publisher"
    code = f"import {modules}, sys; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_cannot_be_traced_is_refused():
    plain = Celery("plain", set_as_current=False)
    with pytest.raises(ConfigurationError, match=r"call Sharding\(app\) before"):
        instrument(plain)
    Sharding(plain)
    with pytest.raises(ConfigurationError, match="key_secret is empty"):
        instrument(plain, key_secret="")
