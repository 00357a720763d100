"""The way of a message from the caller to the broker's confirm."""
