"""The table that `claim.transaction(using=…)` writes: that of `dedup.stores.schema.claims_table`, column by column."""

from __future__ import annotations

from django.db import models


class Claim(models.Model):
    """The claim of one dedup key, committed with the effects of its run.

    `id` is the SHA-256 of `key`; `expires_at` is in seconds of the database's clock.
    """

    id = models.CharField(max_length=64, primary_key=True)
    key = models.TextField()
    token = models.CharField(max_length=64)
    fencing = models.BigIntegerField()
    expires_at = models.FloatField(db_index=True)
    result = models.BinaryField(null=True)

    class Meta:
        app_label = "celery_sharding"
        db_table = "celery_sharding_claims"

    def __str__(self) -> str:
        return str(self.key)
