"""Settings of a Django project with several databases and caches, which the environment names."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

import pymysql
from django.db.models import Model

pymysql.install_as_MySQLdb()


def server(name: str) -> dict[str, object]:
    parts = urlsplit(os.environ[name])
    return {"HOST": parts.hostname, "PORT": parts.port, "USER": parts.username, "NAME": parts.path.lstrip("/")}


SECRET_KEY = "not one"
USE_TZ = True
INSTALLED_APPS = ["django_celery_results"]
DATABASES = {
    "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["DJANGO_SQLITE"]},
    "memory": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
    "postgresql": {
        "ENGINE": "django.db.backends.postgresql",
        **server("DJANGO_POSTGRESQL"),
        "OPTIONS": {"pool": {"min_size": 0, "max_size": 1}},
    },
    "mariadb": {"ENGINE": "django.db.backends.mysql", **server("DJANGO_MARIADB")},
}
DATABASE_ROUTERS = ["support.django_project.Router"]
_CACHE = "django.core.cache.backends"
CACHES = {
    "default": {"BACKEND": f"{_CACHE}.dummy.DummyCache"},
    "redis": {"BACKEND": f"{_CACHE}.redis.RedisCache", "LOCATION": os.environ["SHARDING_TEST_REDIS_URL"]},
    "django-redis": {
        "BACKEND": "django_redis.cache.RedisCache",
        "LOCATION": os.environ["SHARDING_TEST_REDIS_URL"],
        "KEY_PREFIX": "shop",
    },
    "memcached": {"BACKEND": f"{_CACHE}.memcached.PyMemcacheCache", "LOCATION": os.environ["DJANGO_MEMCACHED"]},
    "database": {"BACKEND": f"{_CACHE}.db.DatabaseCache", "LOCATION": "cache"},
    "memory": {"BACKEND": f"{_CACHE}.locmem.LocMemCache"},
    "files": {"BACKEND": f"{_CACHE}.filebased.FileBasedCache", "LOCATION": "/nowhere"},
}


class Router:
    """Sends all models to the database that the environment names at that moment."""

    def db_for_write(self, model: type[Model], **_: object) -> str:
        return os.environ.get("DJANGO_CLAIMS_DATABASE", "default")
