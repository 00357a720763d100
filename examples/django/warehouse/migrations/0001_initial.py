"""The table of events."""

from __future__ import annotations

from django.db import migrations, models


class Migration(migrations.Migration):
    """Made by `manage.py makemigrations`."""

    initial = True
    dependencies = ()
    operations = (
        migrations.CreateModel(
            name="Event",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("order_id", models.IntegerField()),
                ("kind", models.CharField(max_length=20)),
            ],
        ),
    )
