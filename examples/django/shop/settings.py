"""Settings of the project: Django's in short, then those of Celery and of the shard group."""

from __future__ import annotations

import os
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent.parent

SECRET_KEY = "only an example"
DEBUG = True
USE_TZ = True
INSTALLED_APPS = ["django_celery_results", "warehouse"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": BASE_DIR / "db.sqlite3",
        "OPTIONS": {"timeout": 30},
    }
}

CELERY_BROKER_URL = os.environ.get("BROKER_URL", "amqp://")
CELERY_RESULT_BACKEND = "django-db"
CELERY_SHARDING_GROUPS = {"orders": {"shards": 8, "on_failure": "dead-letter"}}
CELERY_SHARDING_ROUTES = {"warehouse.tasks.apply_event": {"group": "orders", "key": "order_id"}}
