"""The Celery app: one line more than in any Django project."""

from __future__ import annotations

import os

from celery import Celery

from celery_sharding import Sharding

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")

app = Celery("shop")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
Sharding(app)
