"""Signs of life for the broker, and the end of runs when there are none any more."""
