"""Which queues of a group are live, and who may change that."""
