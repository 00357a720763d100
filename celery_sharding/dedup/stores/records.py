"""A claim record as it is stored outside Redis, and the check of what is read back.

Databases keep the fields in columns; files and Memcached keep them as a line of JSON, then the bytes of the result. A
record that a newer version wrote, or that is damaged, is refused and never overwritten.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from celery_sharding.dedup import claims
from celery_sharding.dedup.claims import Record
from celery_sharding.dedup.owners import Owner
from celery_sharding.errors import DamagedRecord


def to_fields(record: Record) -> dict[str, Any]:
    """Return the fields of `record` with its version, the owner as text."""
    return {
        "version": claims.VERSION,
        "state": record.state,
        "token": record.token,
        "fencing": record.fencing,
        "owner": None if record.owner is None else record.owner.to_text(),
        "lease_until": record.lease_until,
        "expires_at": record.expires_at,
        "attempts": record.attempts,
        "result": record.result,
    }


def from_fields(key: str, fields: Mapping[Any, Any]) -> Record:
    """Return the record of `key` that `to_fields` gave.

    Raises:
        DamagedRecord: It cannot be used; the message says why.
    """
    try:
        if fields["version"] != claims.VERSION:
            raise ValueError(f"its version is {fields['version']!r}")
        if fields["state"] not in claims.STATES:
            raise ValueError(f"its state is {fields['state']!r}")
        held = fields["state"] in (claims.RUNNING, claims.PARKED)
        if held and not (fields["token"] and fields["owner"]):
            raise ValueError("it has no holder")
        if fields["state"] == claims.DONE and fields["result"] is None:
            raise ValueError("it has no result")
        return Record(
            state=fields["state"],
            token=fields["token"],
            fencing=int(fields["fencing"]),
            owner=Owner.from_text(fields["owner"]) if fields["owner"] else None,
            lease_until=float(fields["lease_until"]),
            expires_at=float(fields["expires_at"]),
            attempts=int(fields["attempts"]),
            result=fields["result"],
        )
    except KeyError as exc:
        raise damaged(key, f"it has no {exc}") from exc
    except (TypeError, ValueError) as exc:
        raise damaged(key, str(exc)) from exc


def to_bytes(key: str, record: Record) -> bytes:
    """Return `record` as bytes, with its key for human readers."""
    fields = to_fields(record)
    result = fields.pop("result")
    fields["result_bytes"] = None if result is None else len(result)
    return json.dumps({"key": key, **fields}).encode() + b"\n" + (result or b"")


def from_bytes(key: str, data: bytes) -> Record:
    """Return the record of `key` that `to_bytes` gave.

    Raises:
        DamagedRecord: It cannot be used; the message says why.
    """
    header, _, result = data.partition(b"\n")
    try:
        fields = json.loads(header)
        size = fields.get("result_bytes")
    except (ValueError, AttributeError) as exc:
        raise damaged(key, "it is not a JSON object") from exc
    if fields.get("version") == claims.VERSION and len(result) != (size or 0):
        raise damaged(key, f"its result has {len(result)} bytes of {size}")
    return from_fields(key, {**fields, "result": None if size is None else result})


def damaged(key: str, why: str) -> DamagedRecord:
    return DamagedRecord(
        f"the claim record of {key!r} cannot be used ({why}); it was kept. Upgrade celery-sharding if a newer version "
        "wrote it, else delete it with `celery shards dedup forget … --force`",
        key=key,
    )


def row_id(key: str) -> str:
    return sha256(key.encode()).hexdigest()


def row_key(key: str) -> str:
    """Return `key` as its row shows it: PostgreSQL allows no NUL in a text."""
    return key.replace("\0", "\N{SYMBOL FOR NULL}")
