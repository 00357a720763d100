"""`manage.py send_events ORDER_ID…`: publish three events of each order, when the transaction has committed."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandParser
from django.db import transaction

from warehouse.tasks import apply_event


class Command(BaseCommand):
    """Publishes in the order of the calls: Django runs what waits for the commit one after the other."""

    help = "Publish three events of each order."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("order_ids", nargs="+", type=int)

    def handle(self, *args: Any, **options: Any) -> None:
        with transaction.atomic():
            for kind in ("placed", "paid", "shipped"):
                for order_id in options["order_ids"]:
                    apply_event.delay_on_commit(order_id, kind)
