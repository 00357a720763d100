"""Celery's `app.conf`, shown without the passwords in our settings.

`celery report`, `inspect conf`, `inspect report` and Flower's page of a worker all show `app.conf.table()`. Celery
masks there what it knows by name; `masking` masks ours.
"""

from __future__ import annotations

from typing import Any

from celery import Celery
from celery.app.utils import Settings

from celery_sharding.masking import mask_setting


class MaskedSettings(Settings):
    """Celery's settings, shown without the secrets in ours."""

    def table(self, with_defaults: bool = False, censored: bool = True) -> dict[str, Any]:
        found: dict[str, Any] = super().table(with_defaults, censored)
        return {name: mask_setting(name, value) for name, value in found.items()} if censored else found


def mask_settings(app: Celery) -> None:
    """Mask our settings in `app.conf`, and in the configuration that replaces it later. Reads none of them."""
    _mask(app.conf)
    app.on_after_configure.connect(_mask_configured)


def _mask_configured(source: Any, **_: Any) -> None:
    _mask(source)


def _mask(conf: Any) -> None:
    # Its class is replaced, as that of `app.amqp` is: an attribute that is set on it would become a setting.
    if type(conf) is Settings:
        object.__setattr__(conf, "__class__", MaskedSettings)
