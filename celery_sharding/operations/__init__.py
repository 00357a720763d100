"""What an operator does to a group."""
