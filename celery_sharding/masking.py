"""Passwords in our settings, masked wherever Celery or an error shows a setting.

Values are masked by what they look like, so that future settings are masked as well. The host stays visible, as in
Celery's URLs of brokers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_MASK = "*" * 8
# From the first ":" after the user to the last "@": a password may contain characters that should be encoded.
_PASSWORD = re.compile(r"(://|^(?!.*://))([^:@\s]*):.*@", re.DOTALL)
_QUERY = re.compile(r"(://[^?]*\?).*", re.DOTALL)
_OURS = "shard"
_URLS = ("url", "uri")


def mask_passwords(text: str) -> str:
    """Return a text without the passwords and queries of the URLs in it."""
    return _QUERY.sub(rf"\1{_MASK}", _PASSWORD.sub(rf"\1\2:{_MASK}@", text))


def mask_setting(name: object, value: Any) -> Any:
    """Return the value of a setting as it may be shown; the value of other libraries' settings as it is."""
    if not isinstance(name, str) or _OURS not in name.lower():
        return value
    if name.lower().endswith(_URLS) and value is not None and not isinstance(value, str):
        return _MASK
    return _mask(value)


def _mask(value: Any) -> Any:
    if isinstance(value, str):
        return mask_passwords(value)
    if isinstance(value, bytes):
        return mask_passwords(value.decode(errors="replace"))
    if isinstance(value, Mapping):
        return {_mask(name): _mask(each) for name, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_mask(each) for each in value]
    return value
