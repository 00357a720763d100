"""Which worker owns which shard."""
