"""The one Django app of the project."""
