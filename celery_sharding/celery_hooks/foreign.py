"""Messages of other client libraries that py-amqp cannot read.

py-amqp decodes routing key, properties and headers before it hands on a message, and raises out of the worker's event
loop if that fails (read in py-amqp 5.4.2): on a routing key of arbitrary bytes, or a timestamp far ahead. Each consumer
that got the message next would end in the same way. Here such a message is read as far as possible, so that it becomes
a dead letter.

    read_foreign      for one channel: routing keys of any bytes; bodies as they came
    read_properties   for this process: properties that cannot be decoded are replaced by a header that says so
    decoded_message   what py-amqp would have done to a body that was left as it came
"""

from __future__ import annotations

from struct import unpack_from
from typing import Any

from amqp import serialization
from amqp.spec import Basic

from celery_sharding.wire import UNREADABLE_HEADER

_UTF8 = frozenset({None, "", "utf-8", "utf8", "us-ascii", "ascii", "binary"})


def read_foreign(channel: Any) -> None:
    """Let `channel` deliver what has a routing key of any bytes, and leave bodies as they came."""
    stock = getattr(channel, "dispatch_method", None)
    if stock is None:
        return  # of a virtual transport
    channel.auto_decode = False
    read_properties()

    def dispatch_method(method: tuple[int, int], payload: bytes, content: Any) -> None:
        if method == Basic.Deliver and not channel.is_closing:
            exchange_at = 14 + payload[4]  # behind the consumer tag, the delivery tag, and a bit
            key_at = exchange_at + 1 + payload[exchange_at]
            key = payload[key_at + 1 : key_at + 1 + payload[key_at]]
            if not key.isascii() and not _is_utf8(key):
                # No public way: what `dispatch_method` calls when it has decoded these.
                (tag,) = unpack_from(">Q", payload, exchange_at - 9)
                channel._on_basic_deliver(
                    payload[5 : 5 + payload[4]].decode(),
                    tag,
                    bool(payload[exchange_at - 1] & 1),
                    payload[exchange_at + 1 : key_at].decode(errors="backslashreplace"),
                    bytes(key),
                    content,
                )
                return
        stock(method, payload, content)

    channel.dispatch_method = dispatch_method


def read_properties() -> None:
    """Let no connection of this process fail on properties or headers that cannot be decoded."""
    stock = serialization.PROPERTY_CLASSES[Basic.CLASS_ID]
    if getattr(stock, "reads_all", False):
        return

    def decode(buffer: bytes, offset: int) -> tuple[dict[str, Any], int]:
        try:
            return stock(buffer, offset)  # type: ignore[no-any-return]
        except Exception as exc:
            # There is no one error for this: UnicodeDecodeError, OverflowError, struct.error, …
            return {"application_headers": {UNREADABLE_HEADER: repr(exc)}}, len(buffer)

    decode.reads_all = True  # type: ignore[attr-defined]
    serialization.PROPERTY_CLASSES[Basic.CLASS_ID] = decode


def decoded_message(message: Any) -> Any:
    """Return kombu's `message` with its body as text if it declares an encoding; later, bytes are taken for UTF-8."""
    encoding = message.content_encoding
    if encoding not in _UTF8 and isinstance(message.body, bytes) and not message.errors:
        try:
            message.body = message.body.decode(encoding)
        except (LookupError, ValueError, TypeError):
            pass  # py-amqp leaves it as it is, too; decoding it later says what is wrong
    return message


def _is_utf8(key: bytes) -> bool:
    try:
        key.decode()
    except UnicodeDecodeError:
        return False
    return True
