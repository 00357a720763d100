"""The result of a run as bytes that a claim can keep.

One line of header (format, kind, content type, encoding), then the value as the app's `result_serializer` writes it:
a duplicate gets exactly what the backend would return.
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


class ResultCodec:
    """The results of the claim `key`, as the backend of `app` serializes them."""

    def __init__(self, app: Any, key: str) -> None:
        self._app = app
        self._key = key

    def encode(self, value: Any) -> bytes:
        """Return a result as bytes.

        Raises:
            DeduplicationError: It is larger than 1 MiB.
        """
        # From the backend: a look-up in `app.conf` takes longer than all the rest for None.
        serializer = self._app.backend.serializer
        if value is None:
            return _encoded_none(serializer)
        if isinstance(value, ResultBase) and serializer != "pickle":
            value = value.as_tuple()
        pydantic = sys.modules.get("pydantic")
        if pydantic is not None and isinstance(value, pydantic.BaseModel):
            value = value.model_dump(mode="json")  # What Celery's own `pydantic=True` does, around this decorator.
        return _encoded(_RESULT, value, serializer, self._key)

    def encode_failure(self, error: Exception) -> bytes:
        backend = self._app.backend
        return _encoded(_FAILURE, backend.prepare_exception(error), backend.serializer, self._key)

    def decode(self, data: bytes) -> Any:
        """Return the value that a finished run returned, or raise the error that it raised.

        Raises:
            DamagedRecord: The bytes cannot be read.
        """
        conf = self._app.conf
        try:
            header, _, payload = data.partition(b"\n")
            version, kind, content_type, encoding = header.decode("ascii").split(" ")
            if version != "1" or kind not in (_RESULT, _FAILURE):
                raise ValueError(f"unknown format {header[:80]!r}")
            accept = prepare_accept_content(conf.result_accept_content or conf.accept_content)
            value = loads(payload, content_type, encoding, accept=accept)
        except (ValueError, DecodeError, ContentDisallowed, SerializationError) as exc:
            raise DamagedRecord(
                f"the stored result of {self._key!r} cannot be read ({exc}); it was kept. Upgrade celery-sharding if a "
                "newer version wrote it, check result_accept_content, else let `celery shards dedup forget` it",
                key=self._key,
            ) from exc
        if kind == _FAILURE:
            raise self._app.backend.exception_to_python(value)
        return value


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
    """Return the encoding of None, which most tasks return."""
    return _encoded(_RESULT, None, serializer, "")
