"""How Django knows the app."""

from __future__ import annotations

from django.apps import AppConfig


class CelerySharding(AppConfig):
    """Label `celery_sharding`, for `migrate celery_sharding`."""

    name = "celery_sharding.django"
    label = "celery_sharding"
    verbose_name = "celery-sharding"
