"""The app that the workers of the broker tests run. What differs between tests comes from the environment."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from pathlib import Path

from celery import Celery, chain, chord, group
from celery.exceptions import Reject
from celery.worker.control import control_command
from celery.worker.request import Request

from celery_sharding import ShardGroup, Sharding
from celery_sharding.layout import protocol
from celery_sharding.testing import Trace

GROUP = os.environ["SHOP_GROUP"]
if "SHOP_PROTOCOL" in os.environ:  # it is a later version
    protocol.PROTOCOL = int(os.environ["SHOP_PROTOCOL"])
app = Celery("shop", broker=os.environ["SHOP_BROKER"], backend=os.environ["SHOP_BACKEND"])
app.conf.update(
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    task_default_queue=f"{GROUP}-plain",
    sharding_consumer_timeout_seconds=float(os.environ.get("SHOP_CONSUMER_TIMEOUT", "1800")),
    sharding_heartbeat_seconds=float(os.environ.get("SHOP_HEARTBEAT", "15")),
)
app.conf.update(json.loads(os.environ.get("SHOP_SETTINGS", "{}")))
Sharding(
    app,
    groups=[
        ShardGroup(
            GROUP,
            shards=int(os.environ.get("SHOP_SHARDS", "4")),
            ordering=os.environ.get("SHOP_ORDERING", "key"),
            on_failure=os.environ.get("SHOP_ON_FAILURE", "continue"),
            max_attempts=int(os.environ.get("SHOP_MAX_ATTEMPTS", "3")),
            prefetch=int(os.environ["SHOP_PREFETCH"]) if "SHOP_PREFETCH" in os.environ else None,
        )
    ],
)
trace = Trace(os.environ["SHOP_TRACE"])
sharded = {"shard_group": GROUP, "shard_key": "key"}


@app.task(**sharded)
def step(key, number, seconds=0.005):
    with trace.run(key, number):
        time.sleep(seconds)
    return number


class SlowToBegin(Request):
    """Its first run is in the pool for a while before it begins."""

    def on_accepted(self, pid, time_accepted):
        if not self.message.delivery_info["redelivered"]:
            _, kwargs, _ = self.message.payload
            trace.mark("submitted", kwargs["key"], kwargs["number"])
            time.sleep(2)
        super().on_accepted(pid, time_accepted)


@app.task(**sharded, Request=SlowToBegin)
def slow_to_begin(key, number):
    with trace.run(key, number):
        pass


@app.task(**sharded, rate_limit="5/s")
def limited(key, number):
    with trace.run(key, number):
        pass


@app.task(bind=True, **sharded, max_retries=3)
def again(self, key, number, times=2, countdown=0.3):
    trace.mark("begin", key, number, str(self.request.retries))
    if self.request.retries < times:
        raise self.retry(countdown=countdown)
    with trace.run(key, number):
        pass
    return self.request.retries


@app.task(bind=True, **sharded, max_retries=3)
def changed(self, key, number, text="first", countdown=0):
    if text == "first":
        raise self.retry(kwargs={"text": "second"}, countdown=countdown)
    return text


@app.task(**sharded, autoretry_for=(ZeroDivisionError,), max_retries=2, retry_backoff=True, retry_jitter=False)
def divide(key, number):
    trace.mark("begin", key, number)
    return number / 0


@app.task(**sharded)
def fail(key, number):
    trace.mark("begin", key, number)
    raise ValueError(f"no luck with {number}")


@app.task(bind=True, **sharded, max_retries=1)
def moved(self, key, number):
    raise self.retry(queue="elsewhere")


@app.task(**sharded)
def shout(key, number, characters, text="x"):
    raise ValueError((text * characters)[:characters])


@app.task(bind=True, **sharded, max_retries=1)
def grow(self, key, number, characters):
    raise self.retry(kwargs={"characters": "x" * characters if characters else object()}, countdown=0)


@app.task(**sharded)
def reject(key, number, filling=""):
    raise Reject("not wanted", requeue=False)


@app.task(**sharded)
def refuse(key, number):
    raise Reject("not now", requeue=True)


@app.task(**sharded)
def poison(key, number):
    trace.mark("begin", key, number)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(**sharded)
def fragile(key, number, how):
    """Go wrong as long as there is a file that says so."""
    trace.mark("begin", key, number)
    if Path(f"{trace.path}.broken").exists():
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise Reject("not wanted", requeue=False) if how == "reject" else ValueError("broken")
    trace.mark("end", key, number)
    return number


@app.task(**sharded)
def poison_parent(key, number):
    trace.mark("begin", key, number)
    os.killpg(os.getpgid(0), signal.SIGKILL)


@app.task(**sharded)
def hungry(key, number, limit_bytes=512 << 20):
    trace.mark("begin", key, number)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, before[1]))
    try:
        bytearray(2 * limit_bytes)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@app.task(**sharded)
def gorge(key, number):
    trace.mark("begin", key, number, str(os.getpid()))
    eaten = []
    while len(eaten) < 4_000:
        eaten.append(b"\1" * (1 << 20))
        time.sleep(0.002)


@app.task(**sharded, time_limit=1)
def endless(key, number):
    trace.mark("begin", key, number, str(os.getpid()))
    time.sleep(60)


@app.task(bind=True, **sharded, max_retries=1)
def tightened(self, key, number):
    if not self.request.retries:
        raise self.retry(countdown=0, time_limit=1)
    time.sleep(60)


@app.task(**sharded, soft_time_limit=1)
def soft(key, number):
    time.sleep(60)


@app.task(**sharded)
def parent(key, number):
    step.delay(key, number)


@app.task(bind=True, **sharded)
def place(self, key, number):
    """Run under the key that the message was routed by."""
    with trace.run(self.request.delivery_info["routing_key"], number):
        pass


@app.task(bind=True, name="plain.carry")
def carry(self, key, number):
    if not self.request.retries:
        raise self.retry(countdown=0)
    place.apply_async((key, number), headers=self.request.headers)


@app.task(bind=True, **sharded)
def hand_on(self, key, number, child, how):
    """Call `place` for the key `child` with all headers of this run."""
    headers = self.request.headers
    signature = place.si(child, number).set(headers=headers)
    match how:
        case "apply_async":
            place.apply_async((child, number), headers=headers)
        case "send_task":
            app.send_task("shop.place", (child, number), headers=headers)
        case "signature":
            signature.apply_async(headers=headers)
        case "options":
            place.apply_async((child, number), **{**self.request.as_execution_options(), "task_id": None})
        case "link":
            plain.apply_async((1,), headers=headers, link=signature)
        case "chain":
            chain(plain.si(1).set(headers=headers), signature).apply_async(headers=headers)
        case "group":
            group([signature]).apply_async(headers=headers)
        case "chord":
            chord([plain.si(1).set(headers=headers)])(signature)
        case "ordinary":
            carry.apply_async((child, number), headers=headers)
        case "replace":
            raise self.replace(signature)


@app.task(**sharded)
def stand(key, number):
    """Stand still as long as there is no file that says to go."""
    with trace.run(key, number):
        while not Path(f"{trace.path}.go").exists():
            time.sleep(0.01)


@app.task(bind=True, **sharded)
def altered(self, key, number, text, alters=False):
    """Ask for a retry with another text, or stand still."""
    if alters and not self.request.retries:
        trace.mark("altered", key, number)
        raise self.retry(kwargs={"text": "altered"}, countdown=2)
    with trace.run(key, number):
        trace.mark("text", key, number, text)
        while not alters and not Path(f"{trace.path}.go").exists():
            time.sleep(0.01)


@app.task(**sharded)
def spin(key, number):
    while True:
        pass


@control_command()
def stand_still(state):
    """Keep the thread that reads the connection, or the hub of greenlets, from ever going on."""
    while True:
        pass


@app.task
def plain(number):
    return number + 1


@app.task(name="plain.occupy")
def occupy(until):
    trace.mark("occupied", "plain", 0)
    while not Path(until).exists():
        time.sleep(0.01)
