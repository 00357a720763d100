"""The result of a run as bytes that a claim can keep.

One line of header (format, kind, content type, encoding), then the value as the app's `result_serializer` writes it.
A duplicate so gets exactly what reading the result from the backend would give.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from celery.result import ResultBase
from kombu.exceptions import ContentDisallowed, DecodeError, SerializationError
from kombu.serialization import dumps, loads, prepare_accept_content

from celery_sharding.errors import DamagedRecord, DeduplicationError

RESULT_BYTES_MAX = 1024 * 1024
_RESULT, _FAILURE = "result", "failure"


def encode_result(app: Any, value: Any, *, key: str) -> bytes:
    """Return the result `value` of the claim `key` as bytes.

    Raises:
        DeduplicationError: It is larger than 1 MiB.
    """
    if isinstance(value, ResultBase) and app.backend.serializer != "pickle":
        value = value.as_tuple()
    pydantic = sys.modules.get("pydantic")
    if pydantic is not None and isinstance(value, pydantic.BaseModel):
        value = value.model_dump(mode="json")  # What Celery's own `pydantic=True` does, around this decorator.
    return _encode(app, _RESULT, value, key)


def encode_failure(app: Any, error: Exception, *, key: str) -> bytes:
    """Return the failure of the claim `key` as bytes."""
    return _encode(app, _FAILURE, app.backend.prepare_exception(error), key)


def decode(app: Any, data: bytes, *, key: str) -> Any:
    """Return the value that a finished run of the claim `key` returned, or raise the error that it raised.

    Raises:
        DamagedRecord: The bytes cannot be read.
    """
    try:
        header, _, payload = data.partition(b"\n")
        version, kind, content_type, encoding = header.decode("ascii").split(" ")
        if version != "1" or kind not in (_RESULT, _FAILURE):
            raise ValueError(f"unknown format {header[:80]!r}")
        accept = prepare_accept_content(app.conf.result_accept_content or app.conf.accept_content)
        value = loads(payload, content_type, encoding, accept=accept)
    except (ValueError, DecodeError, ContentDisallowed, SerializationError) as exc:
        raise DamagedRecord(
            f"the stored result of {key!r} cannot be read ({exc}); it was kept. Upgrade celery-sharding if a newer "
            "version wrote it, check result_accept_content, else let `celery shards dedup forget` it",
            key=key,
        ) from exc
    if kind == _FAILURE:
        raise app.backend.exception_to_python(value)
    return value


def _encode(app: Any, kind: str, value: Any, key: str) -> bytes:
    # As the backend has it: to look it up in `app.conf` takes longer than all the rest for None.
    serializer = app.backend.serializer
    return _encoded_none(serializer) if value is None else _encoded(kind, value, serializer, key)


def _encoded(kind: str, value: Any, serializer: str, key: str) -> bytes:
    content_type, encoding, payload = dumps(value, serializer=serializer)
    body = payload.encode() if isinstance(payload, str) else payload
    if len(body) > RESULT_BYTES_MAX:
        raise DeduplicationError(
            f"the {kind} of {key!r} has {len(body):,} bytes; a claim keeps at most {RESULT_BYTES_MAX:,}. Store the "
            "data elsewhere and return where it is",
            key=key,
        )
    return f"1 {kind} {content_type} {encoding}\n".encode("ascii") + body


@cache
def _encoded_none(serializer: str) -> bytes:
    """What most tasks return, encoded once."""
    return _encoded(_RESULT, None, serializer, "")
