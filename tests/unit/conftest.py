"""A profile of hypothesis for `make test-slow`; ordinary runs take its own."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("deep", max_examples=1_000, deadline=None)
