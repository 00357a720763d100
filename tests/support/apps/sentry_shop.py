"""A shop whose worker is under Sentry, which sends nothing anywhere."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import sentry_sdk
    from sentry_sdk.integrations.celery import CeleryIntegration
from celery.signals import celeryd_init, worker_process_init

from shop import app, sharded

__all__ = ["app"]


class Nowhere(sentry_sdk.transport.Transport):
    """Sends nothing."""

    def capture_envelope(self, envelope):
        pass


@celeryd_init.connect
@worker_process_init.connect
def begin(**_: object) -> None:
    sentry_sdk.init(
        dsn="http://key@localhost/1", transport=Nowhere, traces_sample_rate=1.0, integrations=[CeleryIntegration()]
    )


@app.task(**sharded)
def traced(key, number):
    """Return the id of the trace that the run belongs to."""
    return sentry_sdk.get_current_span().trace_id
