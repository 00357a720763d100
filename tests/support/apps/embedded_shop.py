"""The app that the workers of the embedded tests run. What differs between tests comes from the environment."""

from __future__ import annotations

import json
import os
import signal
import time

from celery import Celery
from celery.exceptions import Reject

from celery_sharding import ShardGroup, Sharding
from celery_sharding.testing import Trace

GROUP = "orders"
app = Celery("embedded_shop", broker=os.environ["SHOP_BROKER"], backend=os.environ["SHOP_BACKEND"])
Sharding(app, groups=[ShardGroup(GROUP, shards=int(os.environ.get("SHOP_SHARDS", "4")), max_attempts=3)])
app.conf.worker_lost_wait = 1.0
app.conf.update(json.loads(os.environ.get("SHOP_SETTINGS", "{}")))
trace = Trace(os.environ["SHOP_TRACE"])
sharded = {"shard_group": GROUP, "shard_key": "key"}


@app.task(**sharded)
def step(key, number, seconds=0.0):
    with trace.run(key, number):
        time.sleep(seconds)


@app.task(bind=True, **sharded, max_retries=3)
def again(self, key, number):
    if self.request.retries < 2:
        raise self.retry(countdown=0.3)
    with trace.run(key, number):
        pass
    return self.request.retries


@app.task(**sharded)
def reject(key, number):
    raise Reject("not wanted", requeue=False)


@app.task(bind=True, **sharded, max_retries=1)
def changed(self, key, number, text="first"):
    if text == "first":
        raise self.retry(kwargs={"text": "second"}, countdown=0)
    return text


@app.task(**sharded)
def poison(key, number):
    trace.mark("begin", key, number)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(**sharded)
def parent(key, number):
    step.delay(key, number)


@app.task
def plain(number):
    return number + 1
