"""Where Celery is bent in every process of an app."""
