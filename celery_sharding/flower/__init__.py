"""A page *Shards* in Flower, its API, and the groups' metrics on Flower's `/metrics`. Needs the extra `flower`.

    celery -A shop shards flower          Flower with it
    flowerconfig.py                       or these two lines, for `celery -A shop flower`

        from celery_sharding.flower import install
        install()

`format_task` and `mask_task` are for Flower's option `format_task`, with which its list of tasks shows the shard.
"""

from celery_sharding.flower.formatting import format_task, mask_task
from celery_sharding.flower.mount import install

__all__ = ["format_task", "install", "mask_task"]
