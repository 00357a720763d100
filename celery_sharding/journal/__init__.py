"""What happens in a group: facts that may be forgotten."""
