"""Celery's `app.conf`, shown without the passwords in our settings.

`celery report`, `inspect conf`, `inspect report` and Flower's page of a worker all show `app.conf.table()`. Celery
masks there what it knows by its name; ours are masked by `masking`.
"""

from __future__ import annotations

from typing import Any

from celery.app.utils import Settings

from celery_sharding.masking import mask_setting


class MaskedSettings(Settings):
    """Celery's settings, which are shown without what is secret in ours."""

    def table(self, with_defaults: bool = False, censored: bool = True) -> dict[str, Any]:
        found: dict[str, Any] = super().table(with_defaults, censored)
        return {name: mask_setting(name, value) for name, value in found.items()} if censored else found


def mask_settings(conf: Any) -> None:
    """Let an `app.conf` show our settings masked. Reads nothing of it.

    Its class is replaced, as that of `app.amqp` is: an attribute that is set on it would become a setting.
    """
    if type(conf) is Settings:
        object.__setattr__(conf, "__class__", MaskedSettings)
