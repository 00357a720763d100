"""The Django app with the claims table: put `celery_sharding.django` into INSTALLED_APPS and migrate."""
