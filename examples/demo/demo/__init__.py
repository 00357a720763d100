"""Real events through shards and through stock Celery, with a worker killed in the middle."""
