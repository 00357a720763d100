"""Which errors come out of a result backend."""

from __future__ import annotations

from types import TracebackType

_BACKENDS = ("celery.backends", "django_celery_results")


def is_of_backend(trace: TracebackType | None) -> bool:
    """Say whether an error came out of a result backend; one of a hook would be raised again."""
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").startswith(_BACKENDS):
            return True
        trace = trace.tb_next
    return False
