"""Which queues this worker consumes, and what becomes of a message that arrives."""
