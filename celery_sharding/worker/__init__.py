"""What runs inside a Celery worker: shards, lanes, requests, and the bootstep that ties them to the consumer."""
