"""What the tasks write."""

from __future__ import annotations

from django.db import models


class Event(models.Model):
    """An event that was applied to an order. Its id in the table says when, compared with the others."""

    order_id = models.IntegerField()
    kind = models.CharField(max_length=20)
