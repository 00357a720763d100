"""Send events of many orders, and check that they were handled in order: `orders.py send 1000`, `orders.py check`."""

from __future__ import annotations

import argparse
import sys
import time
import uuid
from collections import Counter

from celery_sharding.errors import PublishError
from celery_sharding.testing import check_order
from shop import apply_event, ledger

ORDERS = 40
SENT = "sent"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    send_parser = commands.add_parser("send", help=f"send events of {ORDERS} orders, in turn")
    send_parser.add_argument("events", type=int)
    send_parser.add_argument("--per-second", type=float, default=50.0)
    check_parser = commands.add_parser(
        "check", help="wait until all that was sent has run; exit with 1 if it is not in order"
    )
    check_parser.add_argument("--wait-seconds", type=float, default=120.0)
    arguments = parser.parse_args()
    if arguments.command == "send":
        send(arguments.events, per_second=arguments.per_second)
        return 0
    return check(wait_seconds=arguments.wait_seconds)


def send(events: int, *, per_second: float) -> None:
    """Send events, numbered on from those that were sent before."""
    numbers = Counter(mark.key for mark in ledger.scan() if mark.kind == SENT)
    for event in range(events):
        order_id = f"order-{event % ORDERS}"
        publish(order_id, numbers[order_id])
        ledger.mark(SENT, order_id, numbers[order_id])
        numbers[order_id] += 1
        time.sleep(1 / per_second)
    print(f"{events} events sent")


def publish(order_id: str, number: int) -> None:
    """Return when the event is stored. On any error, send it again, and publish nothing else until it is."""
    task_id = str(uuid.uuid4())
    while True:
        try:
            apply_event.apply_async([order_id, number], task_id=task_id)
            return
        except PublishError as error:
            # It may be stored anyway (OutcomeUnknown). Then there are two messages with one task id, and only one runs.
            print(f"{order_id} {number}: {error}; again", file=sys.stderr)
            time.sleep(1)


def check(*, wait_seconds: float) -> int:
    """Wait until all that was sent has run, and say what was lost, repeated, overlapping or out of order."""
    sent = [(mark.key, mark.number) for mark in ledger.scan() if mark.kind == SENT]
    ledger.wait_for(len(sent), timeout_seconds=wait_seconds)
    verdict = check_order(ledger, sent)
    print(verdict)
    return 0 if sent and not (verdict.lost or verdict.overlapping or verdict.out_of_order) else 1


if __name__ == "__main__":
    sys.exit(main())
