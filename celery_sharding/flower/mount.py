"""How the page gets into Flower: the only module that uses Flower's internals.

Flower has no hook for pages. These are used, as read in Flower 2.0.1 and 2.2.0:

    flower.urls.handlers    the list of addresses, read when Flower's application is made; the last one matches all
    views.monitor.Metrics   `/metrics`, which we write in a thread
    flower.urls.settings    of tornado's application; `template_loader` is tornado's own setting, unused by Flower
    navbar.html             the navigation; our entry is a copy of that of `broker`

Flower reads them after `flowerconfig.py` and after the command that starts it, so both may call `install`. If a later
Flower changes its navigation, only our entry in it is missing, and the log says so.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import click
from flower import urls
from flower.options import default_options
from tornado.template import Loader, Template
from tornado.web import url

from celery_sharding.errors import ConfigurationError
from celery_sharding.extension import Sharding
from celery_sharding.flower import api, pages
from celery_sharding.flower.feed import Feed
from celery_sharding.metrics import ShardCollector, register

logger = logging.getLogger(__name__)

_OURS = Path(__file__).parent / "templates"
# The prefix of our templates' names.
_FOLDER = "shards/"
_ENTRY = re.compile(r"<li\b(?:(?!</li>).)*?reverse_url\('broker'\).*?</li>", re.DOTALL)
_GROUP, _INDEX = r"([a-z][a-z0-9_-]*)", r"([0-9]{1,4})"

_mounted: Feed | None = None


def install(app: Any = None) -> None:
    """Add the page of shards to the Flower that starts in this process, and follow the groups until it ends.

    Call it in `flowerconfig.py`; a second call has no effect.

    Args:
        app: The Celery app; None: that of `celery -A`.

    Raises:
        ConfigurationError: The app has no shard groups, or this Flower does not know --read-only.
        UnsupportedBroker: The broker keeps no logs.
    """
    global _mounted
    if _mounted is not None:
        return
    _check_read_only()
    feed = Feed(_find_sharding(app))
    mount(feed, urls.handlers, urls.settings)
    register(ShardCollector(feed.watcher))
    feed.watcher.start()
    atexit.register(feed.watcher.stop)
    _mounted = feed


def mounted_sharding() -> Sharding | None:
    """Return the `Sharding` of the app whose shards this process shows, if any."""
    return None if _mounted is None else _mounted.sharding


def mount(feed: Feed, handlers: list[Any], settings: dict[str, Any]) -> None:
    """Add our addresses to Flower's `handlers`, before the last, which matches all, and our templates to its own."""
    own = {"feed": feed}
    # All are `url` objects: under a url prefix, Flower drops the arguments of others.
    handlers[-1:-1] = [
        url(r"/shards", pages.ShardsPage, own, name="shards"),
        url(r"/shards/data", pages.ShardsData, own, name="shards-data"),
        url(rf"/shards/{_GROUP}/{_INDEX}", pages.ShardPage, own, name="shard"),
        url(rf"/shards/{_GROUP}/{_INDEX}/data", pages.ShardData, own, name="shard-data"),
        # After the pages, for a group that is called "static".
        url(r"/shards/static/(.+)", pages.ShardsStatic, {"path": str(pages.STATIC)}, name="shards-static"),
        url(r"/api/shards", api.ShardsApi, own, name="shards-api"),
        url(rf"/api/shards/{_GROUP}", api.GroupApi, own),
        url(rf"/api/shards/{_GROUP}/{_INDEX}", api.ShardApi, own),
        url(rf"/api/shards/{_GROUP}/dead-letters/replay", api.ReplayApi, own),
        url(rf"/api/shards/{_GROUP}(?:/{_INDEX})?/(pause|resume)", api.PauseApi, own),
    ]
    handlers.insert(0, url(r"/metrics", pages.MetricsPage, name="shards-metrics"))  # in place of Flower's
    settings["template_loader"] = _Loader(settings["template_path"])


class _Loader(Loader):
    """Flower's templates with our entry in the navigation, and our own templates."""

    def _create_template(self, name: str) -> Template:  # what tornado's loaders override
        if name.startswith(_FOLDER):
            text = (_OURS / name.removeprefix(_FOLDER)).read_text()
        else:
            text = (Path(self.root) / name).read_text()
        if name == "navbar.html":
            text = _add_entry(text)
        return Template(text, name=name, loader=self)

    def resolve_path(self, name: str, parent_path: str | None = None) -> str:
        return name  # Flower's folder is flat, and our templates extend Flower's


def _add_entry(navigation: str) -> str:
    """Return Flower's navigation with an entry for the shards, a copy of the broker's, after it."""
    found = _ENTRY.search(navigation)
    if found is None:
        logger.warning("this Flower has a changed navigation; the page of shards is at /shards")
        return navigation
    entry = found[0].replace("broker", "shards").replace("Broker", "Shards")
    return f"{navigation[: found.end()]}\n{entry}{navigation[found.end() :]}"


def _check_read_only() -> None:
    """Refuse --read-only to a Flower that does not know it, which would silently ignore it."""
    names = (word.lstrip("-").partition("=")[0].replace("-", "_") for word in sys.argv if word.startswith("-"))
    asked = "read_only" in names
    if (asked or "FLOWER_READ_ONLY" in os.environ) and not hasattr(default_options, "read_only"):
        raise ConfigurationError("this Flower has no read-only mode; install a later one: pip install 'flower>=2.2'")


def _find_sharding(app: Any) -> Sharding:
    if app is None:
        context = click.get_current_context(silent=True)
        app = getattr(context.obj if context is not None else None, "app", None)
    sharding = getattr(app, "sharding", None)
    if not isinstance(sharding, Sharding) or not sharding.settings.groups:
        raise ConfigurationError(
            "the page of shards needs an app with shard groups: name it with `celery -A`, and add "
            'Sharding(app, groups=[ShardGroup("orders", shards=8)]) to it'
        )
    return sharding
