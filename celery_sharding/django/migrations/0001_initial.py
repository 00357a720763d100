"""The claims table."""

from __future__ import annotations

from typing import ClassVar

from django.db import migrations, models


class Migration(migrations.Migration):
    initial = True
    dependencies: ClassVar[list[tuple[str, str]]] = []
    operations: ClassVar[list[migrations.CreateModel]] = [
        migrations.CreateModel(
            name="Claim",
            fields=[
                ("id", models.CharField(max_length=64, primary_key=True, serialize=False)),
                ("key", models.TextField()),
                ("token", models.CharField(max_length=64)),
                ("fencing", models.BigIntegerField()),
                ("expires_at", models.FloatField(db_index=True)),
                ("result", models.BinaryField(null=True)),
            ],
            options={"db_table": "celery_sharding_claims"},
        ),
    ]
