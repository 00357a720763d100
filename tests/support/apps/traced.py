"""A shop whose worker traces its runs as the documentation of OpenTelemetry says: its instrumentation in each child."""

from __future__ import annotations

import os
from pathlib import Path

from celery.signals import worker_process_init
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

from celery_sharding.otel import instrument
from shop import app, step

__all__ = ["app", "step"]
app.conf.task_default_queue = f"{os.environ['SHOP_GROUP']}-plain"
instrument(app, key_secret=os.environ.get("SHOP_KEY_SECRET"))


@worker_process_init.connect(weak=False)
def trace_runs(**_: object) -> None:
    spans = Path(os.environ["SHOP_TRACE"]).with_suffix(".spans").open("a")
    provider = TracerProvider()
    line = ConsoleSpanExporter(out=spans, formatter=lambda span: span.to_json(indent=None) + "\n")
    provider.add_span_processor(SimpleSpanProcessor(line))
    CeleryInstrumentor().instrument(tracer_provider=provider)
