"""Many questions to a broker in the time of one.

A broker answers in order, so the next question can be sent before the last one is answered. Otherwise the first publish
to a new group would take 20 s on a line of 100 ms each way.

    exist_at_once      looks, each on a channel of its own, since a look that finds nothing costs its channel
    declare_at_once    declarations on one channel; those behind a refused one are not done

py-amqp waits by itself for most answers; `celery_hooks.client` gets round that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from amqp import exceptions as amqp_errors
from amqp import spec

from celery_sharding.celery_hooks.client import close_unwaited, open_unwaited
from celery_sharding.rabbitmq.refusals import is_out_of_reach


@dataclass(frozen=True, slots=True)
class Look:
    """A question whether an exchange of a type, or a queue, exists."""

    name: str
    exchange_type: str | None = None

    def ask(self, channel: Any) -> None:
        if self.exchange_type is None:
            channel.queue_declare(self.name, passive=True, nowait=True)
        else:
            channel.exchange_declare(self.name, self.exchange_type, passive=True, nowait=True)


def exist_at_once(connection: Any, looks: Sequence[Look]) -> list[amqp_errors.NotFound | None]:
    """Return for each look None if it finds something, else the broker's refusal.

    Args:
        connection: Of kombu or py-amqp, connected.

    Raises:
        OSError, amqp errors: The connection is lost, or the broker refuses the look itself.
    """
    inner = connection.connection  # py-amqp's own is itself
    found: dict[int, BaseException | None] = {}

    def note_there(number: int) -> None:
        found[number] = None
        close_unwaited(channels[number])

    def note_refused(number: int, code: int, text: str, class_id: int, method_id: int) -> None:
        channel = channels[number]
        found[number] = amqp_errors.error_for_code(code, text, (class_id, method_id), amqp_errors.ChannelError)
        channel.send_method(spec.Channel.CloseOk)
        channel.collect()

    channels = [inner.Channel(inner) for _ in looks]
    for number, (channel, look) in enumerate(zip(channels, looks, strict=True)):
        open_unwaited(channel, partial(note_refused, number), partial(note_there, number))
        look.ask(channel)
        # Something that is answered if the channel is still open.
        channel.send_method(spec.Basic.Qos, "lBb", (0, 0, False))
    while len(found) < len(looks):
        inner.drain_events()
    answers: list[amqp_errors.NotFound | None] = []
    for number in range(len(looks)):
        answer = found[number]
        if answer is not None and not isinstance(answer, amqp_errors.NotFound):
            raise answer
        answers.append(answer)
    return answers


def all_exist(connection: Any, *looks: Look) -> bool:
    """Say whether all that is looked for exists, even if it is out of reach at the moment."""
    return all(refusal is None or is_out_of_reach(refusal) for refusal in exist_at_once(connection, looks))


def declare_at_once(connection: Any, declare: Callable[[Any], None]) -> None:
    """Let `declare` declare and bind on a channel, and return when the broker has done all of it.

    After a refusal it is called again, and waits for each answer, so that the error names what was refused.
    """
    channel = connection.channel()
    try:
        declare(_Unanswered(channel))
        channel.basic_qos(0, 0, False)  # answered after all before it is done
    except amqp_errors.ChannelError:
        # py-amqp has opened the channel again
        declare(channel)
    close_unwaited(channel)


class _Unanswered:
    """A channel that waits for no answer to a declaration."""

    def __init__(self, channel: Any) -> None:
        self.exchange_declare = partial(channel.exchange_declare, nowait=True)
        self.queue_declare = partial(channel.queue_declare, nowait=True)
        self.queue_bind = partial(channel.queue_bind, nowait=True)
        self.queue_unbind = partial(channel.queue_unbind, nowait=True)
