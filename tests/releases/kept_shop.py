"""The app of workers and commands of any release: nothing that 0.1.0 does not have."""

from __future__ import annotations

import os

from celery import Celery

from celery_sharding import ShardGroup, Sharding, __version__
from celery_sharding.testing import Trace

GROUP = os.environ["KEPT_GROUP"]
app = Celery("kept", broker=os.environ["KEPT_BROKER"])
app.conf.update(task_ignore_result=True, broker_connection_retry_on_startup=True, task_default_queue=f"{GROUP}-plain")
Sharding(app, groups=[ShardGroup(GROUP, shards=4)])
trace = Trace(os.environ["KEPT_TRACE"])


@app.task(shard_group=GROUP, shard_key="key")
def step(key, number):
    trace.mark(f"by {__version__}", key, number)
    with trace.run(key, number):
        pass
