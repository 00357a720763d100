"""What the tasks write."""

from __future__ import annotations

from django.db import models


class Event(models.Model):
    """An event that was applied to an order. Its id in the table shows the order of the events."""

    order_id = models.IntegerField()
    kind = models.CharField(max_length=20)
