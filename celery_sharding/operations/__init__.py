"""What an operator does to a group: pause, purge, remove, replay, locate, export."""
