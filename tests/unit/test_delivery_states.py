"""What is on record of the runs of a message, as its diagram says."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from celery_sharding.celery_hooks.requests import DELIVERY
from celery_sharding.worker.run.delivery import Phase, Record
from support.stand_ins import Shard


@pytest.fixture
def record() -> Record:
    """Return the record of a message that was begun once, as is known."""
    record = Record(is_judged=False)
    record.judge(begun=1, is_known=True)
    return record


def announced(record: Record) -> None:
    record.announce(1)


def confirmed(record: Record) -> None:
    record.announce(1)
    record.confirm()


def begun(record: Record) -> None:
    confirmed(record)
    record.begin()


@pytest.mark.parametrize(
    ("reach", "step", "phase", "attempts"),
    [
        (announced, Record.confirm, Phase.CONFIRMED, 2),
        (announced, Record.withdraw, Phase.NONE, 1),
        (confirmed, Record.withdraw, Phase.NONE, 1),
        (confirmed, Record.begin, Phase.BEGUN, 2),
        (begun, Record.put_back, Phase.CONFIRMED, 2),
        (begun, Record.take_back, Phase.TAKEN_BACK, 1),
        (begun, Record.withdraw, Phase.BEGUN, 2),
        (begun, Record.retry, Phase.NONE, 0),
        (announced, Record.take_back, Phase.ANNOUNCED, 2),
        # A run that was not announced does not count, so nothing of it is taken back.
        (lambda record: None, Record.begin, Phase.NONE, 1),
        (Record.begin, Record.take_back, Phase.NONE, 1),
    ],
)
def test_a_record_goes_as_its_diagram_says(
    record: Record, reach: Callable[[Record], None], step: Callable[[Record], object], phase: Phase, attempts: int
) -> None:
    reach(record)
    step(record)
    assert (record.phase, record.attempts) == (phase, attempts)


def test_a_run_that_is_taken_back_is_judged_anew(record: Record) -> None:
    begun(record)
    assert record.is_judged
    record.take_back()
    assert not record.is_judged


def test_a_confirm_that_comes_after_the_withdrawal_announces_nothing(record: Record) -> None:
    announced(record)
    record.withdraw()
    record.confirm()
    assert record.phase is Phase.NONE


def test_only_what_was_delivered_before_has_a_record() -> None:
    shard = Shard()
    assert shard.deliver("first").record is None
    assert shard.deliver("second", redelivered=True).record is not None


def test_a_settled_message_knows_its_request_no_more() -> None:
    # Given a message whose request knows it
    delivery = Shard().deliver("t1")
    delivery.request = object()
    delivery.message.delivery_info[DELIVERY] = (delivery, None)
    # When it is settled, then what only the garbage collector would free is gone
    delivery.settle()
    assert delivery.request is None
    assert DELIVERY not in delivery.message.delivery_info
