"""Ordinary shared tasks: the settings make them ordered."""

from __future__ import annotations

from celery import shared_task

from warehouse.models import Event


@shared_task
def apply_event(order_id: int, kind: str) -> str:
    """Write down an event of an order."""
    Event.objects.create(order_id=order_id, kind=kind)
    return kind
