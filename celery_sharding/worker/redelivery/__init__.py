"""What a redelivered message must pass before it begins."""
