"""Benchmarks: celery-sharding against stock Celery, measured in the same run and printed as ratios.

Both sides use the same queue type, confirms, late acknowledgement, prefetch, serializer and pool, ignore results and
log warnings only. They take turns (stock, sharded, stock, …), so that whatever else the machine does falls on both;
what is printed is the median of the rounds. Ratios are what to read: the rates are those of one machine.
"""

BRIEF_SECONDS = 0.01
"""What a task that is not empty sleeps."""
# Of the tasks that wait for their moment: a second, and the countdown of a retry.
RATE_LIMIT = 5
COUNTDOWN_SECONDS = 0.2
