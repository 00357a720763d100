"""A database of Django with a table of payments and the claims table, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import django
from django.apps import apps
from django.conf import settings
from django.db import connections
from django.test.utils import modify_settings

APP = "celery_sharding.django"


@contextmanager
def shop_database(folder: Path) -> Iterator[Any]:
    """Yield the connection of a database "shop" in `folder`; the settings may be those of another test."""
    if not settings.configured:
        settings.configure()
    if not apps.ready:
        django.setup()
    options = {"ENGINE": "django.db.backends.sqlite3", "NAME": folder / "shop.sqlite", "OPTIONS": {"timeout": 60}}
    connections.settings["shop"] = connections.configure_settings({"default": {}, "shop": options})["shop"]
    with modify_settings(INSTALLED_APPS={"append": APP}):
        from celery_sharding.django.models import Claim

        connection = connections["shop"]
        with connection.schema_editor() as editor:
            editor.create_model(Claim)
        with connection.cursor() as cursor:
            cursor.execute("CREATE TABLE payments (order_id INTEGER)")
        try:
            yield connection
        finally:
            connection.close()
            del connections["shop"]
            del connections.settings["shop"]
