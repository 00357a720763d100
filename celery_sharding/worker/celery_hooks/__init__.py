"""Where Celery, kombu and billiard are bent in a worker."""
