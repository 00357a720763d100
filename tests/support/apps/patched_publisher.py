"""Publishes through a broker's URL under a library that replaces Python's sockets: LIBRARY URL GROUP COUNT."""

from __future__ import annotations

import importlib
import sys
import warnings

library, url, group, count = sys.argv[1:]
warnings.filterwarnings("ignore")
if library == "gevent":
    importlib.import_module("gevent.monkey").patch_all()
elif library == "eventlet":
    importlib.import_module("eventlet").monkey_patch()

from celery import Celery  # noqa: E402

from celery_sharding import ShardGroup, Sharding  # noqa: E402

app = Celery("patched", broker=url)
Sharding(app, groups=[ShardGroup(group, shards=2)])


@app.task(shard_group=group, shard_key="key", name="step")
def step(key, number):
    pass


for number in range(int(count)):
    step.delay("a", number)
