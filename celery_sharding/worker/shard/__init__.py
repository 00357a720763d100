"""One shard queue in this worker, and the end of its segment."""
