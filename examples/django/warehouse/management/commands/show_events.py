"""`manage.py show_events ORDER_ID…`: wait until three events of each order were applied, and show them in order."""

from __future__ import annotations

import time
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from warehouse.models import Event

WAIT_SECONDS = 30


class Command(BaseCommand):
    """Reads what the tasks have written."""

    help = "Show the events of orders in the order in which they were applied."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("order_ids", nargs="+", type=int)

    def handle(self, *args: Any, **options: Any) -> None:
        order_ids = options["order_ids"]
        found = Event.objects.filter(order_id__in=order_ids).order_by("id")
        deadline = time.monotonic() + WAIT_SECONDS
        while found.count() < 3 * len(order_ids):
            if time.monotonic() > deadline:
                raise CommandError(f"{found.count()} events after {WAIT_SECONDS} s; does a worker run?")
            time.sleep(0.2)
        for order_id in order_ids:
            kinds = found.filter(order_id=order_id).values_list("kind", flat=True)
            self.stdout.write(f"{order_id}: {', '.join(kinds)}")
